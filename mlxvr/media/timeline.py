"""When each frame of a stream is shown, where it lies in the file, and where decoding can start.

Frame k of a clip is the k-th frame that a decoder gives when it decodes all of it, in presentation order.
Decoding all of it to find out is what this module avoids: the packets of a healthy mp4, mov, mkv, webm, ts or
mpg file carry presentation stamps, and reading them takes milliseconds. Not every packet is a frame that is
shown:

- packets outside an edit list (a trimmed phone clip) are marked "discard": decoded, never shown;
- the last packet of a file that was cut off is marked "corrupt";
- VP8 has packets that only update references, told by a bit of their first byte.

Where stamps are missing (raw streams), repeat (field pairs) or are made up by the demuxer (AVI), there is no
timeline, and `count_frames` finds the frames by decoding.
"""

import logging
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from mlxvr.callbacks import ShouldStop
from mlxvr.errors import Cancelled
from mlxvr.media.bitstream import SKIPPABLE, hevc_layer, hevc_length_size, is_shown_vp8
from mlxvr.media.sampling import time_range

__all__ = ["Timeline", "count_frames", "scan"]

logger = logging.getLogger(__name__)

_DEFAULT_FPS = Fraction(25)  # FFmpeg's own, for streams that say nothing
_MAX_REORDERING = 16  # frames that a decoder may hold back at most (H.264 and HEVC max_num_reorder_frames)
_CHECK_EVERY = 256  # packets between two looks at should_stop


@dataclass(frozen=True, eq=False)
class Timeline:
    """The frames of a stream in presentation order.

    `packet_pts`, `positions`, `key_positions` and `key_pts` are empty if the frames were counted by decoding.
    """

    seconds: np.ndarray  # float64 (n,): index / fps, or real times where the rate varies; starts at 0
    fps: float  # average frames per second
    is_variable: bool
    duration: float  # seconds
    can_skip: bool  # frames that no other refers to, by their marks, can be left out when decoding
    pts: np.ndarray  # int64 (n,): stamp of each frame, ascending
    positions: np.ndarray  # int64 (n,): place of each frame's packet in the order of decoding
    packet_pts: np.ndarray  # int64 (packets,): stamp of every packet in the order of decoding
    key_positions: np.ndarray  # int64 (keys,): packets at which decoding can start
    key_pts: np.ndarray  # int64 (keys,): their stamps, ascending

    def __len__(self) -> int:
        return len(self.seconds)

    def range(self, start: float | None, end: float | None) -> tuple[int, int]:
        """Indices of the first and the last frame shown between two times in seconds, both included.

        For streams of variable rate: where the rate is constant, `sampling.frame_range` is the training
        code's rule. Raises `MediaError` if there is none.
        """
        return time_range(self.seconds, self.duration, start=start, end=end)


def scan(
    container: Any, stream: Any, *, is_cut: bool = False, should_stop: ShouldStop | None = None
) -> Timeline | None:
    """Read the timeline from the packets, without decoding; None if it cannot be relied on.

    The container must be at its start, and is left at its end. If the file `is_cut` short, the frames at its
    end that may be shown after missing ones are left out, since their place is not known.
    """
    stamps: list[int] = []
    shown: list[bool] = []
    keys: list[int] = []
    durations: list[int] = []
    made_up = container.format.name == "avi"
    codec = stream.codec_context.name
    length_size = hevc_length_size(stream.codec_context.extradata) if codec == "hevc" else None
    can_skip = codec in SKIPPABLE or length_size is not None
    for number, packet in enumerate(container.demux(stream)):
        if should_stop is not None and number % _CHECK_EVERY == 0 and should_stop():
            raise Cancelled("stopped while the video's index was read")
        if not packet.size:  # the end-of-stream marker
            continue
        if made_up or packet.pts is None:
            return None
        if packet.is_keyframe:
            keys.append(len(stamps))
        if can_skip and length_size is not None:
            can_skip = not hevc_layer(packet, length_size)  # all in the base layer
        hidden = codec == "vp8" and not is_shown_vp8(packet)
        shown.append(not (packet.is_discard or packet.is_corrupt or hidden))
        stamps.append(packet.pts)
        durations.append(packet.duration or 0)
    packet_pts = np.array(stamps, dtype=np.int64)
    positions = np.flatnonzero(shown)
    positions = positions[np.argsort(packet_pts[positions], kind="stable")]
    positions = positions[: _certain(len(positions), stream, is_cut)]
    pts = packet_pts[positions]
    key_positions = np.array(keys, dtype=np.int64)
    key_pts = packet_pts[key_positions]
    if not len(pts) or not len(keys) or np.any(np.diff(pts) <= 0) or np.any(np.diff(key_pts) <= 0):
        return None
    times = (pts - pts[0]) * float(stream.time_base)
    seconds, fps, is_variable, length = _clock(stream, times, durations[positions[-1]])
    return Timeline(seconds, fps, is_variable, length, can_skip, pts, positions, packet_pts, key_positions, key_pts)


def count_frames(
    container: Any, stream: Any, *, is_cut: bool = False, should_stop: ShouldStop | None = None
) -> Timeline:
    """Find the frames by decoding all of them, for streams whose packets do not tell; arguments as for `scan`."""
    count = 0
    for packet in container.demux(stream):
        if should_stop is not None and should_stop():
            raise Cancelled("stopped while the video's frames were counted")
        try:
            count += len(packet.decode())
        except av.error.InvalidDataError:  # what cannot be decoded is not shown; the second pass skips it as well
            logger.warning("a damaged packet of the video was skipped")
    count = _certain(count, stream, is_cut)
    fps = float(stream.guessed_rate or stream.average_rate or _DEFAULT_FPS)
    none = np.empty(0, dtype=np.int64)
    return Timeline(np.arange(count) / fps, fps, False, count / fps, False, none, none, none, none, none)


def _certain(count: int, stream: Any, is_cut: bool) -> int:
    """How many of `count` frames are certain to have their place."""
    return max(0, count - _MAX_REORDERING) if is_cut and stream.codec_context.has_b_frames else count


def _clock(stream: Any, times: np.ndarray, last: int) -> tuple[np.ndarray, float, bool, float]:
    """(seconds of each frame, frames per second, whether the rate varies, duration) from real times in seconds."""
    count = len(times)
    indices = np.arange(count)
    span = float(times[-1])
    measured = (count - 1) / span if span > 0 else 0.0
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate, measured):
        if rate and np.all(np.abs(times * float(rate) - indices) < 0.5):
            return indices / float(rate), float(rate), False, count / float(rate)
    if span == 0:
        fps = float(_DEFAULT_FPS)
        return times, fps, False, count / fps
    duration = span + (last * float(stream.time_base) or span / (count - 1))
    return times, count / duration, True, duration
