"""Anything that can be looked at -> patches: the one entry to this layer for those above."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from mlxvr.callbacks import Progress, ShouldStop
from mlxvr.errors import ConfigError, MediaError
from mlxvr.media.container import check_file, is_image
from mlxvr.media.frames import Frames
from mlxvr.media.image import ImageSource, read_image
from mlxvr.media.patches import VisionInput, patchify, row_seconds
from mlxvr.media.resize import resize
from mlxvr.media.sampling import frame_count, frame_range, frame_size, image_size, spread
from mlxvr.media.spec import VisionSpec
from mlxvr.media.video import read_video

__all__ = ["VisionSource", "load_vision", "read_frames"]

VisionSource: TypeAlias = "ImageSource | Sequence[ImageSource]"


def load_vision(
    source: VisionSource,
    spec: VisionSpec,
    *,
    nframes: int | None = None,
    start: float | None = None,
    end: float | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> VisionInput:
    """Read, sample, resize and cut a video or an image.

    Args:
        source: the path of a video or an image; a Pillow image; a uint8 array (h, w, 3), an image; a list of
        images,
            paths or arrays, or a uint8 array (n, h, w, 3), the frames of a video at `spec.fps`.
        spec: what the checkpoint expects.
        nframes, start, end: for videos: frames to sample in all, and the range in seconds.
        progress: called with (stage, done, total).
        should_stop: asked now and then; True ends the reading.

    Raises:
        MediaError: the source cannot be read; the message says why.
        ConfigError: an option has a value that cannot be used.
        Cancelled: `should_stop` said so.
    """
    frames: Frames | None = None
    if isinstance(source, str | os.PathLike) and _is_video_file(Path(source)):
        frames = read_video(
            Path(source), spec, nframes=nframes, start=start, end=end, progress=progress, should_stop=should_stop
        )
    elif isinstance(source, list | tuple) or (isinstance(source, np.ndarray) and source.ndim == 4):
        frames = read_frames(source, spec, nframes=nframes, start=start, end=end)
    if frames is not None:
        patches, grid = patchify(frames.pixels, spec)
        seconds = row_seconds(frames.seconds, spec.temporal_patch_size)
        return VisionInput("video", patches, grid, seconds, spec.temporal_patch_size / frames.sampled_fps)

    if not isinstance(source, str | os.PathLike | Image.Image | np.ndarray):
        raise ConfigError(f"the source is a {type(source).__name__}: expected a path, an image, an array or a list")
    if nframes is not None or start is not None or end is not None:
        raise ConfigError("nframes, start and end are for videos, and the source is an image: leave them out")
    pixels = read_image(source)
    size = image_size(pixels.shape[0], pixels.shape[1], spec)
    patches, grid = patchify(resize(pixels, size)[None], spec)
    return VisionInput("image", patches, grid, (), 0.0)


def read_frames(
    source: Sequence[ImageSource] | np.ndarray,
    spec: VisionSpec,
    *,
    nframes: int | None = None,
    start: float | None = None,
    end: float | None = None,
) -> Frames:
    """Take pictures of one size as the frames of a video at `spec.fps`; raises as `load_vision`.

    All of them are used, unless there are more than `spec.max_frames` or options ask for fewer.
    """
    total = len(source)
    first, last = frame_range(total, spec.fps, start=start, end=end)
    count = available = last - first + 1
    if nframes is not None or available > spec.max_frames:
        count = frame_count(available, spec.fps, fps=spec.fps, nframes=nframes, max_frames=spec.max_frames)
    indices = spread(first, last, count)
    pixels, shape = np.empty((0, 0, 0, 3), dtype=np.uint8), (0, 0)
    for slot, index in enumerate(indices):
        picture = read_image(source[index])
        if slot == 0:
            shape = picture.shape[:2]
            pixels = np.empty((count, *frame_size(*shape, count, spec), 3), dtype=np.uint8)
        elif picture.shape[:2] != shape:
            raise MediaError(
                f"frame {index} has {picture.shape[1]}x{picture.shape[0]} pixels, but frame {first} has "
                f"{shape[1]}x{shape[0]}: the frames of a video must be of one size"
            )
        pixels[slot] = resize(picture, pixels.shape[1:3])
    return Frames(pixels, indices / spec.fps, count / available * spec.fps, indices, shape, total / spec.fps)


def _is_video_file(path: Path) -> bool:
    check_file(path)
    return not is_image(path) or _is_animation(path)


def _is_animation(path: Path) -> bool:
    """Whether a GIF moves; FFmpeg reads those as videos."""
    with path.open("rb") as file:
        if file.read(4) != b"GIF8":
            return False
    try:
        with Image.open(path) as image:
            return bool(getattr(image, "is_animated", False))
    except OSError:  # damaged: reading it as an image says so
        return False
