"""Open a video with FFmpeg, and decode the wanted frames, each identified by its stamp.

A wrong frame is worse than a slow one. If a file does not behave as its timeline predicts (a jump lands late, packets
come in another order, frames are out of order or without a stamp, a wanted frame never comes), `Unreliable` is raised,
and the caller falls back to a slower, safer way.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from mlxvr.errors import Cancelled, MediaError
from mlxvr.media.container import unreadable
from mlxvr.media.video.decode_plan import Stretch
from mlxvr.media.video.frame_sink import FrameSink
from mlxvr.media.video.timeline import Timeline
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["Unreliable", "decode_counted", "decode_stretch", "open_video"]

logger = logging.getLogger(__name__)

_JUMPS_BACK = (0.0, 1.0, 4.0, 16.0)  # seconds before the target: in transport streams, jumps may land late
_MOST_SKIPPED = 5000  # packets between the end of a jump and the part of the file that was scanned

# Titles and comments may have any encoding, and none of them matters here. PyAV 18 raises on bytes that are not UTF-8,
# unless this argument is given; PyAV 19 never raises and no longer takes the argument.
_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class Unreliable(Exception):
    """The file did not behave as its timeline predicts: a signal to the caller, never shown to the user."""


@contextmanager
def open_video(path: Path, *, threads: int = 0) -> Iterator[tuple[Any, Any]]:
    """Open a file; yields the container and its video stream.

    It is decoded on `threads` threads (0: FFmpeg's choice, all cores). Raises `MediaError` if the file cannot be read
    or holds no video, and for FFmpeg's errors within the block.
    """
    try:
        # The whitelist keeps a playlist from fetching anything. The prefix keeps a name with a colon from being a URL.
        container = av.open(f"file:{path}", container_options={"protocol_whitelist": "file"}, **_METADATA)
    except av.error.FFmpegError as error:
        raise unreadable(path) from error
    with container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"  # FFmpeg's default, by slices, does nothing for most files
        stream.thread_count = threads
        try:
            yield container, stream
        except av.error.FFmpegError as error:
            raise MediaError(f"{path} is damaged ({error.strerror}): copy or download it again") from error


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
    """Decode one stretch and pass its frame k to the sink for the places `slots[k]`.

    Args:
        is_new: whether nothing was read from the container yet, so that the start of the file needs no jump.
        tolerant: whether to leave out packets that cannot be decoded; then only a missing wanted frame is a failure.

    Raises:
        Unreliable: the file differs from its timeline.
        Cancelled: `should_stop` returned True.
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
    """Decode a new container from its start, counting frames, and pass frame k to the sink for `slots[k]`.

    Raises `Unreliable` if fewer frames come than were counted, `Cancelled` if `should_stop` returned True.
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


def _video_stream(container: Any, path: Path) -> Any:
    name = container.format.name
    if name in ("tty", "image2", "ico") or name.endswith("_pipe"):  # ANSI art, as which FFmpeg reads any .txt; pictures
        raise unreadable(path)
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        content = "sound but no moving picture" if container.streams.audio else "no moving picture"
        raise MediaError(f"{path} holds {content}: give a file with a video track")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise MediaError(f"{path} has a codec that FFmpeg cannot decode: convert it to H.264")
    return stream


def _frames(
    packets: Iterator[tuple[int, av.Packet]],
    stream: Any,
    timeline: Timeline,
    needed: set[int],
    *,
    tolerant: bool,
    should_stop: ShouldStop,
) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stretch's packets; frames that no other refers to are decoded only if they are needed."""
    codec = stream.codec_context
    for position, packet in packets:
        _check(should_stop)
        if timeline.can_skip:
            codec.skip_frame = "DEFAULT" if position in needed else "NONREF"
        yield from _decode(packet, tolerant=tolerant)
    yield from codec.decode(None)  # the frames that the decoder still holds back for reordering


def _stretch_packets(
    container: Any, stream: Any, timeline: Timeline, stretch: Stretch, *, is_jump: bool
) -> Iterator[tuple[int, av.Packet]]:
    """Yield the packets of a stretch with their positions, each checked against the timeline."""
    for position, packet in _packets_from(container, stream, timeline, stretch, is_jump=is_jump):
        if position >= len(timeline.packet_pts) or packet.pts != timeline.packet_pts[position]:
            raise Unreliable(f"packet {position} is stamped {packet.pts}, unlike in the scan of the file")
        if position >= stretch.first:
            yield position, packet
        if position == stretch.last:
            return


def _packets_from(
    container: Any, stream: Any, timeline: Timeline, stretch: Stretch, *, is_jump: bool
) -> Iterator[tuple[int, av.Packet]]:
    """Yield packets with their positions, from the first of a stretch or an earlier one onwards."""
    target, tick = int(timeline.packet_pts[stretch.first]), float(stream.time_base)
    before = timeline.packet_pts[: stretch.first + 1]
    landed: int | None = None
    for back in _JUMPS_BACK if is_jump else (0.0,):
        if is_jump:
            container.seek(target - int(back / tick), stream=stream)
        packets = _not_empty(container.demux(stream))
        for skipped, packet in enumerate(packets):
            landed = packet.pts
            matches = np.flatnonzero(before == landed)  # empty if the packet has no stamp
            if len(matches) == 1:
                yield int(matches[0]), packet
                yield from enumerate(packets, int(matches[0]) + 1)
                return
            if not timeline.is_part or landed is None or landed >= before[0] or skipped == _MOST_SKIPPED:
                break  # otherwise the packet lies before the part that the timeline holds
    raise Unreliable(f"the jump to packet {stretch.first} landed on a packet stamped {landed}")


def _not_empty(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """Yield packets up to the end of the file, which an empty packet marks."""
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
