"""Read any video, image or frames as patches: the entry to this room for the rooms above."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from mlxvr.errors import ConfigError
from mlxvr.media.animation.animation_reader import is_animation, read_animation
from mlxvr.media.container import check_file, is_image
from mlxvr.media.frame_options import ALL_FRAMES, FrameSelection
from mlxvr.media.image import ImageSource, read_image
from mlxvr.media.patches import Frames, VisionInput, patchify, temporal_patch_seconds
from mlxvr.media.resize import resize
from mlxvr.media.sampling import image_size
from mlxvr.media.sequence import folder_frames, read_frames
from mlxvr.media.spec import VisionSpec
from mlxvr.media.video.video_reader import read_video
from mlxvr.runtime.hooks import NO_HOOKS, Hooks
from mlxvr.storage.paths import local_path

__all__ = ["VisionSource", "load_vision"]

VisionSource: TypeAlias = "ImageSource | Sequence[ImageSource]"

logger = logging.getLogger(__name__)


def load_vision(
    source: VisionSource,
    spec: VisionSpec,
    selection: FrameSelection = ALL_FRAMES,
    hooks: Hooks = NO_HOOKS,
) -> VisionInput:
    """Read, sample, resize and cut a video or an image.

    Args:
        source: a video: the path (or `file:` URL) of a video or of an animated GIF, PNG, WebP or AVIF file. An image: a
            path, a Pillow image, or a uint8 array (h, w, 3). Frames, taken at `spec.fps` or at the timestamps of
            `selection`: the path of a folder, a list of images, paths or arrays, or a uint8 array (n, h, w, 3).
        spec: what the checkpoint expects.
        selection: how many frames to sample in all, and the range in seconds: not for images; the seconds of each
            frame: for frames only.
        hooks: progress is called with (stage, done, total); should_stop now and then, and True ends the reading.

    Raises:
        MediaError: the source cannot be read; the message says why.
        ConfigError: an option has a value that cannot be used.
        Cancelled: `hooks.should_stop` returned True.
    """
    if isinstance(source, str | os.PathLike):
        source = local_path(source)
        if source.is_dir():
            source = folder_frames(source)
        else:
            check_file(source)
    frames: Frames | None = None
    if isinstance(source, list | tuple) or (isinstance(source, np.ndarray) and source.ndim == 4):
        frames = read_frames(source, spec, selection)
    elif selection.timestamps is not None:
        raise ConfigError("timestamps are for frames, and the source is a video or an image: leave them out")
    elif isinstance(source, Path) and (not is_image(source) or is_animation(source)):
        read = read_animation if is_image(source) else read_video
        frames = read(source, spec, selection, hooks)
    if frames is not None:
        patches, grid = patchify(frames.pixels, spec)
        seconds = temporal_patch_seconds(frames.seconds, spec.temporal_patch_size)
        vision = VisionInput("video", patches, grid, seconds, spec.temporal_patch_size / frames.sampled_fps)
        _warn_of_excess(vision, len(frames), spec)
        return vision

    if not isinstance(source, Path | Image.Image | np.ndarray):
        raise ConfigError(f"the source is a {type(source).__name__}: expected a path, an image, an array or a list")
    if (selection.frames, selection.start, selection.end) != (None, None, None):
        raise ConfigError(
            "frames, start and end (--start, --end) are for videos, and the source is an image: leave them out"
        )
    pixels = read_image(source)
    size = image_size(pixels.shape[0], pixels.shape[1], spec)
    patches, grid = patchify(resize(pixels, size)[None], spec)
    return VisionInput("image", patches, grid, (), 0.0)


def _warn_of_excess(vision: VisionInput, count: int, spec: VisionSpec) -> None:
    """Warn if a clip exceeds `spec.video_tokens`, since no frame gets fewer than its minimum, as in training."""
    tokens = vision.token_count(spec.merge_size)
    if tokens > spec.video_tokens:
        logger.warning(
            "the clip takes %s tokens, more than the %s of --video-tokens (video_tokens): each of its %d frames needs "
            "at least %d; sample fewer frames with --max-frames (max_frames) or --fps (fps)",
            f"{tokens:,}",
            f"{spec.video_tokens:,}",
            count,
            spec.frame_min_tokens,
        )
