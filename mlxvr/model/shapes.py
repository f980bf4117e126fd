"""Every tensor of a network and its shape, from `config.json` alone.

The list is written out by hand rather than read off a built network, so that a checkpoint can be judged before MLX is
imported or a byte of it is loaded. Names are MLX's; matrices are (output, input) as in PyTorch, and the patch embedding
is a 3-D convolution in MLX's layout (output, time, height, width, channel).
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["language_shapes", "qwen2_5_vision_shapes", "qwen3_vision_shapes"]

Shapes = dict[str, tuple[int, ...]]


def language_shapes(text: Mapping[str, Any], *, qkv_bias: bool, head_norms: bool, head_dim: int) -> Shapes:
    """Shapes of `language_model.*` from complete text settings."""
    hidden, inner, vocab = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    queries, keys = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    shapes: Shapes = {"language_model.model.embed_tokens.weight": (vocab, hidden)}
    if not text["tie_word_embeddings"]:
        shapes["language_model.lm_head.weight"] = (vocab, hidden)
    for layer in range(text["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            shapes |= _linear(f"{at}.self_attn.{name}", width, hidden, bias=qkv_bias)
        shapes |= _linear(f"{at}.self_attn.o_proj", hidden, queries, bias=False)
        if head_norms:
            shapes[f"{at}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{at}.self_attn.k_norm.weight"] = (head_dim,)
        shapes |= _linear(f"{at}.mlp.gate_proj", inner, hidden, bias=False)
        shapes |= _linear(f"{at}.mlp.up_proj", inner, hidden, bias=False)
        shapes |= _linear(f"{at}.mlp.down_proj", hidden, inner, bias=False)
    shapes["language_model.model.norm.weight"] = (hidden,)
    return shapes


def qwen2_5_vision_shapes(vision: Mapping[str, Any]) -> Shapes:
    """Shapes of Qwen2.5-VL's `vision_tower.*`: RMS norms, a gated MLP, one merger."""
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    shapes = _patch_embedding(vision)
    for layer in range(vision["depth"]):
        at = f"vision_tower.blocks.{layer}"
        shapes[f"{at}.norm1.weight"] = (hidden,)
        shapes[f"{at}.norm2.weight"] = (hidden,)
        shapes |= _linear(f"{at}.attn.qkv", 3 * hidden, hidden)
        shapes |= _linear(f"{at}.attn.proj", hidden, hidden)
        shapes |= _linear(f"{at}.mlp.gate_proj", inner, hidden)
        shapes |= _linear(f"{at}.mlp.up_proj", inner, hidden)
        shapes |= _linear(f"{at}.mlp.down_proj", hidden, inner)
    merged = hidden * vision["spatial_merge_size"] ** 2
    shapes["vision_tower.merger.ln_q.weight"] = (hidden,)
    shapes |= _linear("vision_tower.merger.mlp.0", merged, merged)
    shapes |= _linear("vision_tower.merger.mlp.2", vision["out_hidden_size"], merged)
    return shapes


def qwen3_vision_shapes(vision: Mapping[str, Any]) -> Shapes:
    """Shapes of Qwen3-VL's `vision_tower.*`: layer norms, learned positions, a merger for each deepstack level."""
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    shapes = _patch_embedding(vision)
    shapes["vision_tower.patch_embed.proj.bias"] = (hidden,)
    shapes["vision_tower.pos_embed.weight"] = (vision["num_position_embeddings"], hidden)
    for layer in range(vision["depth"]):
        at = f"vision_tower.blocks.{layer}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}.{norm}.weight": (hidden,), f"{at}.{norm}.bias": (hidden,)}
        shapes |= _linear(f"{at}.attn.qkv", 3 * hidden, hidden)
        shapes |= _linear(f"{at}.attn.proj", hidden, hidden)
        shapes |= _linear(f"{at}.mlp.linear_fc1", inner, hidden)
        shapes |= _linear(f"{at}.mlp.linear_fc2", hidden, inner)
    merged = hidden * vision["spatial_merge_size"] ** 2
    levels = len(vision["deepstack_visual_indexes"])
    mergers = [("vision_tower.merger", hidden)]
    mergers += [(f"vision_tower.deepstack_merger_list.{level}", merged) for level in range(levels)]
    for at, normed in mergers:
        shapes |= {f"{at}.norm.weight": (normed,), f"{at}.norm.bias": (normed,)}
        shapes |= _linear(f"{at}.linear_fc1", merged, merged)
        shapes |= _linear(f"{at}.linear_fc2", vision["out_hidden_size"], merged)
    return shapes


def _patch_embedding(vision: Mapping[str, Any]) -> Shapes:
    patch = vision["patch_size"]
    kernel = (vision["temporal_patch_size"], patch, patch, vision["in_channels"])
    return {"vision_tower.patch_embed.proj.weight": (vision["hidden_size"], *kernel)}


def _linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | {f"{name}.bias": (outputs,)} if bias else shapes
