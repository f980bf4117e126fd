"""Convert stamps to seconds: find a steady rate and the start on a player's clock, and mend wrong stamps.

Stamps are not always right. A faulty muxer may stamp one frame an hour away from its neighbours. A recorded broadcast
jumps where two pieces were joined, or where the 33-bit counter overflows, every 26.5 hours. The order in which a
decoder returns the frames is not affected, so a file with such stamps is decoded once to learn the order, and
`mend_times` removes the jumps.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["FAR_SECONDS", "MAX_REORDERING", "is_far_out", "mend_times", "start_offset", "steady_rate"]

FAR_SECONDS = 10.0  # FFmpeg's -dts_delta_threshold: a longer step in a transport stream is a jump, not a pause
MAX_REORDERING = 16  # frames that a decoder may hold back at most (H.264 and HEVC max_num_reorder_frames)

_JUMPY_FORMATS = frozenset({"hls", "mpeg", "mpegts"})  # formats whose clocks may jump (FFmpeg's AVFMT_TS_DISCONT)
_LATE_SECONDS = 0.1  # a picture that starts after the sound by less than this counts as starting with it
_MOST_WRONG = 0.01  # share of steps: if more are zero or backwards, the stamps are useless


def steady_rate(times: np.ndarray, rates: Sequence[float]) -> float | None:
    """Return the first of `rates` at which each frame is less than half a frame time off its place; None if none fits.

    Args:
        times: float64 (n,), seconds from the first frame.
        rates: frames per second to try.
    """
    places = np.arange(len(times))
    return next((rate for rate in rates if rate and np.all(np.abs(times * rate - places) < 0.5)), None)


def start_offset(container: Any, stream: Any, first_pts: int) -> float:
    """Return the time on a player's clock at which the first frame is shown, in seconds.

    A player starts its clock with the track that starts first. If the sound starts at most 0.1 s before the picture, as
    in many files, the offset is 0, as in the training code; it is 0 without sound, too.
    """
    if not container.streams.audio or container.start_time is None:
        return 0.0
    offset = first_pts * float(stream.time_base) - container.start_time / 1e6
    return offset if offset > _LATE_SECONDS else 0.0


def may_jump(container: Any) -> bool:
    """Return whether the clock of this file format may jump, so that a long step is not a pause."""
    return bool(_JUMPY_FORMATS & set(container.format.name.split(",")))


def is_far_out(packet_pts: np.ndarray, time_base: float) -> bool:
    """Return whether a stamp contradicts the order of decoding, so that only decoding reveals the order of frames.

    No healthy stream stores more than `MAX_REORDERING` frames ahead of a frame that is shown before them. Nearer to the
    end of the file, a stamp is suspicious if it is far from all others while frames stored later are shown earlier.

    Args:
        packet_pts: int64 (n,), stamps of the shown frames in the order of decoding.
        time_base: seconds per tick.
    """
    order = np.argsort(packet_pts, kind="stable")
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    if np.any(np.abs(places - np.arange(len(order))) > MAX_REORDERING):
        return True
    steps = np.diff(packet_pts[order]) * time_base
    for step in np.flatnonzero(steps > FAR_SECONDS):
        before, after = order[: step + 1], order[step + 1 :]
        few = min(len(before), len(after)) <= MAX_REORDERING
        if few and before.max() > after.min():  # they are stored in the opposite order
            return True
    return False


def mend_times(times: np.ndarray, *, may_jump: bool) -> np.ndarray | None:
    """Replace impossible steps between the times of frames; None if too many steps are impossible.

    These steps are replaced by the usual step: a step backwards, and the return from a single one; a step ahead that
    the next frame takes back (or any later frame, if it is more than 10 s); and any step of more than 10 s if the clock
    `may_jump`. The long steps that remain are pauses.

    Args:
        times: float64 (n,), seconds, in the order in which a decoder returned the frames.
        may_jump: whether the clock of this file format may jump.
    """
    if len(times) < 2:
        return times - times[:1]
    steps = np.diff(times)
    usual = float(np.median(steps[steps > 0])) if np.any(steps > 0) else 0.0
    wrong = steps <= 0
    if not usual or wrong.mean() > max(_MOST_WRONG, 1.5 / len(steps)):
        return None
    lowest_later = np.minimum.accumulate(times[::-1])[::-1]  # the lowest time of this frame and all after it
    taken_back = np.append(steps[1:] < 0, False)  # by the next frame
    taken_back[1:] |= (steps[:-1] < 0) & (times[2:] > times[:-2])  # the return from a frame that was far behind
    far = steps > FAR_SECONDS
    wrong |= taken_back | (far & (may_jump | (lowest_later[1:] < times[1:])))
    return np.concatenate([[0.0], np.cumsum(np.where(wrong, usual, steps))])
