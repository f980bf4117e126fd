"""Index a stream: when each frame is shown, where it is in the file, and where decoding can start.

Frame k of a clip is the k-th frame, in presentation order, that a decoder returns when it decodes the whole clip. This
module finds it without decoding: the packets of a healthy mp4, mov, mkv, webm, ts or mpg file have presentation stamps,
and reading those takes milliseconds. Not every packet is a frame that is shown:

- packets outside an edit list (a trimmed phone clip) are marked "discard": they are decoded, but never shown;
- the last packet of a file that was cut off is marked "corrupt";
- VP8 has packets that only update references, marked by a bit of their first byte.

If stamps are missing (raw streams), repeat (field pairs), are made up by the demuxer (AVI) or contradict the order of
decoding (see `timestamps`), there is no timeline, and `count_frames` finds the frames by decoding.
"""

import logging
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Self

import av
import numpy as np

from mlxvr.errors import Cancelled
from mlxvr.media.video.packet_table import PacketTable
from mlxvr.media.video.timestamps import (
    FAR_SECONDS,
    MAX_REORDERING,
    is_far_out,
    may_jump,
    mend_times,
    start_offset,
    steady_rate,
)
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["CHECK_EVERY", "Clock", "Timeline", "build_timeline", "count_frames", "scan", "stated_rates"]

logger = logging.getLogger(__name__)

_DEFAULT_FPS = Fraction(25)  # FFmpeg's own, for streams that say nothing
CHECK_EVERY = 256  # packets between two calls of should_stop


class Clock(NamedTuple):
    """The times of frames."""

    seconds: np.ndarray  # float64 (n,): from the first frame; index / fps, or real times if the rate varies
    fps: float  # average frames per second
    is_variable: bool
    duration: float  # seconds from the first frame to the end of the last


@dataclass(frozen=True, eq=False)
class Timeline:
    """The frames of a stream in presentation order.

    `packet_pts`, `positions`, `key_positions` and `key_pts` are empty if the frames were counted by decoding.
    """

    seconds: np.ndarray  # these four as in `Clock`
    fps: float
    is_variable: bool
    duration: float
    offset: float  # seconds on a player's clock at which the first frame is shown
    rates: tuple[float, ...]  # frames per second that the file's headers state
    can_skip: bool  # whether decoding may skip frames that are marked as referred to by no other
    pts: np.ndarray  # int64 (n,): stamp of each frame, ascending
    positions: np.ndarray  # int64 (n,): place of each frame's packet in the order of decoding
    packet_pts: np.ndarray  # int64 (packets,): stamp of every packet in the order of decoding
    key_positions: np.ndarray  # int64 (keys,): packets at which decoding can start
    key_pts: np.ndarray  # int64 (keys,): their stamps, ascending
    is_part: bool = False  # the timeline holds only a stretch of the file; the rest was not read

    def __len__(self) -> int:
        return len(self.seconds)

    @classmethod
    def without_packets(cls, clock: Clock, offset: float, rates: tuple[float, ...]) -> Self:
        """Return a timeline of frames whose packets are not known."""
        none = np.empty(0, dtype=np.int64)
        return cls(*clock, offset, rates, False, none, none, none, none, none)


def scan(
    container: Any, stream: Any, *, is_cut: bool = False, should_stop: ShouldStop | None = None
) -> Timeline | None:
    """Read the timeline from the packets, without decoding; None if it would not be reliable.

    The container must be at its start, and is left at its end. If the file `is_cut` short, the frames at its end that
    may be shown after missing ones are left out, since their place is not known.
    """
    table = PacketTable(container, stream)
    for number, packet in enumerate(container.demux(stream)):
        if should_stop is not None and number % CHECK_EVERY == 0 and should_stop():
            raise Cancelled("stopped while the video's index was read")
        if packet.size and not table.add(packet):  # an empty one marks the end of the stream
            return None
    positions = table.shown_positions()
    positions = positions[: _certain(len(positions), stream, is_cut)]
    if not len(positions) or not table.is_in_order(positions):
        return None
    tick = float(stream.time_base)
    packet_pts = np.array(table.pts, dtype=np.int64)
    pts = packet_pts[positions]
    jumps = may_jump(container) and np.any(np.diff(pts) * tick > FAR_SECONDS)
    if jumps or is_far_out(packet_pts[np.flatnonzero(table.shown)], tick):
        logger.info("the video's time stamps contradict the order of its frames; counting the frames")
        return None
    last = table.durations[positions[-1]] * tick
    clock = _read_clock(stream, (table.corrected_stamps(positions) - pts[0]) * tick, last)
    offset = start_offset(container, stream, int(pts[0]))
    return build_timeline(stream, table, positions, clock, offset)


