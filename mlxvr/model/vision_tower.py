"""The vision towers' forward pass over frames of one size, with the weights that mlx-vlm's modules hold.

Every temporal row of a video is seen by itself: attention never crosses rows, and positions depend on height and width
only. So rows are a batch axis here, and any number of them may go through at once with the same result. The plan of a
frame (rotary angles, learned positions, windows) depends on its size alone and is made once, in numpy.

Departures from mlx-vlm 0.7.10's own towers, which give the same numbers (tests compare both with transformers): one
attention call a layer instead of one for each row; Qwen2.5-VL's windows are gathered once into at most four batches of
equal windows instead of a call for each window (1,280 calls a layer for 64 frames of 448x252); no value is read back
from the device between layers; the patch embedding is a matrix product, as is any convolution that strides its size.

A large picture is one row that cannot be shared out: 12 megapixels are 47,376 patches, and the scores of 16 heads would
be 144 GB. Queries do not depend on each other, so attention takes some of them at a time then, and layers are computed
one by one, between which the work can be stopped.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvr.errors import Cancelled
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["SCORES_AT_ONCE", "FramePlan", "plan_frame", "run_tower"]

# Attention scores that one call may make: 1 GiB in float32 where attention is not fused. Where it is, the bound keeps a
# kernel short enough for the watchdog that macOS has for GPUs: about 0.1 s on the slowest chip.
SCORES_AT_ONCE = 2**28

_ROPE_THETA = 10_000.0
_FUSED_HEAD_DIMS = (64, 80, 128)  # what MLX's fused attention kernel takes; others are padded up


@dataclass(frozen=True, eq=False)
class FramePlan:
    """What a frame of h x w patches needs beside its pixels.

    Attributes:
        order: (tokens,) the order in which the frame's tokens go through the tower.
        restore: (tokens,) its inverse.
        cos, sin: float32 (patches, head_dim), in that order.
        windows: (count, patches) for each run of equal windows, in that order; one entry of the whole frame where
            there are no windows.
        corners, weights: int32 and float32 (4, patches): the rows of the learned position table that surround each
            patch, and their bilinear weights; None where the tower has no table.
    """

    order: np.ndarray
    restore: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    windows: tuple[tuple[int, int], ...]
    corners: np.ndarray | None = None
    weights: np.ndarray | None = None


@functools.lru_cache(maxsize=16)
def plan_frame(
    height: int,
    width: int,
    *,
    merge: int,
    head_dim: int,
    window: int | None = None,
    table_side: int | None = None,
) -> FramePlan:
    """Plan a frame.

    Args:
        height, width: in patches.
        merge: patches of one side of a token.
        head_dim: of the tower's attention.
        window: tokens of one side of a window (Qwen2.5-VL), None: no windows.
        table_side: sides of the learned position table (Qwen3-VL), None: no table.
    """
    rows, columns = height // merge, width // merge
    order, windows = _window_order(rows, columns, window)
    windows = tuple((count, tokens * merge * merge) for count, tokens in windows)
    y, x = _patch_coordinates(height, width, merge)
    y, x = (axis.reshape(-1, merge * merge)[order].reshape(-1) for axis in (y, x))
    inverse = 1.0 / _ROPE_THETA ** (np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2))
    angles = np.concatenate([np.outer(y, inverse), np.outer(x, inverse)], axis=1).astype(np.float32)
    angles = np.tile(angles, (1, 2))  # both halves of a head turn by the same angles
    corners = weights = None
    if table_side is not None:
        corners, weights = _table_lookup(y, x, height, width, table_side)
    return FramePlan(order, np.argsort(order), np.cos(angles), np.sin(angles), windows, corners, weights)


def run_tower(
    tower: Any,
    pixels: mx.array,
    rows: int,
    plan: FramePlan,
    *,
    full_layers: frozenset[int] | None = None,
    scores_at_once: int = SCORES_AT_ONCE,
    should_stop: ShouldStop | None = None,
) -> tuple[mx.array, list[mx.array]]:
    """Run a vision tower over `rows` temporal rows of one size.

    Args:
        tower: mlx-vlm's `VisionModel` of either family.
        pixels: (rows * patches, values) as `media.normalise` gives them.
        rows: temporal rows in `pixels`.
        plan: of the frame's size.
        full_layers: the layers that see whole frames rather than windows; None: all of them.
        scores_at_once: bounds the memory of attention; the result does not depend on it.
        should_stop: asked between layers of pictures so large that their attention is cut.

    Returns:
        Features (rows * tokens, out) in the prompt's order, and those of each deepstack level (Qwen3-VL), same shape.

    Raises `Cancelled` when `should_stop` says so.
    """
    weight = tower.patch_embed.proj.weight
    unit = tower.spatial_merge_size**2
    flat = weight.transpose(0, 4, 1, 2, 3).reshape(weight.shape[0], -1)
    x = pixels.astype(weight.dtype) @ flat.T
    if "bias" in tower.patch_embed.proj:
        x = x + tower.patch_embed.proj.bias
    width = x.shape[-1]
    x = x.reshape(rows, -1, unit, width)[:, mx.array(plan.order)].reshape(rows, -1, width)  # (rows, patches, width)
    if plan.corners is not None and plan.weights is not None:
        found = tower.pos_embed(mx.array(plan.corners))  # (4, patches, width)
        x = x + (found * mx.array(plan.weights)[..., None].astype(found.dtype)).sum(axis=0)
    cos, sin = mx.array(plan.cos)[:, None], mx.array(plan.sin)[:, None]  # (patches, 1, head_dim)
    whole = ((1, x.shape[1]),)
    levels: Sequence[int] = getattr(tower, "deepstack_visual_indexes", ())
    restore = mx.array(plan.restore)

    def in_prompt_order(merged: mx.array) -> mx.array:
        merged = merged.reshape(rows, -1, merged.shape[-1])
        return merged[:, restore].reshape(-1, merged.shape[-1])

    deep: list[mx.array] = []
    is_cut = rows * tower.blocks[0].attn.num_heads * x.shape[1] ** 2 > scores_at_once
    for index, block in enumerate(tower.blocks):
        if is_cut:
            mx.eval(x, deep)
            if should_stop is not None and should_stop():
                raise Cancelled("stopped while the model looked at the picture")
        windows = whole if full_layers is None or index in full_layers else plan.windows
        x = x + _attend(block.attn, block.norm1(x), cos, sin, windows, scores_at_once)
        x = x + block.mlp(block.norm2(x))
        if index in levels:
            deep.append(in_prompt_order(tower.deepstack_merger_list[levels.index(index)](x)))
    return in_prompt_order(tower.merger(x)), deep


def _attend(
    attention: Any,
    x: mx.array,
    cos: mx.array,
    sin: mx.array,
    windows: tuple[tuple[int, int], ...],
    scores_at_once: int,
) -> mx.array:
    """Attention inside each window; `windows` partitions the patches of a row into runs of equal windows."""
    rows, patches, width = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).reshape(rows, patches, 3, heads, width // heads)
    q, k, v = _rotate(qkv[:, :, 0], cos, sin), _rotate(qkv[:, :, 1], cos, sin), qkv[:, :, 2]
    seen, start = [], 0
    for count, size in windows:
        stop = start + count * size
        # (rows, count * size, heads, dim) -> (rows * count, heads, size, dim)
        parts = [part[:, start:stop].reshape(rows * count, size, heads, -1).transpose(0, 2, 1, 3) for part in (q, k, v)]
        out = _attention_in_pieces(*parts, scale=attention.scale, scores_at_once=scores_at_once)
        seen.append(out.transpose(0, 2, 1, 3).reshape(rows, count * size, width))
        start = stop
    return attention.proj(seen[0] if len(seen) == 1 else mx.concatenate(seen, axis=1))


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotary embedding in float32, as transformers does it whatever the weights' dtype."""
    full = x.astype(mx.float32)
    half = x.shape[-1] // 2
    turned = mx.concatenate([-full[..., half:], full[..., :half]], axis=-1)
    return (full * cos + turned * sin).astype(x.dtype)


