"""Select the frames of a timeline that a model sees: by index, as in training, or by the time at which they are shown.

At a constant rate both select the same frames, by the training code's rule (`sampling`). At a variable rate they
differ: in a screen recording that moves for two seconds and then shows a still for a minute, all indices but one lie in
the first two seconds. Both families get times (Qwen3-VL in its prompt, Qwen2.5-VL by the step of its temporal
positions, which is the same between any two temporal patches), so frames at even distances in time match the times that
the model gets. Sampling by time is therefore the default; `VisionSpec.sample_by` chooses.

Sampling by time takes as many frames as sampling by index. It takes moments at even distances from the first to the
last of the range, and at each moment the frame that a player shows then, so a still is repeated for as long as it is
shown. The times are those moments.

If a range is given, only the frames in it count: a range with a constant rate is sampled like a clip of constant rate,
whatever the rest of the file does. That also makes it possible to read only the range (`window`).
"""

import logging
from dataclasses import dataclass

import numpy as np

from mlxvr.errors import MediaError
from mlxvr.media.sampling import frame_count, frame_range, spread, time_range
from mlxvr.media.spec import VisionSpec
from mlxvr.media.video.timeline import Timeline
from mlxvr.media.video.timestamps import FAR_SECONDS

__all__ = ["Selection", "select"]

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-6  # seconds; stamps are ratios of whole numbers
_ANY_LENGTH = 1 << 40  # frames
_USUAL_STEP = 0.04  # seconds between frames if the headers state no rate
_LONG_SHARE = 0.9  # a single frame that is shown for a larger share of the clip causes a warning


@dataclass(frozen=True, eq=False)
class Selection:
    """The frames to read, and their times."""

    frames: np.ndarray  # int64 (n,): indices into the timeline, ascending; a frame that is shown for long is repeated
    indices: np.ndarray  # int64 (n,): indices of the frames in the clip
    seconds: np.ndarray  # float64 (n,): times on a player's clock
    sampled_fps: float  # the resulting rate, in frames per second

    def __len__(self) -> int:
        return len(self.frames)


def select(
    timeline: Timeline,
    spec: VisionSpec,
    *,
    nframes: int | None = None,
    start: float | None = None,
    end: float | None = None,
    total: int | None = None,
) -> Selection:
    """Select the frames that a model sees of a clip, or of a range of it.

    Args:
        timeline: the timeline of the clip, or of a part of it that holds the range.
        spec: rate and bounds, and whether to sample by index or by time.
        nframes: frames to sample in all, instead of `spec.fps` frames per second.
        start, end: the range, in seconds on a player's clock.
        total: frames that the clip should have, if the timeline has fewer; indices may then exceed the timeline.

    Raises:
        MediaError: no frame is shown in the range.
        ConfigError: an option has a value that cannot be used.
    """
    start, end = _from_first_frame(timeline, start, end)
    count = len(timeline) if total is None else total
    if not timeline.is_part and (not timeline.is_variable or count > len(timeline)):
        first, last = frame_range(count, timeline.fps, start=start, end=end)
        return _by_index(timeline, spec, first, last, timeline.fps, nframes)
    if start is not None or end is not None:
        steady = _steady_range(timeline, start, end)
        if steady is not None:
            first, last, rate = steady
            places = np.rint(timeline.seconds * rate).astype(np.int64)
            by_index = _by_index(timeline, spec, first, last, rate, nframes)
            frames = by_index.frames
            indices = places[frames] if timeline.is_part else by_index.indices
            return Selection(frames, indices, places[frames] / rate + timeline.offset, by_index.sampled_fps)
    if spec.sample_by == "time":
        return _by_time(timeline, spec, start, end, nframes)
    first, last = time_range(timeline.seconds, timeline.duration, start=start, end=end)
    fps = timeline.fps
    if last > first and (start is not None or end is not None):
        fps = (last - first) / float(timeline.seconds[last] - timeline.seconds[first])
    return _by_index(timeline, spec, first, last, fps, nframes)