def build_timeline(
    stream: Any, table: PacketTable, positions: np.ndarray, clock: Clock, offset: float, *, is_part: bool = False
) -> Timeline:
    """Return the timeline of the frames at `positions` of a packet table; `offset` and `is_part` as in `Timeline`."""
    pts, keys = np.array(table.pts, dtype=np.int64), np.array(table.keys, dtype=np.int64)
    return Timeline(
        *clock,
        offset=offset,
        rates=stated_rates(stream),
        can_skip=table.can_skip,
        pts=pts[positions],
        positions=positions,
        packet_pts=pts,
        key_positions=keys,
        key_pts=pts[keys],
        is_part=is_part,
    )


def count_frames(
    container: Any, stream: Any, *, is_cut: bool = False, should_stop: ShouldStop | None = None
) -> Timeline:
    """Find the frames by decoding all of them, for streams whose packets do not tell; takes the arguments of `scan`."""
    stamps: list[int | None] = []
    last = 0  # ticks for which the last frame is shown
    damaged = 0
    for packet in container.demux(stream):
        if should_stop is not None and should_stop():
            raise Cancelled("stopped while the video's frames were counted")
        try:
            for frame in packet.decode():
                stamps.append(frame.pts)
                last = frame.duration
        except av.error.InvalidDataError:  # such a packet is not shown; the second pass skips it too
            damaged += 1
    if damaged:
        logger.warning("%d packets of the video are damaged and were skipped", damaged)
    stamps = stamps[: _certain(len(stamps), stream, is_cut)]
    rate = float(stream.guessed_rate or stream.average_rate or _DEFAULT_FPS)
    clock = Clock(np.arange(len(stamps)) / rate, rate, False, len(stamps) / rate)
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) == len(stamps) > 1 and container.format.name != "avi":
        tick = float(stream.time_base)
        times = mend_times(np.array(known) * tick, may_jump=may_jump(container))
        if times is not None:
            if not np.allclose(times, (np.array(known) - known[0]) * tick):
                logger.warning("time stamps of the video jump: the jumps are removed, and times may be slightly off")
            if steady_rate(times, [rate]) is None:
                clock = _read_clock(stream, times, (last or 0) * tick)
    offset = start_offset(container, stream, known[0]) if known else 0.0
    return Timeline.without_packets(clock, offset, stated_rates(stream))


def stated_rates(stream: Any) -> tuple[float, ...]:
    """Return the frames per second that the headers and FFmpeg's guesses state, the likeliest first."""
    return tuple(float(rate) for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate) if rate)


def _certain(count: int, stream: Any, is_cut: bool) -> int:
    """Return how many of `count` frames are certain to have the right place."""
    return max(0, count - MAX_REORDERING) if is_cut and stream.codec_context.has_b_frames else count


def _read_clock(stream: Any, times: np.ndarray, last: float) -> Clock:
    """Return the clock of frames from their real times in seconds.

    `last` is the seconds for which the last frame is shown, 0 if that is not known.
    """
    count = len(times)
    span = float(times[-1])
    measured = (count - 1) / span if span > 0 else 0.0
    rate = steady_rate(times, (*stated_rates(stream), measured))
    if rate is not None:
        return Clock(np.arange(count) / rate, rate, False, count / rate)
    if span == 0:
        fps = float(_DEFAULT_FPS)
        return Clock(times, fps, False, count / fps)
    duration = span + (last or span / (count - 1))
    return Clock(times, count / duration, True, duration)
