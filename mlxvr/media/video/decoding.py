"""The decoding loop: packets in, wanted frames out, each one identified by its stamp.

A wrong frame is worse than a slow one. Whatever a file does that its timeline did not announce (a jump that
lands late, packets in another order, frames out of order or without a stamp, a wanted frame that never comes)
raises `Unreliable`, and the caller goes on to a slower, safer way.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import av
import numpy as np

from mlxvr.errors import Cancelled
from mlxvr.media.video.decode_plan import Stretch
from mlxvr.media.video.frame_sink import FrameSink
from mlxvr.media.video.timeline import Timeline
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["Unreliable", "decode_counted", "decode_stretch"]

logger = logging.getLogger(__name__)

_JUMPS_BACK = (0.0, 1.0, 4.0, 16.0)  # seconds before the target: in transport streams, jumps may land late
_MOST_SKIPPED = 5000  # packets between where a jump lands and the part of a file that was scanned


class Unreliable(Exception):
    """The file did something that its timeline did not announce: a signal to the caller, never shown."""


def decode_stretch(
    container: Any,
    stream: Any,
    timeline: Timeline,
    stretch: Stretch,
    slots: Mapping[int, Sequence[int]],
    sink: FrameSink,
    *,
    is_new: bool = False,
    tolerant: bool = False,
    should_stop: ShouldStop = bool,
) -> None:
    """Decode one stretch and hand its frame k to the sink for the places `slots[k]`.

    Args:
        is_new: nothing was read from the container yet, so that no jump is needed to the start of the file.
        tolerant: leave out packets that cannot be decoded; only a wanted frame that does not come is a
        failure then.

    Raises:
        Unreliable: something was not as the timeline says.
        Cancelled: `should_stop` said so.
    """
    is_jump = bool(stretch.first or not is_new or timeline.is_part)
    wanted = {int(timeline.pts[index]): slots[index] for index in stretch.frames}  # stamp -> places
    needed = {int(timeline.positions[index]) for index in stretch.frames}
    latest: int | None = None
    packets = _stretch_packets(container, stream, timeline, stretch, is_jump=is_jump)
    for frame in _frames(packets, stream, timeline, needed, tolerant=tolerant, should_stop=should_stop):
        if frame.pts is None or (latest is not None and frame.pts <= latest):
            raise Unreliable(f"a frame stamped {frame.pts} came after one stamped {latest}")
        latest = frame.pts
        places = wanted.pop(frame.pts, None)
        if places is None:
            continue
        if frame.is_corrupt and not tolerant:
            raise Unreliable(f"the frame stamped {frame.pts} came out damaged")
        sink.add(places, frame)
        if not wanted:
            return
    raise Unreliable(f"{len(wanted)} of {len(stretch.frames)} wanted frames did not come")


def decode_counted(
    container: Any,
    stream: Any,
    slots: Mapping[int, Sequence[int]],
    sink: FrameSink,
    *,
    should_stop: ShouldStop = bool,
) -> None:
    """Decode a new container from its start, counting frames, and hand frame k to the sink for `slots[k]`.

    Raises `Unreliable` if fewer frames come than were counted, `Cancelled` if `should_stop` said so.
    """
    left, index = len(slots), 0
    for packet in container.demux(stream):
        _check(should_stop)
        for frame in _decode(packet, tolerant=True):
            if index in slots:
                sink.add(slots[index], frame)
                left -= 1
            index += 1
        if not left:
            return
    raise Unreliable(f"{left} of {len(slots)} wanted frames did not come")


def _frames(
    packets: Iterator[tuple[int, av.Packet]],
    stream: Any,
    timeline: Timeline,
    needed: set[int],
    *,
    tolerant: bool,
    should_stop: ShouldStop,
) -> Iterator[av.VideoFrame]:
    """Frames that the packets of a stretch give; those that nothing refers to only where they are needed."""
    codec = stream.codec_context
    for position, packet in packets:
        _check(should_stop)
        if timeline.can_skip:
            codec.skip_frame = "DEFAULT" if position in needed else "NONREF"
        yield from _decode(packet, tolerant=tolerant)
    yield from codec.decode(None)  # what the decoder still holds back for reordering


def _stretch_packets(
    container: Any, stream: Any, timeline: Timeline, stretch: Stretch, *, is_jump: bool
) -> Iterator[tuple[int, av.Packet]]:
    """The packets of a stretch with their positions, each checked against the timeline."""
    for position, packet in _packets_from(container, stream, timeline, stretch, is_jump=is_jump):
        if position >= len(timeline.packet_pts) or packet.pts != timeline.packet_pts[position]:
            raise Unreliable(f"packet {position} is stamped {packet.pts}, unlike when the file was scanned")
        if position >= stretch.first:
            yield position, packet
        if position == stretch.last:
            return


def _packets_from(
    container: Any, stream: Any, timeline: Timeline, stretch: Stretch, *, is_jump: bool
) -> Iterator[tuple[int, av.Packet]]:
    """Packets with their positions, from the first of a stretch or an earlier one on."""
    target, tick = int(timeline.packet_pts[stretch.first]), float(stream.time_base)
    before = timeline.packet_pts[: stretch.first + 1]
    landed: int | None = None
    for back in _JUMPS_BACK if is_jump else (0.0,):
        if is_jump:
            container.seek(target - int(back / tick), stream=stream)
        packets = _not_empty(container.demux(stream))
        for skipped, packet in enumerate(packets):
            landed = packet.pts
            found = np.flatnonzero(before == landed)  # empty where the packet has no stamp
            if len(found) == 1:
                yield int(found[0]), packet
                yield from enumerate(packets, int(found[0]) + 1)
                return
            if not timeline.is_part or landed is None or landed >= before[0] or skipped == _MOST_SKIPPED:
                break  # else it is before the part that the timeline holds
    raise Unreliable(f"the jump to packet {stretch.first} landed on a packet stamped {landed}")


def _not_empty(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """Packets up to the end of the file, which an empty one marks."""
    for packet in packets:
        if not packet.size:
            return
        yield packet


def _decode(packet: av.Packet, *, tolerant: bool) -> list[Any]:
    try:
        return packet.decode()
    except av.error.InvalidDataError as error:
        if not tolerant:
            raise Unreliable(f"a packet cannot be decoded: {error}") from error
        logger.info("a damaged packet of the video was left out")
        return []


def _check(should_stop: ShouldStop) -> None:
    if should_stop():
        raise Cancelled("stopped while the video was decoded")
