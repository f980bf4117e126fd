"""Frames for training, drawn on the GPU straight into patches: what decoded video looks like, without the video.

Encoding a million clips is out of reach, so training frames imitate what comes out of an H.264 file: edges are softened
by resizing, colour edges more than brightness edges (4:2:0 chroma), levels are off by a gain and an offset, there is
noise. How soft and how noisy is drawn anew for every clip, wide enough to cover crf 20 to 32 and every scale that the
processor's token budget leads to. `tests/test_shellgame.py` compares these patches with those of real files.
"""

import functools
from dataclasses import dataclass

import torch

from .drawing import depth
from .world import COLORS, MAX_SPRITES, OUTLINES

PATCH = 16
PAIR = 2


def patch_grid(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each patch, in blocks of 2x2 as Qwen-VL's processors order them: (patches,) each."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")

    def blocked(grid: torch.Tensor) -> torch.Tensor:
        return grid.reshape(height // 32, 2, width // 32, 2).permute(0, 2, 1, 3).reshape(-1)

    return blocked(rows), blocked(columns)


def pixel_centres(height: int, width: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y in pixels of every pixel of every patch: (patches, 16, 16) each."""
    rows, columns = patch_grid(height, width)
    inside = torch.arange(PATCH) + 0.5
    y = (rows[:, None, None] * PATCH + inside[None, :, None]).expand(-1, PATCH, PATCH)
    x = (columns[:, None, None] * PATCH + inside[None, None, :]).expand(-1, PATCH, PATCH)
    return x.float().contiguous().to(device), y.float().contiguous().to(device)


@dataclass
class Lighting:
    """How each clip of a batch is lit, softened and disturbed; all float32, colours in 0..255."""

    colors: torch.Tensor  # (batch, sprites, 3)
    background: torch.Tensor  # (batch, 3)
    slope: torch.Tensor  # (batch, 2) brightness across the picture, left to right and top to bottom
    softness: torch.Tensor  # (batch,) width of brightness edges in pixels
    chroma_softness: torch.Tensor  # (batch,) width of colour edges in pixels
    gain: torch.Tensor  # (batch,)
    offset: torch.Tensor  # (batch,)
    noise: torch.Tensor  # (batch,)


@functools.cache
def palette(device: torch.device) -> torch.Tensor:
    """The colours as (colors, 3) float32 in 0..255."""
    return torch.tensor(list(COLORS.values()), dtype=torch.float32, device=device)


def random_lighting(color_ids: torch.Tensor) -> Lighting:
    """Lighting for the clips whose sprites have these colours: (batch, sprites) indices into `COLORS`."""
    device, batch = color_ids.device, len(color_ids)
    softness = torch.rand(batch, device=device) * 2.0 + 0.4
    first, others = ((torch.rand(batch, n, 3, device=device) - 0.5) * 28 for n in (1, 1))
    shift = torch.cat((first, others.expand(-1, color_ids.shape[1] - 1, -1)), 1)  # the cups are shifted alike
    return Lighting(
        colors=palette(device)[color_ids] + shift,
        background=torch.rand(batch, 3, device=device) * 66,
        slope=(torch.rand(batch, 2, device=device) - 0.5) * 36,
        softness=softness,
        chroma_softness=softness + torch.rand(batch, device=device) * 3.0,
        gain=torch.rand(batch, device=device) * 0.2 + 0.9,
        offset=(torch.rand(batch, device=device) - 0.5) * 16,
        noise=torch.rand(batch, device=device) ** 2 * 9,
    )


def plain_lighting(color_ids: torch.Tensor, background: float = 30.0) -> Lighting:
    """Lighting without disturbance, for comparing with other painters."""
    device, batch = color_ids.device, len(color_ids)
    ones, zeros = torch.ones(batch, device=device), torch.zeros(batch, device=device)
    ground = torch.full((batch, 3), background, device=device)
    return Lighting(
        palette(device)[color_ids], ground, torch.zeros(batch, 2, device=device), ones, ones, ones, zeros, zeros
    )


def paint(
    x: torch.Tensor,
    y: torch.Tensor,
    places: torch.Tensor,
    radius: torch.Tensor,
    outlines: torch.Tensor,
    scale: torch.Tensor,
    colors: torch.Tensor,
    background: torch.Tensor,
    slope: torch.Tensor,
    softness: torch.Tensor,
    chroma_softness: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor,
    noise_level: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Draw a batch of clips into normalised patches.

    Args:
        x, y: `pixel_centres` of the frame size, (patches, 16, 16).
        places: (batch, frames, sprites, 2) in world units.
        radius, outlines: (batch, sprites).
        scale: (batch, 2) pixels of a world unit, across and down.
        noise: (batch, frames / 2, patches, 3, 2, 16, 16) normal deviates; decides the result's dtype.
        others: see `Lighting`.

    Returns:
        (batch, frames / 2, patches, 3, 2, 16, 16) in [-1, 1], the layout of `pixel_values_videos`.
    """
    batch, frames = places.shape[:2]
    pairs = places.reshape(batch, frames // PAIR, 1, PAIR, -1, 2, 1, 1)
    each = lambda values: values.reshape(batch, 1, 1, 1, 1, 1)  # noqa: E731
    u = x[None, None, :, None] / each(scale[:, 0])
    v = y[None, None, :, None] / each(scale[:, 1])
    unit = scale.mean(1)
    tilt = each(slope[:, 0]) * (u - 0.5) + each(slope[:, 1]) * (v - 0.5)
    luma = [each(background[:, c]) + tilt for c in range(3)]
    chroma = list(luma)
    for sprite in range(MAX_SPRITES):
        dx, dy = u - pairs[..., sprite, 0, :, :], v - pairs[..., sprite, 1, :, :]
        size, kind = each(radius[:, sprite]), each(outlines[:, sprite])
        inside = depth("circle", dx, dy, size, torch)
        for index, outline in enumerate(OUTLINES[1:-1], 1):  # the last one, a ball, is a circle too
            inside = torch.where(kind == index, depth(outline, dx, dy, size, torch), inside)
        inside = inside * each(unit)
        cover = (inside / each(softness) + 0.5).clamp(0, 1)
        soft_cover = (inside / each(chroma_softness) + 0.5).clamp(0, 1)
        luma = [p + cover * (each(colors[:, sprite, c]) - p) for c, p in enumerate(luma)]
        chroma = [p + soft_cover * (each(colors[:, sprite, c]) - p) for c, p in enumerate(chroma)]
    sharpen = sum(w * (a - b) for w, a, b in zip((0.299, 0.587, 0.114), luma, chroma))
    picture = torch.stack([p + sharpen for p in chroma], 3)
    picture = picture * gain.reshape(-1, *[1] * 6) + offset.reshape(-1, *[1] * 6)
    picture = picture + noise.float() * noise_level.reshape(-1, *[1] * 6)
    return (picture.clamp(0, 255) / 127.5 - 1).to(noise.dtype)
