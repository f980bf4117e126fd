"""The decoding loop: packets in, wanted frames out, each one identified by its stamp.

A wrong frame is worse than a slow one. Whatever a file does that its timeline did not announce (a jump that
lands late, packets in another order, frames out of order or without a stamp, a wanted frame that never comes)
raises `Unreliable`, and the caller goes on to a slower, safer way.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import av
import numpy as np

from mlxvr.callbacks import ShouldStop
from mlxvr.errors import Cancelled
from mlxvr.media.plan import Stretch
from mlxvr.media.sink import FrameSink
from mlxvr.media.timeline import Timeline

__all__ = ["Unreliable", "decode_counted", "decode_stretch"]

logger = logging.getLogger(__name__)


class Unreliable(Exception):
    """The file did something that its timeline did not announce: a signal to the caller, never shown."""


def decode_stretch(
    container: Any,
    stream: Any,
    timeline: Timeline,
    stretch: Stretch,
    slots: Mapping[int, int],
    sink: FrameSink,
    *,
    is_new: bool = False,
    tolerant: bool = False,
    should_stop: ShouldStop = bool,
) -> None:
    """Decode one stretch and hand its frame k to the sink as `slots[k]`.

    Args:
        is_new: nothing was read from the container yet, so that no jump is needed to the start of the file.
        tolerant: leave out packets that cannot be decoded; only a wanted frame that does not come is a
        failure then.

    Raises:
        Unreliable: something was not as the timeline says.
        Cancelled: `should_stop` said so.
    """
    if stretch.first or not is_new:
        container.seek(int(timeline.packet_pts[stretch.first]), stream=stream)
    wanted = {int(timeline.pts[index]): slots[index] for index in stretch.frames}  # stamp -> place
    needed = {int(timeline.positions[index]) for index in stretch.frames}
    latest: int | None = None
    for frame in _frames(container, stream, timeline, stretch, needed, tolerant=tolerant, should_stop=should_stop):
        if frame.pts is None or (latest is not None and frame.pts <= latest):
            raise Unreliable(f"a frame stamped {frame.pts} came after one stamped {latest}")
        latest = frame.pts
        slot = wanted.pop(frame.pts, None)
        if slot is None:
            continue
        if frame.is_corrupt and not tolerant:
            raise Unreliable(f"the frame stamped {frame.pts} came out damaged")
        sink.add(slot, frame)
        if not wanted:
            return
    raise Unreliable(f"{len(wanted)} of {len(stretch.frames)} wanted frames did not come")


def decode_counted(
    container: Any,
    stream: Any,
    slots: Mapping[int, int],
    sink: FrameSink,
    *,
    should_stop: ShouldStop = bool,
) -> None:
    """Decode a new container from its start, counting frames, and hand frame k to the sink as `slots[k]`.

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
    container: Any,
    stream: Any,
    timeline: Timeline,
    stretch: Stretch,
    needed: set[int],
    *,
    tolerant: bool,
    should_stop: ShouldStop,
) -> Iterator[av.VideoFrame]:
    """Frames that the packets of a stretch give; those that nothing refers to only where they are needed."""
    codec = stream.codec_context
    for position, packet in _stretch_packets(container, stream, timeline, stretch):
        _check(should_stop)
        if timeline.can_skip:
            codec.skip_frame = "DEFAULT" if position in needed else "NONREF"
        yield from _decode(packet, tolerant=tolerant)
    yield from codec.decode(None)  # what the decoder still holds back for reordering


def _stretch_packets(
    container: Any, stream: Any, timeline: Timeline, stretch: Stretch
) -> Iterator[tuple[int, av.Packet]]:
    """The packets of a stretch with their positions, each checked against the timeline."""
    position: int | None = None
    for packet in container.demux(stream):
        if not packet.size:  # the end of the file
            return
        if position is None:
            position = _landing(timeline, packet, stretch)
        elif position >= len(timeline.packet_pts) or packet.pts != timeline.packet_pts[position]:
            raise Unreliable(f"packet {position} is stamped {packet.pts}, unlike when the file was scanned")
        if position >= stretch.first:
            yield position, packet
        if position == stretch.last:
            return
        position += 1


def _landing(timeline: Timeline, packet: av.Packet, stretch: Stretch) -> int:
    """The position of the first packet after a jump, which may come early but not late."""
    before = timeline.packet_pts[: stretch.first + 1]
    found = np.flatnonzero(before == packet.pts)  # empty where the packet has no stamp
    if len(found) != 1:
        raise Unreliable(f"the jump to packet {stretch.first} landed on a packet stamped {packet.pts}")
    return int(found[0])


def _decode(packet: av.Packet, *, tolerant: bool) -> list[Any]:
    try:
        return packet.decode()
    except av.error.InvalidDataError as error:
        if not tolerant:
            raise Unreliable(f"a packet cannot be decoded: {error}") from error
        logger.warning("a damaged packet of the video was left out")
        return []


def _check(should_stop: ShouldStop) -> None:
    if should_stop():
        raise Cancelled("stopped while the video was decoded")
