"""Frames to the rows that a vision tower reads.

Order of rows and columns as in transformers' Qwen2-VL and Qwen3-VL processors: rows go over time, then over
tokens (row by row), then over the merge x merge patches of a token; a row holds channel, frame, y, x. Patches
stay uint8 until the model needs them, a quarter of the memory; `normalise` gives what transformers calls
`pixel_values`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlxvr.errors import ConfigError
from mlxvr.media.spec import VisionSpec

__all__ = ["VisionInput", "normalise", "patchify", "row_seconds"]


@dataclass(frozen=True, eq=False)
class VisionInput:
    """One video or image, ready for the vision tower."""

    kind: Literal["video", "image"]
    patches: np.ndarray  # uint8 (t * h * w, 3 * temporal * patch * patch)
    grid: tuple[int, int, int]  # (t, h, w) in patches
    seconds: tuple[float, ...]  # source time of each temporal patch; () for an image
    second_per_grid: float  # seconds between temporal patches at the sampling rate; 0 for an image

    def token_count(self, merge_size: int) -> int:
        """Tokens that this input takes in a prompt."""
        t, h, w = self.grid
        return t * h * w // merge_size**2


def patchify(pixels: np.ndarray, spec: VisionSpec) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut frames into patches.

    Args:
        pixels: uint8 (n, height, width, 3); sides are multiples of `spec.factor`. An image is n = 1. A number
        of
            frames that does not fill the last temporal patch is filled up by repeating the last frame.
        spec: the patch geometry.

    Returns:
        patches: uint8 (t * h * w, 3 * temporal * patch * patch), and the grid (t, h, w) in patches.

    Raises `ConfigError` for another shape, dtype or size.
    """
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or not len(pixels):
        raise ConfigError(f"pixels are {pixels.dtype} {pixels.shape}: expected uint8 (n, height, width, 3)")
    count, height, width, _ = pixels.shape
    if height % spec.factor or width % spec.factor:
        raise ConfigError(f"frames have {width}x{height} pixels: both sides must be multiples of {spec.factor}")
    temporal, merge, patch = spec.temporal_patch_size, spec.merge_size, spec.patch_size
    grid = (-(-count // temporal), height // patch, width // patch)
    rows = np.empty(
        (grid[0], grid[1] // merge, grid[2] // merge, merge, merge, 3, temporal, patch, patch), dtype=np.uint8
    )
    for index in range(grid[0] * temporal):  # frame by frame: the strided copy then stays within the cache
        frame = pixels[min(index, count - 1)].reshape(grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, 3)
        # (block y, merge y, y, block x, merge x, x, rgb) -> (block y, block x, merge y, merge x, rgb, y, x)
        rows[index // temporal, ..., index % temporal, :, :] = frame.transpose(0, 3, 1, 4, 6, 2, 5)
    return rows.reshape(grid[0] * grid[1] * grid[2], -1), grid


def normalise(patches: np.ndarray, spec: VisionSpec) -> np.ndarray:
    """Scale to [0, 1], subtract the mean and divide by the standard deviation of each channel.

    uint8 (rows, 3 * temporal * patch * patch) -> float32 of the same shape, transformers' `pixel_values`.
    """
    std = np.asarray(spec.std, dtype=np.float64)
    scale = (1.0 / (255.0 * std)).astype(np.float32)[:, None]
    offset = (-np.asarray(spec.mean, dtype=np.float64) / std).astype(np.float32)[:, None]
    values = patches.astype(np.float32).reshape(len(patches), 3, -1)
    values *= scale
    values += offset
    return values.reshape(patches.shape)


def row_seconds(seconds: np.ndarray, temporal_patch_size: int) -> tuple[float, ...]:
    """Mean source time of each temporal patch's frames; a last frame that fills up a patch counts again."""
    short = -len(seconds) % temporal_patch_size
    filled = np.concatenate([seconds, np.repeat(seconds[-1:], short)])
    return tuple(filled.reshape(-1, temporal_patch_size).mean(axis=1).tolist())
