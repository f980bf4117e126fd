"""Three-dimensional rotary positions: time, height and width of every token of a prompt.

Text counts up by one on all three axes. A visual token has, counted from where its block begins, the position

    time    floor(row * time_step)     height    its row of tokens     width    its column

in float32, as transformers computes it. Qwen2.5-VL's `time_step` is `second_per_grid * tokens_per_second` (arXiv
2502.13923, section 2.1.3); in Qwen3-VL each temporal patch is a block of its own and time runs with the text. Generated
tokens count up from the largest position of all axes.

Releases of transformers differ in the time step and in where the text after a block begins: after the block's largest
position on any axis, or `max(height, width)` tokens after the block's beginning, whatever its length in time. The two
agree on images and on Qwen3-VL. `mlxvr.model.families.qwen2_5_vl` says which release means what.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["VisionBlock", "rope_positions"]


@dataclass(frozen=True)
class VisionBlock:
    """A run of visual tokens between one vision-start and one vision-end token.

    Attributes:
        label: text before the vision-start token.
        grid: (t, h, w) in tokens: t temporal patches of h x w tokens.
        time_step: temporal positions from one temporal patch to the next, before rounding down.
    """

    label: str
    grid: tuple[int, int, int]
    time_step: float

    @property
    def tokens(self) -> int:
        """How many visual tokens the block holds."""
        t, h, w = self.grid
        return t * h * w


def rope_positions(
    media_mask: np.ndarray, blocks: Sequence[VisionBlock], *, time_is_extent: bool = True
) -> tuple[np.ndarray, int]:
    """Positions of a prompt.

    Args:
        media_mask: bool (n,), True for visual tokens.
        blocks: the prompt's vision blocks in order; together they have as many tokens as the mask is True.
        time_is_extent: whether a block's extent in time moves the text after it.

    Returns:
        int32 (3, n): time, height, width; and the position of the first token that is generated.
    """
    if int(media_mask.sum()) != sum(block.tokens for block in blocks):
        raise ValueError("the vision blocks do not have as many tokens as the mask")
    positions = np.empty((3, len(media_mask)), dtype=np.int32)
    at = following = 0  # token, and the position of the next text token
    for block in blocks:
        start = at + int(np.argmax(media_mask[at:]))
        positions[:, at:start] = following + np.arange(start - at)
        following += start - at
        at = start + block.tokens
        positions[:, start:at] = following + _inside(block)
        _, height, width = block.grid
        extent = max(height, width)
        if time_is_extent:
            extent = max(extent, int(positions[0, at - 1]) - following + 1)
        following += extent
    positions[:, at:] = following + np.arange(len(media_mask) - at)
    return positions, int(positions.max(initial=-1)) + 1


def _inside(block: VisionBlock) -> np.ndarray:
    """int32 (3, tokens): positions within a block, counted from its beginning."""
    t, h, w = np.indices(block.grid).reshape(3, -1)
    time = np.floor(t.astype(np.float32) * np.float32(block.time_step))
    return np.stack([time.astype(np.int32), h, w]).astype(np.int32)
