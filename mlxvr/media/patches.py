"""Cut frames into the patches that a vision tower reads.

The order is that of transformers' Qwen2-VL and Qwen3-VL processors. Patches are ordered by time, then by token (row by
row), then over the merge x merge patches of a token; the values of a patch are ordered by channel, frame, y, x. Patches
stay uint8 until the model needs them, which takes a quarter of the memory; `normalise` returns transformers'
`pixel_values`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlxvr.errors import ConfigError
from mlxvr.media.spec import VisionSpec

__all__ = ["Frames", "VisionInput", "normalise", "patchify", "temporal_patch_seconds"]


@dataclass(frozen=True, eq=False)
class Frames:
    """The sampled frames of a clip at their target size, before they are cut into patches.

    `seconds` are `index / fps` if the stream has a constant rate. If not, they are the sampled moments (sampling by
    time) or the real times of the frames (by index). They count from the start of a player's clock: the first frame, or
    a sound track that starts earlier.
    """

    pixels: np.ndarray  # uint8 (n, height, width, 3), RGB
    seconds: np.ndarray  # float64 (n,): source time of each frame
    sampled_fps: float  # frames per second of source time
    # int64 (n,): index of each frame in presentation order. If only a range of a large file was read and its rate
    # varies, the index counts from the first frame that was read.
    indices: np.ndarray
    source_size: tuple[int, int]  # (height, width) as displayed, before resizing
    duration: float  # seconds of the whole clip, on the same clock

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, eq=False)
class VisionInput:
    """One video or image, ready for the vision tower."""

    kind: Literal["video", "image"]
    patches: np.ndarray  # uint8 (t * h * w, 3 * temporal * patch * patch)
    grid: tuple[int, int, int]  # (t, h, w) in patches
    seconds: tuple[float, ...]  # source time of each temporal patch; () for an image
    second_per_grid: float  # seconds between temporal patches at the sampling rate; 0 for an image

    def token_count(self, merge_size: int) -> int:
        """Return how many tokens this input takes in a prompt."""
        t, h, w = self.grid
        return t * h * w // merge_size**2


def patchify(pixels: np.ndarray, spec: VisionSpec) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut frames into patches.

    Args:
        pixels: uint8 (n, height, width, 3), with sides that are multiples of `spec.factor`. An image has n = 1. The
            last frame is repeated to fill the last temporal patch.
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
    patches = np.empty(
        (grid[0], grid[1] // merge, grid[2] // merge, merge, merge, 3, temporal, patch, patch), dtype=np.uint8
    )
    for index in range(grid[0] * temporal):  # frame by frame, so that the strided copy stays within the CPU's cache
        frame = pixels[min(index, count - 1)].reshape(grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, 3)
        # (block y, merge y, y, block x, merge x, x, rgb) -> (block y, block x, merge y, merge x, rgb, y, x)
        patches[index // temporal, ..., index % temporal, :, :] = frame.transpose(0, 3, 1, 4, 6, 2, 5)
    return patches.reshape(grid[0] * grid[1] * grid[2], -1), grid


def normalise(patches: np.ndarray, spec: VisionSpec) -> np.ndarray:
    """Scale to [0, 1], subtract the mean and divide by the standard deviation of each channel.

    uint8 (n, 3 * temporal * patch * patch) -> float32 of the same shape, transformers' `pixel_values`.
    """
    std = np.asarray(spec.std, dtype=np.float64)
    scale = (1.0 / (255.0 * std)).astype(np.float32)[:, None]
    offset = (-np.asarray(spec.mean, dtype=np.float64) / std).astype(np.float32)[:, None]
    values = patches.astype(np.float32).reshape(len(patches), 3, -1)
    values *= scale
    values += offset
    return values.reshape(patches.shape)


def temporal_patch_seconds(seconds: np.ndarray, temporal_patch_size: int) -> tuple[float, ...]:
    """Return the mean source time of each temporal patch's frames; a repeated last frame counts again."""
    repeats = -len(seconds) % temporal_patch_size
    filled = np.concatenate([seconds, np.repeat(seconds[-1:], repeats)])
    return tuple(filled.reshape(-1, temporal_patch_size).mean(axis=1).tolist())
