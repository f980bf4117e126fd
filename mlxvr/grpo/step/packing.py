"""A group as one sequence: the prompt once, then every completion, each blind to the others.

    columns   prompt            c1[:-1]   c2[:-1]   ..
    sees      what came before  the prompt, and what came before in its own completion

Positions restart after the prompt in every completion, so that a token is where it was when it was sampled. A
completion's last token is never read: nothing comes after it. What its first token is predicted from is the prompt's
last column, which all completions share; the others are predicted from the column before their own.

The tree is exact, not an approximation: each completion's hidden states, and the gradient through the shared prompt,
are what they would be if the completions were run one at a time. Completions of different lengths cost no padding.
Recording the prompt's keys and values and handing them to a batch of completions is the same mathematics; attention by
blocks (`forward`) computes what that computes, and nothing has to be kept outside the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxvr.model.network import VisionFeatures

if TYPE_CHECKING:
    from mlxvr.grpo.step.prompts import EncodedPrompt

__all__ = ["PackedGroup", "pack", "tree_mask"]


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedGroup:
    """G completions of one prompt as one sequence of N columns.

    Attributes:
        ids: int32 (N,), the tokens that are read.
        positions: int32 (3, N), rope positions.
        owner: int32 (N,), the completion that a column belongs to; -1: the prompt.
        media_mask: bool (N,), the columns of visual tokens.
        features: of the visual tokens, in order; None without media.
        targets: int32 (G, T), the completions, padded with 0 to the longest.
        columns: int32 (G, T), the column whose hidden state predicts each target; 0 where padded.
        mask: bool (G, T), False where padded.
    """

    ids: np.ndarray
    positions: np.ndarray
    owner: np.ndarray
    media_mask: np.ndarray
    features: VisionFeatures | None
    targets: np.ndarray
    columns: np.ndarray
    mask: np.ndarray

    @property
    def prompt_length(self) -> int:
        """Columns that belong to the prompt."""
        return int(np.count_nonzero(self.owner < 0))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first column, column after the last) of each completion; empty for one of a single token."""
        ends = self.prompt_length + np.cumsum(np.maximum(self.mask.sum(axis=1) - 1, 0))
        return list(zip([self.prompt_length, *ends[:-1].tolist()], ends.tolist()))


def pack(prompt: "EncodedPrompt", completions: Sequence[np.ndarray]) -> PackedGroup:
    """Lay completions out after their prompt.

    Args:
        prompt: encoded, with at least one token.
        completions: int32 (T_i,) token ids each, the token that ended it included; lengths may differ.

    Raises `ValueError` for no completion, or one without tokens.
    """
    lengths = np.array([len(completion) for completion in completions], dtype=np.int64)
    if len(lengths) == 0 or lengths.min() == 0:
        raise ValueError(f"completions of {lengths.tolist()} tokens cannot be packed: each needs at least one")
    start, read = len(prompt.ids), lengths - 1
    first = start + np.concatenate([[0], np.cumsum(read)[:-1]])  # each completion's first column
    step = np.arange(lengths.max())
    mask = step < lengths[:, None]
    targets = np.zeros(mask.shape, dtype=np.int32)
    targets[mask] = np.concatenate(completions)
    columns = np.where(step == 0, start - 1, first[:, None] + step - 1)
    own = np.concatenate([np.arange(count) for count in read])
    return PackedGroup(
        ids=np.concatenate([prompt.ids, targets[:, :-1][mask[:, 1:]]]).astype(np.int32),
        positions=np.concatenate([prompt.positions, np.tile(prompt.next_position + own, (3, 1))], 1).astype(np.int32),
        owner=np.repeat(np.arange(-1, len(lengths)), [start, *read]).astype(np.int32),
        media_mask=np.concatenate([prompt.media_mask, np.zeros(len(own), dtype=bool)]),
        features=prompt.features,
        targets=targets,
        columns=np.where(mask, columns, 0).astype(np.int32),
        mask=mask,
    )


def tree_mask(packed: PackedGroup) -> mx.array:
    """Which columns (axis 1) each column (axis 0) sees: bool (N, N)."""
    owner, column = packed.owner, np.arange(len(packed.owner))
    visible = (owner[None] < 0) | (owner[None] == owner[:, None])
    return mx.array(visible & (column[None] <= column[:, None]))
