"""When each frame of a stream is shown, where it lies in the file, and where decoding can start.

Frame k of a clip is the k-th frame that a decoder gives when it decodes all of it, in presentation order.
Decoding all of it to find out is what this module avoids: the packets of a healthy mp4, mov, mkv, webm, ts or
mpg file carry presentation stamps, and reading them takes milliseconds. Not every packet is a frame that is
shown:

- packets outside an edit list (a trimmed phone clip) are marked "discard": decoded, never shown;
- the last packet of a file that was cut off is marked "corrupt";
- VP8 has packets that only update references, told by a bit of their first byte.

Where stamps are missing (raw streams), repeat (field pairs), are made up by the demuxer (AVI) or are at odds with the
order of decoding (see `clock`), there is no timeline, and `count_frames` finds the frames by decoding.
"""

import logging
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from mlxvr.errors import Cancelled
from mlxvr.media.video.bitstream import SKIPPABLE, hevc_layer, hevc_length_size, is_shown_vp8
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

__all__ = ["CHECK_EVERY", "PacketTable", "Timeline", "count_frames", "scan", "stated_rates"]

logger = logging.getLogger(__name__)

_DEFAULT_FPS = Fraction(25)  # FFmpeg's own, for streams that say nothing
CHECK_EVERY = 256  # packets between two looks at should_stop


@dataclass(frozen=True, eq=False)
class Timeline:
    """The frames of a stream in presentation order.

    `packet_pts`, `positions`, `key_positions` and `key_pts` are empty if the frames were counted by decoding.
    """

    seconds: np.ndarray  # float64 (n,): from the first frame; index / fps, or real times where the rate varies
    fps: float  # average frames per second
    is_variable: bool
    duration: float  # seconds from the first frame to the end of the last
    offset: float  # seconds on a player's clock at which the first frame is shown
    rates: tuple[float, ...]  # frames per second that the file's headers state
    can_skip: bool  # frames that no other refers to, by their marks, can be left out when decoding
    pts: np.ndarray  # int64 (n,): stamp of each frame, ascending
    positions: np.ndarray  # int64 (n,): place of each frame's packet in the order of decoding
    packet_pts: np.ndarray  # int64 (packets,): stamp of every packet in the order of decoding
    key_positions: np.ndarray  # int64 (keys,): packets at which decoding can start
    key_pts: np.ndarray  # int64 (keys,): their stamps, ascending
    is_part: bool = False  # holds a stretch of the file only: what is outside was not read

    def __len__(self) -> int:
        return len(self.seconds)


