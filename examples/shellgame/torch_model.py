"""A fast training forward pass of Qwen3-VL for clips of one fixed shape, on the parameters of transformers' own module.

transformers builds and saves the model; this file only computes its logits faster: fixed shapes and nothing that waits
for the CPU, so that a whole training step can be captured as a CUDA graph, with the layers compiled one by one. A test
compares its logits with those of the module.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from .rendering import patch_grid

_TEXT, _VISION = "model.language_model.", "model.visual."
_LM_KEYS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_norm",
    "self_attn.k_norm", "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_BLOCK_KEYS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.linear_fc1", "mlp.linear_fc2")
_MERGER_KEYS = ("norm", "linear_fc1", "linear_fc2")
HEAD = 32


@dataclass(frozen=True)
class Size:
    """The network's dimensions; heads have 32 channels, and two query heads share a key head."""

    hidden: int = 192
    layers: int = 5
    vision_hidden: int = 96
    vision_layers: int = 2
    deepstack: tuple[int, ...] = (0,)
    widening: int = 3  # of the feed-forward layers


def make_config(size: Size, vocabulary: int, special: dict[str, int]) -> Any:
    """A genuine `Qwen3VLConfig` of this size."""
    from transformers import Qwen3VLConfig

    heads = size.hidden // HEAD
    text = {
        "vocab_size": vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.hidden * size.widening,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": HEAD,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            "mrope_section": [6, 5, 5],
            "rope_type": "default",
            "mrope_interleaved": True,
            "rope_theta": 10000.0,
        },
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": special["<|im_end|>"],
    }
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_hidden * size.widening,
        "num_heads": size.vision_hidden // HEAD,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": size.hidden,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(size.deepstack),
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def initialise(model: torch.nn.Module, seed: int) -> None:
    """Scaled normal weights: 0.8 / sqrt(fan-in), the layers that write into the residual stream smaller."""
    generator = torch.Generator().manual_seed(seed)
    writers = ("o_proj", "down_proj", "attn.proj", "mlp.linear_fc2")
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        if "embed" in name and "patch" not in name:
            scale = 0.02
        else:
            scale = 0.8 / math.sqrt(parameter[0].numel()) * (0.35 if any(w in name for w in writers) else 1.0)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@dataclass
class Layout:
    """What is the same for every clip of one frame size: positions of patches, interpolated tables."""

    height: int
    width: int
    device: str
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = patch_grid(self.height, self.width)
        self.tokens = len(rows) // 4
        self.columns_of_tokens = self.width // 32
        self.advance = max(self.height, self.width) // 32  # how far a block of this size moves the position
        spatial = HEAD // 2
        frequency = 1.0 / (10000.0 ** (torch.arange(0, spatial, 2).float() / spatial))
        angles = torch.cat((rows[:, None] * frequency, columns[:, None] * frequency), -1)
        angles = torch.cat((angles, angles), -1)[None, :, None]  # (1, patches, 1, head_dim)
        self.cos, self.sin = angles.cos().to(self.device), angles.sin().to(self.device)
        self.resample = _bilinear(rows, columns, self.height // 16, self.width // 16).to(self.device)


def _bilinear(rows: torch.Tensor, columns: torch.Tensor, height: int, width: int, side: int = 8) -> torch.Tensor:
    """Weights (patches, side * side) that read the learned side x side grid at each patch, corners aligned."""
    weights = torch.zeros(len(rows), side, side)
    for patch, (row, column) in enumerate(zip(rows.tolist(), columns.tolist())):
        y, x = row * (side - 1) / (height - 1), column * (side - 1) / (width - 1)
        for yy, wy in ((int(y), 1 - y % 1), (min(int(y) + 1, side - 1), y % 1)):
            for xx, wx in ((int(x), 1 - x % 1), (min(int(x) + 1, side - 1), x % 1)):
                weights[patch, yy, xx] += wy * wx
    return weights.reshape(len(rows), -1)


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    wide, half = x.float(), x.shape[-1] // 2
    turned = torch.cat((-wide[..., half:], wide[..., :half]), -1)
    return (wide * cos + turned * sin).to(x.dtype).transpose(1, 2)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _decoder_layer(x, cos, sin, norm1, wq, wk, wv, q_norm, k_norm, wo, norm2, gate, up, down):
    """(batch, length, hidden) -> the same; cos and sin (batch, length, 1, head_dim)."""
    batch, length, _ = x.shape
    y = _rms(x, norm1)
    q = _rotate(_rms(_linear(y, wq).view(batch, length, -1, HEAD), q_norm), cos, sin)
    k = _rotate(_rms(_linear(y, wk).view(batch, length, -1, HEAD), k_norm), cos, sin)
    v = _linear(y, wv).view(batch, length, -1, HEAD).transpose(1, 2)
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + _linear(seen.transpose(1, 2).reshape(batch, length, -1), wo)
    y = _rms(x, norm2)
    return x + _linear(F.silu(_linear(y, gate)) * _linear(y, up), down)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-6).to(x.dtype)


def _vision_block(x, cos, sin, n1w, n1b, qkv_w, qkv_b, out_w, out_b, n2w, n2b, fc1_w, fc1_b, fc2_w, fc2_b):
    """(images, patches, hidden) -> the same."""
    images, patches, hidden = x.shape
    q, k, v = _linear(_layer_norm(x, n1w, n1b), qkv_w, qkv_b).view(images, patches, 3, -1, HEAD).unbind(2)
    seen = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v.transpose(1, 2))
    x = x + _linear(seen.transpose(1, 2).reshape(images, patches, hidden), out_w, out_b)
    y = F.gelu(_linear(_layer_norm(x, n2w, n2b), fc1_w, fc1_b), approximate="tanh")
    return x + _linear(y, fc2_w, fc2_b)


