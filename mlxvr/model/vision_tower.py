"""The vision towers' forward pass over frames of one size, with the weights that mlx-vlm's modules hold.

The tower sees every temporal patch of a video (two frames) by itself: attention never crosses temporal patches, and
positions depend on height and width only. So temporal patches are a batch axis here, and any number of them may go
through at once with the same result. What differs between families (windows, learned positions, features for the
language model's first layers) is in the plan of a frame (`mlxvr.model.frame_plan`), which its family makes.

Departures from mlx-vlm 0.7.10's own towers, which give the same numbers (tests compare both with transformers): one
attention call a layer instead of one for each temporal patch; Qwen2.5-VL's windows are gathered once into at most four
batches of equal windows instead of a call for each window (1,280 calls a layer for 64 frames of 448x252); no value is
read back from the device between layers; the patch embedding is a matrix product, as is any convolution that strides
its size.

A large picture cannot be divided in this way: 12 megapixels are 47,376 patches, and the scores of 16 heads would be
144 GB. Queries do not depend on each other, so attention then takes some of them at a time, and layers are computed one
by one, between which the work can be stopped.
"""

from typing import Any

import mlx.core as mx

from mlxvr.errors import Cancelled
from mlxvr.model.frame_plan import FramePlan
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["SCORES_AT_ONCE", "run_tower"]

# Attention scores that one call may make: 1 GiB in float32 where attention is not fused. Where it is, the bound keeps a
# kernel short enough for the watchdog that macOS has for GPUs: about 0.1 s on the slowest chip.
SCORES_AT_ONCE = 2**28

_FUSED_HEAD_DIMS = (64, 80, 128)  # what MLX's fused attention kernel takes; others are padded up


def run_tower(
    tower: Any,
    pixels: mx.array,
    temporal_patches: int,
    plan: FramePlan,
    *,
    scores_at_once: int = SCORES_AT_ONCE,
    should_stop: ShouldStop | None = None,
) -> tuple[mx.array, list[mx.array]]:
    """Run a vision tower over temporal patches of one size.

    Args:
        tower: mlx-vlm's `VisionModel`.
        pixels: (temporal_patches * patches, values) as `media.normalise` gives them.
        temporal_patches: how many there are in `pixels`.
        plan: of the frame's size.
        scores_at_once: bounds the memory of attention; the result does not depend on it.
        should_stop: asked between layers of pictures so large that their attention is cut.

    Returns:
        Features (temporal_patches * tokens, out) in the prompt's order, and those of each of the plan's deepstack
        layers, same shape.

    Raises `Cancelled` when `should_stop` says so.
    """
    weight = tower.patch_embed.proj.weight
    unit = tower.spatial_merge_size**2
    flat = weight.transpose(0, 4, 1, 2, 3).reshape(weight.shape[0], -1)
    x = pixels.astype(weight.dtype) @ flat.T
    if "bias" in tower.patch_embed.proj:
        x = x + tower.patch_embed.proj.bias
    width = x.shape[-1]
    x = x.reshape(temporal_patches, -1, unit, width)[:, mx.array(plan.order)]
    x = x.reshape(temporal_patches, -1, width)  # (temporal_patches, patches, width)
    if plan.corners is not None and plan.weights is not None:
        learned = tower.pos_embed(mx.array(plan.corners))  # (4, patches, width)
        x = x + (learned * mx.array(plan.weights)[..., None].astype(learned.dtype)).sum(axis=0)
    cos, sin = mx.array(plan.cos)[:, None], mx.array(plan.sin)[:, None]  # (patches, 1, head_dim)
    whole = ((1, x.shape[1]),)
    restore = mx.array(plan.restore)

    def in_prompt_order(merged: mx.array) -> mx.array:
        merged = merged.reshape(temporal_patches, -1, merged.shape[-1])
        return merged[:, restore].reshape(-1, merged.shape[-1])

    deep: list[mx.array] = []
    is_cut = temporal_patches * tower.blocks[0].attn.num_heads * x.shape[1] ** 2 > scores_at_once
    for index, block in enumerate(tower.blocks):
        if is_cut:
            mx.eval(x, deep)
            if should_stop is not None and should_stop():
                raise Cancelled("stopped while the model looked at the picture")
        windows = whole if plan.full_layers is None or index in plan.full_layers else plan.windows
        x = x + _attend(block.attn, block.norm1(x), cos, sin, windows, scores_at_once)
        x = x + block.mlp(block.norm2(x))
        if index in plan.deepstack_layers:
            merger = tower.deepstack_merger_list[plan.deepstack_layers.index(index)]
            deep.append(in_prompt_order(merger(x)))
    return in_prompt_order(tower.merger(x)), deep


def _attend(
    attention: Any,
    x: mx.array,
    cos: mx.array,
    sin: mx.array,
    windows: tuple[tuple[int, int], ...],
    scores_at_once: int,
) -> mx.array:
    """Attention inside each window; `windows` partitions the patches of a frame into runs of equal windows."""
    batch, patches, width = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).reshape(batch, patches, 3, heads, width // heads)
    q, k, v = _rotate(qkv[:, :, 0], cos, sin), _rotate(qkv[:, :, 1], cos, sin), qkv[:, :, 2]
    seen, start = [], 0
    for count, size in windows:
        stop = start + count * size
        # (batch, count * size, heads, dim) -> (batch * count, heads, size, dim)
        parts = [
            part[:, start:stop].reshape(batch * count, size, heads, -1).transpose(0, 2, 1, 3) for part in (q, k, v)
        ]
        out = _attention_in_pieces(*parts, scale=attention.scale, scores_at_once=scores_at_once)
        seen.append(out.transpose(0, 2, 1, 3).reshape(batch, count * size, width))
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
        mx.eval(done[-1])  # outputs of queued operations are allocated when they are queued
    return mx.concatenate(done, axis=2)


def _fused_attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
    dim = q.shape[-1]
    target = next((size for size in _FUSED_HEAD_DIMS if dim <= size), dim)
    if target != dim:
        padding = [(0, 0)] * 3 + [(0, target - dim)]
        q, k, v = (mx.pad(part, padding) for part in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)[..., :dim]