def scan(
    container: Any, stream: Any, *, is_cut: bool = False, should_stop: ShouldStop | None = None
) -> Timeline | None:
    """Read the timeline from the packets, without decoding; None if it cannot be relied on.

    The container must be at its start, and is left at its end. If the file `is_cut` short, the frames at its
    end that may be shown after missing ones are left out, since their place is not known.
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
        logger.info("the video's time stamps are at odds with the order of its frames; counting them")
        return None
    last = table.durations[positions[-1]] * tick
    seconds, fps, is_variable, length = _clock(stream, (table.believed(positions) - pts[0]) * tick, last)
    offset = start_offset(container, stream, int(pts[0]))
    return table.timeline(positions, seconds, fps, is_variable, length, offset)


class PacketTable:
    """What the packets of a stream say of themselves, in the order of decoding."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.pts: list[int] = []
        self.shown: list[bool] = []
        self.keys: list[int] = []  # positions of keyframes
        self.durations: list[int] = []
        self._dts: list[int | None] = []
        self._stream = stream
        self._made_up = container.format.name == "avi"
        self._codec = stream.codec_context.name
        self._length_size = hevc_length_size(stream.codec_context.extradata) if self._codec == "hevc" else None
        self._can_skip = self._codec in SKIPPABLE or self._length_size is not None

    def __len__(self) -> int:
        return len(self.pts)

    def add(self, packet: Any) -> bool:
        """Take the next packet; False if it has no stamp that can be relied on."""
        if self._made_up or packet.pts is None:
            return False
        if packet.is_keyframe:
            self.keys.append(len(self.pts))
        if self._can_skip and self._length_size is not None:
            self._can_skip = not hevc_layer(packet, self._length_size)  # all in the base layer
        hidden = self._codec == "vp8" and not is_shown_vp8(packet)
        self.shown.append(not (packet.is_discard or packet.is_corrupt or hidden))
        self.pts.append(packet.pts)
        self.durations.append(packet.duration or 0)
        self._dts.append(packet.dts)
        return True

    def shown_positions(self) -> np.ndarray:
        """int64 (n,): positions of the packets that are shown, in the order in which they are."""
        positions = np.flatnonzero(self.shown)
        return positions[np.argsort(np.array(self.pts, dtype=np.int64)[positions], kind="stable")]

    def is_in_order(self, positions: np.ndarray) -> bool:
        """Whether no two frames have one stamp, and keyframes are stored in the order in which they are shown."""
        pts = np.array(self.pts, dtype=np.int64)
        return bool(self.keys) and bool(np.all(np.diff(pts[positions]) > 0) and np.all(np.diff(pts[self.keys]) > 0))

    def believed(self, positions: np.ndarray) -> np.ndarray:
        """int64 (n,): stamps of frames, without those that decoding stamps refute.

        Where frames are stored in the order in which they are shown, both stamps of a packet keep one distance. This
        tells a fault of the last frame's stamp from a pause before it.
        """
        pts = np.array(self.pts, dtype=np.int64)[positions]
        known = [dts for dts in self._dts if dts is not None]
        if self._stream.codec_context.has_b_frames or len(known) < len(self._dts):
            return pts
        dts = np.array(known, dtype=np.int64)[positions]
        distance = int(np.median(pts - dts))
        is_wrong = np.abs(pts - dts - distance) * float(self._stream.time_base) > FAR_SECONDS
        mended = np.where(is_wrong, dts + distance, pts)
        if not np.any(is_wrong) or np.any(np.diff(mended) <= 0):
            return pts
        logger.warning("%d of the video's time stamps are far out: its decoding stamps count there", is_wrong.sum())
        return mended

    def timeline(
        self,
        positions: np.ndarray,
        seconds: np.ndarray,
        fps: float,
        is_variable: bool,
        duration: float,
        offset: float,
        *,
        is_part: bool = False,
    ) -> Timeline:
        """The timeline of the frames at `positions`; the rest as in `Timeline`."""
        pts, keys = np.array(self.pts, dtype=np.int64), np.array(self.keys, dtype=np.int64)
        return Timeline(
            seconds=seconds,
            fps=fps,
            is_variable=is_variable,
            duration=duration,
            offset=offset,
            rates=stated_rates(self._stream),
            can_skip=self._can_skip,
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
    """Find the frames by decoding all of them, for streams whose packets do not tell; arguments as for `scan`."""
    stamps: list[int | None] = []
    last = 0  # ticks that the last frame is shown
    damaged = 0
    for packet in container.demux(stream):
        if should_stop is not None and should_stop():
            raise Cancelled("stopped while the video's frames were counted")
        try:
            for frame in packet.decode():
                stamps.append(frame.pts)
                last = frame.duration
        except av.error.InvalidDataError:  # what cannot be decoded is not shown; the second pass skips it as well
            damaged += 1
    if damaged:
        logger.warning("%d packets of the video are damaged and were skipped", damaged)
    stamps = stamps[: _certain(len(stamps), stream, is_cut)]
    rate = float(stream.guessed_rate or stream.average_rate or _DEFAULT_FPS)
    seconds, fps, is_variable, duration = np.arange(len(stamps)) / rate, rate, False, len(stamps) / rate
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) == len(stamps) > 1 and container.format.name != "avi":
        tick = float(stream.time_base)
        times = mend_times(np.array(known) * tick, may_jump=may_jump(container))
        if times is not None:
            if not np.allclose(times, (np.array(known) - known[0]) * tick):
                logger.warning("time stamps of the video jump: the jumps are closed, and times may be a little off")
            if steady_rate(times, [rate]) is None:
                seconds, fps, is_variable, duration = _clock(stream, times, (last or 0) * tick)
    offset = start_offset(container, stream, known[0]) if known else 0.0
    none = np.empty(0, dtype=np.int64)
    rates = stated_rates(stream)
    return Timeline(seconds, fps, is_variable, duration, offset, rates, False, none, none, none, none, none)


def stated_rates(stream: Any) -> tuple[float, ...]:
    """Frames per second as the headers and FFmpeg's guesses state them, the likeliest first."""
    return tuple(float(rate) for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate) if rate)


def _certain(count: int, stream: Any, is_cut: bool) -> int:
    """How many of `count` frames are certain to have their place."""
    return max(0, count - MAX_REORDERING) if is_cut and stream.codec_context.has_b_frames else count


def _clock(stream: Any, times: np.ndarray, last: float) -> tuple[np.ndarray, float, bool, float]:
    """(seconds of each frame, frames per second, whether the rate varies, duration) from real times in seconds.

    `last` is how long the last frame is shown, 0 if that is not known.
    """
    count = len(times)
    span = float(times[-1])
    measured = (count - 1) / span if span > 0 else 0.0
    rate = steady_rate(times, (*stated_rates(stream), measured))
    if rate is not None:
        return np.arange(count) / rate, rate, False, count / rate
    if span == 0:
        fps = float(_DEFAULT_FPS)
        return times, fps, False, count / fps
    duration = span + (last or span / (count - 1))
    return times, count / duration, True, duration