def _from_first_frame(timeline: Timeline, start: float | None, end: float | None) -> tuple[float | None, float | None]:
    """Convert a range on a player's clock to seconds from the first frame; raises `MediaError` if it has no picture."""
    if not timeline.offset:
        return start, end
    if end is not None and end < timeline.offset:
        raise MediaError(f"the picture starts at {timeline.offset:.2f} s, and end is {end:g} s: give a later end")
    ends = timeline.offset + timeline.duration
    if start is not None and start >= ends:
        raise MediaError(f"start is {start:g} s, but the clip ends at {ends:.2f} s: give an earlier start")
    shifted = None if start is None else max(0.0, start - timeline.offset)
    return shifted, None if end is None else end - timeline.offset


def _by_index(
    timeline: Timeline, spec: VisionSpec, first: int, last: int, fps: float, nframes: int | None
) -> Selection:
    """Select frames at even distances in index between two, both included."""
    available = last - first + 1
    count = _count(available, fps, spec, nframes)
    frames = spread(first, last, count)
    known = frames[frames < len(timeline)]
    seconds = np.concatenate([timeline.seconds[known], frames[len(known) :] / fps]) + timeline.offset
    return Selection(frames, frames, seconds, count / available * fps)


def _by_time(
    timeline: Timeline, spec: VisionSpec, start: float | None, end: float | None, nframes: int | None
) -> Selection:
    """Select the frames that are shown at even distances in time."""
    seconds = timeline.seconds
    usual = 1 / timeline.rates[0] if timeline.rates else _USUAL_STEP
    latest = max(float(seconds[-1]), timeline.duration - usual)  # the last frame may be shown for long
    begins, ends = start or 0.0, latest if end is None else min(end, latest)
    if begins > ends:
        raise MediaError(
            f"start is {begins + timeline.offset:g} s, but the clip ends at "
            f"{timeline.offset + timeline.duration:.2f} s: give an earlier start"
        )
    first, last = (int(np.searchsorted(seconds, moment + _TOLERANCE, side="right")) - 1 for moment in (begins, ends))
    steps = np.diff(seconds[first : last + 1])
    available, span = last - first + 1, ends - begins + (float(np.median(steps)) if len(steps) else usual)
    count = _count(available, available / span, spec, nframes)
    moments = np.linspace(begins, ends, count)
    frames = np.searchsorted(seconds, moments + _TOLERANCE, side="right") - 1
    longest = float(steps.max()) if len(steps) else 0.0
    if start is None and end is None and longest > max(FAR_SECONDS, _LONG_SHARE * timeline.duration):
        logger.warning(
            "one frame is shown for %.0f of the video's %.0f seconds: if the file is faulty, sample by index "
            "(--sample-by index, sample_by='index')",
            longest,
            timeline.duration,
        )
    return Selection(frames, frames, moments + timeline.offset, count / span)


def _count(available: int, fps: float, spec: VisionSpec, nframes: int | None) -> int:
    return frame_count(
        available, fps, fps=spec.fps, nframes=nframes, min_frames=spec.min_frames, max_frames=spec.max_frames
    )


def _steady_range(timeline: Timeline, start: float | None, end: float | None) -> tuple[int, int, float] | None:
    """Return (first frame, last frame, frames per second) of a range whose rate is constant; None if it is not.

    A frame belongs to the range if its place does: place k is shown at k / rate. Frames next to the range are checked
    too, since their places may lie within it.
    """
    seconds = timeline.seconds
    low = 0 if start is None else max(0, int(np.searchsorted(seconds, start)) - 2)
    high = len(seconds) if end is None else min(len(seconds), int(np.searchsorted(seconds, end)) + 2)
    for rate in timeline.rates:
        places = np.rint(seconds[low:high] * rate)
        if len(places) < 2 or np.any(np.diff(places) != 1):
            continue
        earliest, latest = frame_range(_ANY_LENGTH, rate, start=start, end=end)
        inside = np.flatnonzero((places >= earliest) & (places <= latest))
        if len(inside):
            return low + int(inside[0]), low + int(inside[-1]), rate
    return None
