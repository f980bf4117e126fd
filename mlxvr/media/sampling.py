"""Which frames of a clip the model sees, and at what size: numbers only, no pixels.

The rules are those of qwen-vl-utils 0.0.14 (`smart_nframes`, `calculate_video_frame_range`, `smart_resize`), with which
the checkpoints were trained. Departures:

- a clip (or range) of a single frame gives that frame instead of an error;
- a side never shrinks to zero: it keeps at least one token, as in transformers' `smart_resize`;
- a picture of a single row or column is refused, since nothing can be seen in it;
- a product that misses a whole number by rounding alone counts as that number (1.1 s * 30 is frame 33, not 34);
- asking for more frames than the clip has gives all that fill pairs, with a warning, instead of an error.
"""

import logging
import math

import numpy as np

from mlxvr.errors import ConfigError, MediaError
from mlxvr.media.spec import VisionSpec

__all__ = ["frame_count", "frame_indices", "frame_range", "frame_size", "image_size", "spread", "time_range"]

logger = logging.getLogger(__name__)

FRAME_FACTOR = 2  # frames are sampled in pairs
MAX_RATIO = 200  # the largest ratio of the longer to the shorter side


def frame_indices(  # 8 parameters: the whole rule in numbers, for clips without a file and a spec
    total_frames: int,
    source_fps: float,
    *,
    fps: float = 2.0,
    nframes: int | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Indices of the frames that the model sees.

    Args:
        total_frames: frames in the clip.
        source_fps: frames per second of the clip.
        fps: frames to sample per second.
        nframes: frames to sample in all (overrides fps); rounded to a multiple of 2, and limited, with a warning, to
            the frames that the clip has.
        min_frames, max_frames: bounds on the number that follows from fps.
        start, end: the range to sample from, in seconds.

    Returns:
        int64 (n,), ascending; n is even unless fewer than 2 frames exist.

    Raises:
        ConfigError: an option has a value that cannot be used.
        MediaError: the clip or the range has no frames.
    """
    first, last = frame_range(total_frames, source_fps, start=start, end=end)
    count = frame_count(
        last - first + 1, source_fps, fps=fps, nframes=nframes, min_frames=min_frames, max_frames=max_frames
    )
    return spread(first, last, count)


def frame_range(
    total_frames: int, source_fps: float, *, start: float | None = None, end: float | None = None
) -> tuple[int, int]:
    """Return the indices of the first and the last frame between two times in seconds, both included."""
    if total_frames < 1:
        raise MediaError("the clip has no frames: give a clip with at least one")
    if not 0 < source_fps < math.inf:
        raise MediaError(f"the clip's frame rate is {source_fps}: expected a positive number of frames per second")
    check_range(start, end)
    duration = total_frames / source_fps
    if start is not None and start >= duration:
        raise MediaError(f"start is {start:g} s, but the clip ends at {duration:.2f} s: give an earlier start")
    first = 0 if start is None else math.ceil(_steady(start * source_fps))
    last = total_frames - 1 if end is None else min(math.floor(_steady(end * source_fps)), total_frames - 1)
    if first > last:
        raise MediaError(
            f"no frame lies between {start or 0:g} s and {min(end or duration, duration):g} s of the clip "
            f"({source_fps:g} frames per second): give a wider range"
        )
    return first, last


def time_range(
    seconds: np.ndarray, duration: float, *, start: float | None = None, end: float | None = None
) -> tuple[int, int]:
    """Return the indices of the first and the last frame whose times (ascending) are in a range, both ends included.

    Raises `MediaError` if there is none.
    """
    check_range(start, end)
    tolerance = 1e-6  # stamps are ratios of whole numbers
    first = 0 if start is None else int(np.searchsorted(seconds, start - tolerance))
    last = len(seconds) - 1 if end is None else int(np.searchsorted(seconds, end + tolerance, side="right")) - 1
    if first > last:
        raise MediaError(
            f"no frame is shown between {start or 0:g} s and {duration if end is None else end:g} s "
            f"of the clip's {duration:.2f} s: give another range"
        )
    return first, last


def check_range(start: float | None, end: float | None) -> None:
    """Raise `ConfigError` unless 0 <= start < end and both are finite; None is not checked."""
    for name, value in (("start", start), ("end", end)):
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{name} is {value:g} s: give a time in seconds, 0 or later")
    if end is not None and end <= (start or 0.0):
        kind = "empty" if end == (start or 0.0) else "backwards"
        raise ConfigError(f"the range from {start or 0:g} s to {end:g} s is {kind}: end must come after start")


def frame_count(
    available: int,
    source_fps: float,
    *,
    fps: float = 2.0,
    nframes: int | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
) -> int:
    """Return how many of `available` frames to sample; takes and raises the same as `frame_indices`."""
    if nframes is not None:
        return _explicit_count(nframes, available)
    if not 0 < fps < math.inf:
        raise ConfigError(f"fps is {fps:g}: give a positive number of frames per second, such as 2.0")
    if min_frames < 1:
        raise ConfigError(f"min_frames is {min_frames}: give at least 1")
    if max_frames < FRAME_FACTOR:
        raise ConfigError(f"max_frames is {max_frames}: frames go in pairs, give at least {FRAME_FACTOR}")
    least = math.ceil(min_frames / FRAME_FACTOR) * FRAME_FACTOR
    most = max_frames // FRAME_FACTOR * FRAME_FACTOR
    wanted = min(max(_steady(available / source_fps * fps), least), most, available)
    return max(1, math.floor(wanted / FRAME_FACTOR) * FRAME_FACTOR)


def _explicit_count(nframes: int, available: int) -> int:
    count = round(nframes / FRAME_FACTOR) * FRAME_FACTOR
    if count < FRAME_FACTOR:
        raise ConfigError(f"{nframes} frames cannot be sampled: they go in pairs, give at least {FRAME_FACTOR}")
    if count > available:
        most = max(1, available // FRAME_FACTOR * FRAME_FACTOR)
        logger.warning("%d frames were asked for, and there are %d: %d are sampled", nframes, available, most)
        return most
    return count


def spread(first: int, last: int, count: int) -> np.ndarray:
    """Return `count` indices at even distances from first to last, both included: int64 (count,)."""
    return np.linspace(first, last, count).round().astype(np.int64)


def frame_size(height: int, width: int, n_frames: int, spec: VisionSpec) -> tuple[int, int]:
    """Return the (height, width) in pixels to resize an n-frame clip's frames to: multiples of `spec.factor`.

    Raises `MediaError` if no size fits the frame (a ratio over 200, a side of one pixel).
    """
    token = spec.factor**2
    least = spec.frame_min_tokens * token
    share = spec.video_tokens * token / n_frames * FRAME_FACTOR
    most = max(min(spec.frame_max_tokens * token, share), int(least * 1.05))
    return _fit(height, width, factor=spec.factor, least=least, most=most)


def image_size(height: int, width: int, spec: VisionSpec) -> tuple[int, int]:
    """Return the (height, width) in pixels to resize a still image to; takes and raises the same as `frame_size`.

    An image is also limited to `spec.video_tokens`, since it is the whole visual input.
    """
    token = spec.factor**2
    most = min(spec.image_max_tokens, spec.video_tokens)
    return _fit(
        height,
        width,
        factor=spec.factor,
        least=min(spec.image_min_tokens, most) * token,
        most=most * token,
    )


def _fit(height: int, width: int, *, factor: int, least: float, most: float) -> tuple[int, int]:
    """Round both sides to the factor, then scale the area into [least, most] pixels and keep the ratio."""
    short, long = sorted((height, width))
    if short < 2 and long <= MAX_RATIO:
        raise MediaError(f"the picture has {width}x{height} pixels: at least 2x2 are needed to see anything")
    if short < 1 or long / short > MAX_RATIO:
        raise MediaError(
            f"the picture has {width}x{height} pixels: its sides differ by more than {MAX_RATIO} times, crop it"
        )
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > most:
        scale = math.sqrt(height * width / most)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < least:
        scale = math.sqrt(least / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


def _steady(value: float) -> float:
    """Return the value, or the whole number that it misses by rounding alone (0.3 * 30 is 9, not 8.999..)."""
    nearest = round(value)
    return float(nearest) if abs(value - nearest) <= 1e-9 * max(1.0, abs(value)) else value
