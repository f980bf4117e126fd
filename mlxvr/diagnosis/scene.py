"""A drawn clip and a drawn picture, the same to the last bit on every machine, since nothing is decoded."""

import numpy as np

__all__ = ["draw_clip", "draw_image"]

_BACKGROUND, _BLUE, _ORANGE = (236, 232, 224), (40, 90, 220), (240, 140, 30)


def draw_clip(height: int, width: int, frames: int = 8) -> np.ndarray:
    """A blue disc that moves from left to right: uint8 (frames, height, width, 3)."""
    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    for index in range(frames):
        x = width // 5 + index * (width * 3 // 5) // max(1, frames - 1)
        clip[index] = _with_disc(height, width, height // 2, x, height // 7, _BLUE)
    return clip


def draw_image(height: int, width: int) -> np.ndarray:
    """An orange disc: uint8 (height, width, 3)."""
    return _with_disc(height, width, height // 3, width // 2, height // 6, _ORANGE)


def _with_disc(height: int, width: int, y: int, x: int, radius: int, color: tuple[int, int, int]) -> np.ndarray:
    rows, columns = np.indices((height, width))
    inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return np.where(inside[..., None], np.array(color, np.uint8), np.array(_BACKGROUND, np.uint8))
