"""How much memory a question takes, worked out before it is tried.

Pure arithmetic from `config.json` and sizes: no array is made. On Metal the process ends when a kernel finds no memory,
and MLX's CPU backend crashes, so nothing could be caught: whoever loads a model or reads a prompt looks here first.

Beside the weights a prompt needs the largest of two passes that follow each other: the vision tower over as many
temporal patches as go at once, and the language model over one step of the prompt, with the cache that both it and the
answer fill. What a pass holds was read off its graph: outputs of queued operations are allocated when they are queued,
so the arrays of a layer count in full, with nothing freed yet. `tests/test_memory_plan.py` holds the estimates to
`mx.get_peak_memory` on the CPU backend, where attention is not fused and keeps its scores. On Metal and CUDA the same
graph is counted without the scores, and was not measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxvr.model.cache import CACHE_STEP, group_size
from mlxvr.model.families.base import family_of
from mlxvr.model.network import temporal_patches_at_once
from mlxvr.model.vision_tower import SCORES_AT_ONCE

__all__ = [
    "PromptMemory",
    "PromptSize",
    "cache_bytes",
    "plan_prompt",
    "prefill_bytes",
    "step_limit",
    "tower_bytes",
    "vision_bytes",
]

# Pairs of a query and a key in one step's attention. Each costs a layer of an 8B model 16,384 operations: half a second
# for all of them on the slowest Macs, whose watchdog ends a kernel that keeps the screen waiting for some seconds.
_PAIRS_AT_ONCE = 2**25
_LEAST_STEP = 64


@dataclass(frozen=True, kw_only=True)
class PromptMemory:
    """Bytes that a prompt and its answer need beside the weights.

    Attributes:
        features: what the vision tower made of the media, kept until the prompt is read.
        vision: the vision tower's largest pass.
        keys_values: the cache of prompt and answer.
        prefill: the largest step of the prompt.
    """

    features: int
    vision: int
    keys_values: int
    prefill: int

    @property
    def peak(self) -> int:
        """The most bytes at any time."""
        return self.features + max(self.vision, self.keys_values + self.prefill)


@dataclass(frozen=True, kw_only=True)
class PromptSize:
    """How large a question is, and how the model goes over it.

    Attributes:
        prompt_tokens: of the whole prompt, visual tokens included.
        answer_tokens: the most tokens of the answer.
        grids: (t, h, w) in patches of each of its media that the vision tower has yet to see.
        held_tokens: of the prompt that the cache holds already.
        step_size: tokens of the prompt that go through the model at once.
        itemsize: bytes of a number that the model computes with.
        kv_bits: bits of stored keys and values; None: as computed.
        is_fused: attention keeps no scores (not so on the CPU, nor with `kv_bits`).
    """

    prompt_tokens: int
    answer_tokens: int
    grids: Sequence[tuple[int, int, int]] = ()
    held_tokens: int = 0
    step_size: int = 2048
    itemsize: int = 2
    kv_bits: int | None = None
    is_fused: bool = True


def plan_prompt(config: Mapping[str, Any], size: PromptSize) -> PromptMemory:
    """Work out what a question of some size needs of a model; `config` is `VideoModel.config`."""
    vision = config["vision_config"]
    levels = 1 + len(family_of(config).deepstack_layers(config))
    tokens = sum(math.prod(grid) for grid in size.grids) // vision["spatial_merge_size"] ** 2
    cached_tokens = size.prompt_tokens + size.answer_tokens
    return PromptMemory(
        features=tokens * vision["out_hidden_size"] * levels * size.itemsize,
        vision=max(
            (vision_bytes(config, grid, itemsize=size.itemsize, is_fused=size.is_fused) for grid in size.grids),
            default=0,
        ),
        keys_values=cache_bytes(config, cached_tokens, itemsize=size.itemsize, kv_bits=size.kv_bits),
        prefill=prefill_bytes(config, size),
    )


def cache_bytes(config: Mapping[str, Any], tokens: int, *, itemsize: int = 2, kv_bits: int | None = None) -> int:
    """Bytes of the keys and values of so many tokens, in the steps by which a cache grows."""
    text = config["text_config"]
    head_dim = family_of(config).head_dim(config)
    width = text["num_key_value_heads"] * head_dim
    reserved = math.ceil(tokens / CACHE_STEP) * CACHE_STEP
    if kv_bits is None:
        token = width * itemsize
    else:  # packed numbers, and a scale and a bias for each group of them
        token = width * kv_bits // 8 + 2 * (width // group_size(head_dim, kv_bits)) * itemsize
    return int(text["num_hidden_layers"]) * reserved * 2 * token


def prefill_bytes(config: Mapping[str, Any], size: PromptSize) -> int:
    """Bytes of the largest step of a prompt, its cache and visual features aside.

    Of each token of the step: the MLP's gate, up, activation and product, and the residual, its norms, queries, keys
    and values before and after their rotation. Where attention is not fused, its scores: three to four bytes for each,
    measured, also where the model computes in two, since the mask and the softmax are not all done in place.
    A layer's cache has its old arrays too while it grows.
    """
    text = config["text_config"]
    heads, head_dim = int(text["num_attention_heads"]), family_of(config).head_dim(config)
    hidden, inner = int(text["hidden_size"]), int(text["intermediate_size"])
    keys = int(text["num_key_value_heads"]) * head_dim
    token = (4 * inner + 5 * hidden + 2 * heads * head_dim + 4 * keys) * size.itemsize
    is_fused = size.is_fused and size.kv_bits is None
    score_size = max(size.itemsize, 3 if size.kv_bits is None else 4)
    largest, start = 0, size.held_tokens
    while start < size.prompt_tokens:
        step = min(size.step_size, step_limit(config, start, is_fused=is_fused), size.prompt_tokens - start)
        start += step
        scores = 0 if is_fused else heads * step * start * score_size
        largest = max(largest, step * token + scores)
    cache = cache_bytes(config, size.prompt_tokens, itemsize=size.itemsize, kv_bits=size.kv_bits)
    return largest + cache // int(text["num_hidden_layers"])


def step_limit(config: Mapping[str, Any], held_tokens: int, *, is_fused: bool = True) -> int:
    """The most tokens that should go through the model at once after `held_tokens`.

    A step's attention grows with what came before: in time, and in memory where it keeps its scores.
    """
    heads = int(config["text_config"]["num_attention_heads"])
    pairs = _PAIRS_AT_ONCE if is_fused else min(_PAIRS_AT_ONCE, SCORES_AT_ONCE // heads)
    step = int((math.sqrt(held_tokens**2 + 4 * pairs) - held_tokens) / 2)  # step * (held + step) = pairs
    return max(_LEAST_STEP, step // _LEAST_STEP * _LEAST_STEP)


def vision_bytes(
    config: Mapping[str, Any], grid: tuple[int, int, int], *, itemsize: int = 2, is_fused: bool = True
) -> int:
    """Bytes of the vision tower over as many temporal patches of a clip as it takes at once."""
    vision = config["vision_config"]
    frame = grid[1] * grid[2]
    patches = min(temporal_patches_at_once(vision, frame), grid[0]) * frame
    return tower_bytes(vision, patches, frame, itemsize=itemsize, is_fused=is_fused)


def tower_bytes(vision: Mapping[str, Any], patches: int, frame_patches: int, *, itemsize: int, is_fused: bool) -> int:
    """Bytes of the vision tower over so many patches, which see only the patches of their own temporal patch.

    The pixels, and the larger part of a layer: attention (its input, the norm's output, queries, keys and values, five
    float32 arrays each for rotating queries and keys, scores where it is not fused) or the MLP.

    Args:
        vision: `vision_config` of the model.
        patches: that go through the tower at once.
        frame_patches: patches of a temporal patch.
        itemsize: bytes of a number that the model computes with.
        is_fused: attention keeps no scores.
    """
    width, inner, heads = int(vision["hidden_size"]), int(vision["intermediate_size"]), int(vision["num_heads"])
    values = 3 * int(vision["temporal_patch_size"]) * int(vision["patch_size"]) ** 2
    scores = 0 if is_fused else min(heads * patches * frame_patches, SCORES_AT_ONCE) * itemsize
    attention = patches * width * (5 * itemsize + 10 * 4) + scores
    mlp = patches * (width * 4 + inner * 5) * itemsize
    return patches * values * (4 + itemsize) + max(attention, mlp)