def _attention_in_pieces(q: mx.array, k: mx.array, v: mx.array, *, scale: float, scores_at_once: int) -> mx.array:
    """Attention (batch, heads, length, dim), over so many queries at a time that their scores stay within the bound."""
    batch, heads, length, _ = q.shape
    step = max(1, scores_at_once // (batch * heads * length))
    if step >= length:
        return _fused_attention(q, k, v, scale=scale)
    done: list[mx.array] = []
    for start in range(0, length, step):
        done.append(_fused_attention(q[:, :, start : start + step], k, v, scale=scale))
        mx.eval(done[-1])  # what waits in line has its memory already
    return mx.concatenate(done, axis=2)


def _fused_attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
    dim = q.shape[-1]
    target = next((size for size in _FUSED_HEAD_DIMS if dim <= size), dim)
    if target != dim:
        padding = [(0, 0)] * 3 + [(0, target - dim)]
        q, k, v = (mx.pad(part, padding) for part in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)[..., :dim]


def _patch_coordinates(height: int, width: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """(y, x) of each patch in the order of a processor's rows: token by token, and inside a token row by row."""
    y, x = np.indices((height, width))
    shape = (height // merge, merge, width // merge, merge)
    ordered = [axis.reshape(shape).transpose(0, 2, 1, 3).reshape(-1) for axis in (y, x)]
    return ordered[0], ordered[1]


def _window_order(rows: int, columns: int, window: int | None) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """Tokens sorted so that windows of equal size follow each other, and the (count, tokens) of each such run.

    Windows tile the frame from its top left corner; those at the right and bottom edge may be smaller, so that there
    are at most four sizes.
    """
    tokens = np.arange(rows * columns).reshape(rows, columns)
    if window is None:
        return tokens.reshape(-1), ((1, rows * columns),)
    tiles: dict[tuple[int, int], list[np.ndarray]] = {}
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            tile = tokens[top : top + window, left : left + window]
            tiles.setdefault(tile.shape, []).append(tile.reshape(-1))
    order = np.concatenate([tile for same in tiles.values() for tile in same])
    return order, tuple((len(same), same[0].size) for same in tiles.values())


def _table_lookup(y: np.ndarray, x: np.ndarray, height: int, width: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear interpolation of a side x side table over the frame, edges on edges: rows of the table and weights."""
    down = np.linspace(0, side - 1, height, dtype=np.float32)[y]
    across = np.linspace(0, side - 1, width, dtype=np.float32)[x]
    top, left = down.astype(np.int32), across.astype(np.int32)
    bottom, right = np.minimum(top + 1, side - 1), np.minimum(left + 1, side - 1)
    dy, dx = down - top, across - left
    corners = np.stack([top * side + left, top * side + right, bottom * side + left, bottom * side + right])
    weights = np.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])
    return corners.astype(np.int32), weights.astype(np.float32)