def _merge(x, shuffled_norm: bool, nw, nb, fc1_w, fc1_b, fc2_w, fc2_b):
    """(images, patches, hidden) -> (images, patches / 4, text hidden)."""
    images, patches, hidden = x.shape
    if shuffled_norm:
        y = _layer_norm(x.reshape(images, patches // 4, 4 * hidden), nw, nb)
    else:
        y = _layer_norm(x, nw, nb).reshape(images, patches // 4, 4 * hidden)
    return _linear(F.gelu(_linear(y, fc1_w, fc1_b)), fc2_w, fc2_b)


def vary(tensor: torch.Tensor, *axes: int) -> torch.Tensor:
    """Tell the compiler that these axes differ between calls, so that it compiles one kernel for all of them."""
    for axis in axes:
        torch._dynamo.maybe_mark_dynamic(tensor, axis)
    return tensor


class FastQwen3VL:
    """Logits of a `Qwen3VLForConditionalGeneration` for batches of clips of one shape, computed in `dtype`.

    `compiler` wraps each layer function (`torch.compile`, or the identity).
    """

    def __init__(
        self, module: torch.nn.Module, size: Size, video_token: int, *, dtype: torch.dtype, compiler: Callable
    ) -> None:
        self.weights = dict(module.named_parameters())
        self.size, self.video_token, self.dtype = size, video_token, dtype
        self._decoder_layer = compiler(_decoder_layer)
        self._vision_block = compiler(_vision_block)
        self._merge = compiler(_merge)
        device = next(iter(self.weights.values())).device
        self.frequency = 1.0 / (10000.0 ** (torch.arange(0, HEAD, 2, device=device).float() / HEAD))
        axis = torch.zeros(HEAD // 2, dtype=torch.long)
        axis[1:15:3], axis[2:15:3] = 1, 2  # interleaved mrope: time, height, width in turns
        self.axis = axis.to(device)

    def logits(self, ids: torch.Tensor, patches: torch.Tensor, layout: Layout, start: int) -> torch.Tensor:
        """Logits of the tokens from `start` + 1 on.

        Args:
            ids: (batch, length) int64, padded on the right.
            patches: (batch, pairs, patches, 3, 2, 16, 16) in [-1, 1].

        Returns:
            (batch, length - 1 - start, vocabulary) in `dtype`; [:, i] predicts token start + 1 + i.
        """
        w, batch, length = self.weights, *ids.shape
        features, deep = self._encode(patches, layout)
        video = ids == self.video_token
        cos, sin = self._angles(video, layout)
        columns = torch.argsort(~video, dim=1, stable=True)[:, : features.shape[0] // batch]
        where = (columns + torch.arange(batch, device=ids.device)[:, None] * length).reshape(-1)
        table = w[_TEXT + "embed_tokens.weight"]
        x = F.embedding(ids, table).to(self.dtype).reshape(batch * length, -1)
        x = x.index_copy(0, where, features).view(batch, length, -1)
        for layer in range(self.size.layers):
            names = [f"{_TEXT}layers.{layer}.{key}.weight" for key in _LM_KEYS]
            x = self._decoder_layer(vary(x, 1), vary(cos, 1), vary(sin, 1), *[w[name] for name in names])
            if layer < len(deep):
                x = x.reshape(batch * length, -1).index_add(0, where, deep[layer]).view(batch, length, -1)
        return F.linear(_rms(x[:, start:-1], w[_TEXT + "norm.weight"]), table.to(self.dtype))

    def _encode(self, patches: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The vision tower: (video tokens of the batch, hidden), and the same for each deepstack level."""
        w = self.weights
        images = patches.shape[0] * patches.shape[1]
        x = _linear(
            patches.reshape(images, patches.shape[2], -1).to(self.dtype),
            w[_VISION + "patch_embed.proj.weight"].reshape(self.size.vision_hidden, -1),
            w[_VISION + "patch_embed.proj.bias"],
        )
        x = x + (layout.resample @ w[_VISION + "pos_embed.weight"]).to(self.dtype)
        deep = []
        for block in range(self.size.vision_layers):
            angles = vary(layout.cos, 1), vary(layout.sin, 1)
            x = self._vision_block(vary(x, 0, 1), *angles, *self._pairs(f"blocks.{block}.", _BLOCK_KEYS))
            if block in self.size.deepstack:
                name = f"deepstack_merger_list.{self.size.deepstack.index(block)}."
                deep.append(self._merge(vary(x, 0, 1), True, *self._pairs(name, _MERGER_KEYS)).flatten(0, 1))
        return self._merge(vary(x, 0, 1), False, *self._pairs("merger.", _MERGER_KEYS)).flatten(0, 1), deep

    def _pairs(self, name: str, keys: tuple[str, ...]) -> list[torch.Tensor]:
        return [self.weights[f"{_VISION}{name}{key}.{part}"] for key in keys for part in ("weight", "bias")]

    def _angles(self, video: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (batch, length, 1, head_dim) of the 3-D positions that follow from where the video tokens are."""
        inside = (video.cumsum(1) - 1) % layout.tokens * video
        last = inside == layout.tokens - 1
        step = torch.where(video, last * layout.advance, 1)
        base = step.cumsum(1) - step
        row, column = inside // layout.columns_of_tokens, inside % layout.columns_of_tokens
        positions = torch.stack((base, base + row * video, base + column * video), -1)
        angles = positions[:, :, self.axis].float() * self.frequency
        angles = torch.cat((angles, angles), -1)[:, :, None]
        return angles.cos(), angles.sin()
