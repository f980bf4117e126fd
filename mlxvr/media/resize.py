"""Antialiased bicubic resizing, as the training code computes it, without torch.

The checkpoints were trained on frames that `torch.nn.functional.interpolate(mode="bicubic", antialias=True)` resized in
float, then clamped and rounded (torchvision's `resize`). That is a separable filter: Keys' cubic with a = -0.5,
stretched by the scale when shrinking, its weights normalised at the borders. One pass filters the rows, one the
columns.

A weight matrix is banded (12 of 720 entries per row when 720p becomes 256 rows). Multiplying by the whole matrix would
waste nearly all the work, and picking the taps one by one is bound by memory. So both passes work in blocks: a few
output rows at a time, computed from the few input rows that they read. Faster scalers (swscale, Pillow, OpenCV) differ
from the training code by up to 98 levels of 255; this one by at most 1.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = ["resize"]

_BLOCK = 8  # output rows or columns per product; 4 to 16 take about the same time

# OpenBLAS splits a product of more multiplications than this over several threads, which spin while they wait and so
# take cores from the decoders (measured: 3.7 s instead of 2.0 s for 120 frames of 720p on two cores).
_ONE_THREAD = 65_536 * 4


@dataclass(frozen=True, eq=False)
class _WeightBlock:
    """The weights of a few neighbouring outputs, over the inputs that they read."""

    outputs: slice
    inputs: slice
    weights: np.ndarray  # float32 (outputs, inputs)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize one frame or a stack of frames.

    Args:
        pixels: uint8 (height, width, 3) or (n, height, width, 3).
        size: (height, width) to resize to.

    Returns:
        uint8 of the same rank; within 1 level of torch's antialiased bicubic, clamped and rounded.
    """
    if pixels.ndim == 4:
        resized = np.empty((len(pixels), *size, pixels.shape[-1]), dtype=np.uint8)
        for index, frame in enumerate(pixels):
            resized[index] = resize(frame, size)
        return resized
    height, width, channels = pixels.shape
    if (height, width) == tuple(size):
        return pixels.copy()
    values = _resize_rows(pixels.reshape(height, width * channels), size[0])
    values = _resize_columns(values, width, size[1], channels)
    np.rint(values, out=values)
    np.clip(values, 0, 255, out=values)
    return values.astype(np.uint8).reshape(*size, channels)


def _resize_rows(pixels: np.ndarray, height: int) -> np.ndarray:
    """(source height, row) of any dtype -> float32 (height, row)."""
    if len(pixels) == height:
        return pixels.astype(np.float32)
    values = np.empty((height, pixels.shape[1]), dtype=np.float32)
    for block in _blocks(len(pixels), height):
        source = pixels[block.inputs].astype(np.float32)
        for part in _parts(source.shape[1], block.weights.size):
            np.matmul(block.weights, source[:, part], out=values[block.outputs, part])
    return values


def _resize_columns(values: np.ndarray, width: int, target: int, channels: int) -> np.ndarray:
    """float32 (rows, width * channels) -> float32 (rows, target * channels)."""
    if width == target:
        return values
    resized = np.empty((len(values), target * channels), dtype=np.float32)
    for block in _interleaved_blocks(width, target, channels):
        for part in _parts(len(values), block.weights.size):
            np.matmul(values[part, block.inputs], block.weights, out=resized[part, block.outputs])
    return resized


def _parts(count: int, weights: int) -> list[slice]:
    """Split rows or columns into parts whose product with so many weights stays on one thread."""
    step = max(1, _ONE_THREAD // weights)
    return [slice(start, start + step) for start in range(0, count, step)]


@lru_cache(maxsize=32)
def _blocks(source: int, target: int) -> tuple[_WeightBlock, ...]:
    """Return the filter from `source` samples to `target` samples, in blocks of outputs."""
    scale = source / target
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centres = (np.arange(target) + 0.5) * scale
    firsts = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + support + 0.5).astype(np.int64), source)
    blocks = []
    for start in range(0, target, _BLOCK):
        stop = min(start + _BLOCK, target)
        first, end = int(firsts[start]), int(ends[stop - 1])
        taps = np.arange(first, end)
        weights = _cubic((taps + 0.5 - centres[start:stop, None]) / stretch)
        weights *= (taps >= firsts[start:stop, None]) & (taps < ends[start:stop, None])
        weights /= weights.sum(axis=1, keepdims=True)
        blocks.append(_WeightBlock(slice(start, stop), slice(first, end), weights.astype(np.float32)))
    return tuple(blocks)


@lru_cache(maxsize=32)
def _interleaved_blocks(source: int, target: int, channels: int) -> tuple[_WeightBlock, ...]:
    """Return the same filter for samples with interleaved channels, with weights (inputs, outputs).

    Each weight is spread over a channels x channels diagonal. That triples the arithmetic, but both factors of the
    product stay contiguous, which is faster than separating the channels.
    """
    diagonal = np.eye(channels, dtype=np.float32)
    return tuple(
        _WeightBlock(
            slice(block.outputs.start * channels, block.outputs.stop * channels),
            slice(block.inputs.start * channels, block.inputs.stop * channels),
            np.ascontiguousarray(np.kron(block.weights, diagonal).T),
        )
        for block in _blocks(source, target)
    )


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel, a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
