"""Read pictures as the frames of a clip, from a list, an array or a folder.

The caller gives their times in one of two ways: as a rate, `spec.fps` (then all frames are used, as if they had been
sampled from a video at that rate), or as a time for each frame, `timestamps`.

The models use times differently. Qwen3-VL reads the time of every pair of frames as text, so it gets uneven times as
they are. Qwen2.5-VL has one number for a whole clip, the seconds between pairs: it gets the mean distance, and locates
events of an unevenly sampled clip as if its frames were at even distances.
"""

import math
import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from mlxvr.errors import ConfigError, MediaError
from mlxvr.media.frame_options import ALL_FRAMES, FrameSelection
from mlxvr.media.image import ImageSource, read_image
from mlxvr.media.patches import Frames
from mlxvr.media.resize import resize
from mlxvr.media.sampling import frame_count, frame_range, frame_size, spread, time_range
from mlxvr.media.spec import VisionSpec
from mlxvr.storage.paths import list_frames, list_visible

__all__ = ["folder_frames", "read_frames"]


def read_frames(
    source: Sequence[ImageSource] | np.ndarray,
    spec: VisionSpec,
    selection: FrameSelection = ALL_FRAMES,
) -> Frames:
    """Read pictures of one size as the frames of a video.

    All frames in the range are used, unless there are more than `spec.max_frames`, or `selection` asks for fewer. Then
    that many are used, evenly spread from the first to the last.

    Args:
        source: images, paths or arrays, or a uint8 array (n, h, w, 3).
        spec: how frames are sized; its `fps` is the rate at which they were taken.
        selection: how many frames to use in all; the range in seconds outside of which none is used; the seconds of
            each frame, ascending, instead of a rate.

    Raises:
        MediaError: a picture cannot be read or has another size than the first, or the range holds no frame.
        ConfigError: an option has a value that cannot be used.
    """
    total, start, end = len(source), selection.start, selection.end
    if not total:
        raise MediaError("there are no frames: give at least one")
    if selection.timestamps is None:
        first, last = frame_range(total, spec.fps, start=start, end=end)
        seconds, rate = np.arange(total) / spec.fps, spec.fps
        duration = total / spec.fps
    else:
        seconds = _checked_times(selection.timestamps, total)
        duration = float(seconds[-1]) + _mean_distance(seconds, 1 / spec.fps)
        first, last = time_range(seconds, duration, start=start, end=end)
        rate = 1 / _mean_distance(seconds[first : last + 1], 1 / spec.fps)
    count = available = last - first + 1
    if selection.frames is not None or available > spec.max_frames:
        count = frame_count(available, rate, fps=rate, nframes=selection.frames, max_frames=spec.max_frames)
    indices = spread(first, last, count)
    pixels, shape = np.empty((0, 0, 0, 3), dtype=np.uint8), (0, 0)
    for slot, index in enumerate(indices):
        picture = read_image(source[index])
        if slot == 0:
            shape = picture.shape[:2]
            pixels = np.empty((count, *frame_size(*shape, count, spec), 3), dtype=np.uint8)
        elif picture.shape[:2] != shape:
            raise MediaError(
                f"{_name(source, index)} has {picture.shape[1]}x{picture.shape[0]} pixels, but {_name(source, first)} "
                f"has {shape[1]}x{shape[0]}: the frames of a video must be of one size"
            )
        pixels[slot] = resize(picture, pixels.shape[1:3])
    return Frames(pixels, seconds[indices], count / available * rate, indices, shape, duration)


def folder_frames(folder: Path) -> list[Path]:
    """Return the image files in a folder, in natural order (1, 2, .., 10), without hidden files.

    Raises `MediaError` if there is none.
    """
    if frames := list_frames(folder):
        return frames
    names = [path.name for path in list_visible(folder)]
    content = f"but {names[0]!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" if names else "and is empty"
    raise MediaError(f"{folder} is a folder without jpg, png or other images, {content}: give a file, or frames in it")


def _checked_times(timestamps: Sequence[float], total: int) -> np.ndarray:
    """Return the times as float64 (total,); raises `ConfigError` unless they are ascending times of all frames."""
    values: list[Any] = list(timestamps)
    if len(values) != total:
        raise ConfigError(f"there are {len(values)} timestamps for {total} frames: give each frame its time in seconds")
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise ConfigError(f"timestamp {place} is {value!r}: give a time in seconds, 0 or later")
        if place and not value > values[place - 1]:
            raise ConfigError(
                f"timestamp {place} is {float(value):g} s, after {float(values[place - 1]):g} s: give times that "
                "increase"
            )
    return np.array(values, dtype=np.float64)


def _mean_distance(seconds: np.ndarray, single: float) -> float:
    """Return the mean seconds between two frames; `single` if there is only one frame."""
    return float(seconds[-1] - seconds[0]) / (len(seconds) - 1) if len(seconds) > 1 else single


def _name(source: Sequence[ImageSource] | np.ndarray, index: int) -> str:
    """Return the name of a frame for messages."""
    frame = source[index]
    return str(frame) if isinstance(frame, str | os.PathLike) else f"frame {index}"
