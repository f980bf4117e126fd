"""Predict the size of a row's vision input from the headers of its file: grid and times, without patches.

Reading a clip's frames takes seconds, its headers some milliseconds. The grid is that of `load_row`, as both use the
same rules. At a variable frame rate, the times, and the range of frames, may be off by a frame.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from mlxvr.data.prefetch import load_row
from mlxvr.data.rows import Row
from mlxvr.errors import MlxvrError
from mlxvr.media.container import is_image
from mlxvr.media.patches import VisionInput, temporal_patch_seconds
from mlxvr.media.sampling import frame_count, frame_range, frame_size, image_size, spread
from mlxvr.media.spec import VisionSpec
from mlxvr.media.video.video_reader import probe

__all__ = ["outline_row"]


def outline_row(row: Row, spec: VisionSpec) -> VisionInput | None:
    """Return the input that `load_row` would return, without patches; None for text alone.

    A file whose headers do not tell enough, such as an animated image, is read whole.

    Args:
        row: a row of a dataset.
        spec: how frames are sampled and sized.

    Raises the same as `load_row`.
    """
    source = row.source()
    if source is None:
        return None
    spec = spec.with_overrides(fps=row.frames_fps)
    try:
        outlined = _frames(row, source, spec) if isinstance(source, list) else _file(row, source, spec)
    except (OSError, ValueError, MlxvrError):
        outlined = None
    return load_row(row, spec) if outlined is None else outlined


def _file(row: Row, path: Path, spec: VisionSpec) -> VisionInput | None:
    if is_image(path):
        size = _image_size(path)
        return None if size is None else _outline("image", 1, image_size(*size, spec), spec, (), 0.0)
    info = probe(path)
    first, last = frame_range(info.frames, info.fps, start=row.start, end=row.end)
    available = last - first + 1
    count = frame_count(available, info.fps, fps=spec.fps, min_frames=spec.min_frames, max_frames=spec.max_frames)
    return _video(first, last, count, info.fps, (info.height, info.width), spec)


def _frames(row: Row, paths: list[Path], spec: VisionSpec) -> VisionInput | None:
    size = _image_size(paths[0])
    if size is None:
        return None
    first, last = frame_range(len(paths), spec.fps, start=row.start, end=row.end)
    count = available = last - first + 1
    if available > spec.max_frames:
        count = frame_count(available, spec.fps, fps=spec.fps, max_frames=spec.max_frames)
    return _video(first, last, count, spec.fps, size, spec)


def _video(
    first: int, last: int, count: int, source_fps: float, size: tuple[int, int], spec: VisionSpec
) -> VisionInput:
    seconds = temporal_patch_seconds(spread(first, last, count) / source_fps, spec.temporal_patch_size)
    sampled_fps = count / (last - first + 1) * source_fps
    return _outline(
        "video", count, frame_size(*size, count, spec), spec, seconds, spec.temporal_patch_size / sampled_fps
    )


def _outline(
    kind: str,
    count: int,
    size: tuple[int, int],
    spec: VisionSpec,
    seconds: tuple[float, ...],
    second_per_grid: float,
) -> VisionInput:
    grid = (-(-count // spec.temporal_patch_size), size[0] // spec.patch_size, size[1] // spec.patch_size)
    return VisionInput(kind, np.empty((0, 0), dtype=np.uint8), grid, seconds, second_per_grid)  # type: ignore[arg-type]


def _image_size(path: Path) -> tuple[int, int] | None:
    """Return (height, width) of an image as it is shown; None if it is animated."""
    with Image.open(path) as image:
        if getattr(image, "is_animated", False):
            return None
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientation
        return (width, height) if turned else (height, width)
