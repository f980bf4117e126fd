"""What the world looks like: outlines as distances, and the numpy painter that draws the frames of a video.

One formula per outline serves both painters, this one and the GPU's (`rendering.py`): `depth` says how far inside an
outline's edge a point lies, and the share of a pixel that is covered follows from it.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from .world import COLORS, HIDDEN, Clock, Scene


def depth(outline: str, dx: Any, dy: Any, radius: Any, xp: Any) -> Any:
    """Distance from a point to the outline's edge, positive inside. `xp` is numpy or torch; y points down."""
    if outline in ("circle", "ball"):
        return radius - xp.sqrt(dx * dx + dy * dy)
    if outline == "square":
        return 0.9 * radius - xp.maximum(xp.abs(dx), xp.abs(dy))
    if outline == "triangle":
        return xp.minimum(radius - xp.abs(dy), 0.9 * (0.55 * (dy + radius) - xp.abs(dx)))
    if outline == "diamond":
        return 0.707 * (1.15 * radius - xp.abs(dx) - xp.abs(dy))
    if outline == "cup":
        return xp.minimum(radius - xp.abs(dy), 0.825 * radius + 0.175 * dy - xp.abs(dx))
    raise ValueError(f"unknown outline {outline!r}")


@dataclass(frozen=True)
class Look:
    """How one clip is lit: a dark background with a slope of brightness, and a shift of each sprite's colour."""

    background: tuple[float, float, float]
    slope: tuple[float, float]
    shifts: tuple[tuple[float, float, float], ...]


def make_look(rng: random.Random, sprites: int) -> Look:
    """A random look. Sprites of one colour (the cups) are shifted alike."""
    shift = [tuple(rng.uniform(-12, 12) for _ in range(3)) for _ in range(2)]
    return Look(
        background=tuple(rng.uniform(5, 60) for _ in range(3)),
        slope=(rng.uniform(-15, 15), rng.uniform(-15, 15)),
        shifts=tuple(shift[min(i, 1)] for i in range(sprites)),
    )


class Painter:
    """Draws the frames of one clip at (height, width), one world unit being the shorter side."""

    def __init__(self, scene: Scene, look: Look, height: int, width: int) -> None:
        self.scene, self.scale = scene, min(height, width)
        self.rows = (np.arange(height) + 0.5) / self.scale
        self.columns = (np.arange(width) + 0.5) / self.scale
        tilt = look.slope[0] * (self.columns[None, :] - 0.5) + look.slope[1] * (self.rows[:, None] - 0.5)
        self.empty = (np.asarray(look.background) + tilt[..., None]).astype(np.float32)
        self.colors = [np.add(COLORS[s.color], d) for s, d in zip(scene.sprites, look.shifts)]

    def frame(self, seconds: float) -> np.ndarray:
        """The picture at that time: (height, width, 3) uint8."""
        canvas = self.empty.copy()
        places = self.scene.places(np.array([seconds]))[:, 0]
        for sprite, color, (x, y) in zip(self.scene.sprites, self.colors, places):
            if x > HIDDEN:
                self._draw(canvas, sprite.outline, sprite.radius, color, x, y)
        return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)

    def _draw(self, canvas: np.ndarray, outline: str, radius: float, color: np.ndarray, x: float, y: float) -> None:
        reach = 1.2 * radius + 2 / self.scale
        rows = slice(*np.searchsorted(self.rows, (y - reach, y + reach)))
        columns = slice(*np.searchsorted(self.columns, (x - reach, x + reach)))
        dx, dy = self.columns[None, columns] - x, self.rows[rows, None] - y
        cover = np.clip(depth(outline, dx, dy, radius, np) * self.scale + 0.5, 0, 1)[..., None]
        canvas[rows, columns] += cover * (color - canvas[rows, columns])


def frame_times(clock: Clock) -> np.ndarray:
    """Seconds of every frame of the container: (frames,)."""
    return np.arange(clock.frames) / float(clock.rate)
