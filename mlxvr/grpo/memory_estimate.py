"""How much memory a training step needs, worked out before it starts.

Pure arithmetic from the model's settings: no array is made. A step has passes that follow each other (vision tower,
prefill, decoding, the gradient's head, the gradient's layers, the optimizer), and the peak is what always stays plus
the largest of them. What a pass holds was read off its graph, array by array; the lists are in the functions below.

MLX prepares work faster than the device does it, and what waits in line has its memory already. So what a part of a
pass makes counts with nothing given back yet. `mx.set_memory_limit` shortens the line: with a limit below what is
needed, the same passes took up to 40% less on a CPU.

Measured against `mx.get_peak_memory` on MLX's CPU backend (0.32.4), random models of both families, float32 and 4 bits,
prompts of 400 to 2,800 tokens, groups of 4 to 16, completions of 24 to 300: what a gradient pass takes beyond the
weights is estimated at 0.95 to 1.09 of the measured peak (8 shapes, both ways of it), rollouts at 1.00 to 1.19 (7),
vision towers at 0.88 to 0.97 (4). On an NVIDIA GPU through MLX's CUDA backend the gradient of Qwen3-VL-8B at 4 bits,
rank 16, with layers that are computed again is estimated at 1.06 to 1.19 of the measured peak (3 shapes); its term for
unpacked weights was inferred from these. Without that it was not measured there since attention is computed again, and
Metal was not measured at all: attention is taken to be fused in the forward pass and not in training.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxvr.errors import OutOfMemoryError
from mlxvr.grpo.step.forward import LOGITS_AT_ONCE, QUERIES_AT_ONCE, SCORES_AT_ONCE
from mlxvr.grpo.step.lora import lora_weights
from mlxvr.grpo.step.lora_config import PROJECTIONS
from mlxvr.model.adapter import find_layers
from mlxvr.model.cache import CACHE_STEP
from mlxvr.model.families.base import family_of
from mlxvr.model.network import PATCHES_AT_ONCE, VideoModel
from mlxvr.model.vision_tower import SCORES_AT_ONCE as VISION_SCORES_AT_ONCE
from mlxvr.runtime.device_memory import backend

__all__ = ["MemoryEstimate", "Workload", "estimate", "estimate_training"]

_LORA = 4  # LoRA matrices and what they multiply are float32
_IN_LINE = 10  # pieces of work that MLX hands to a device before it waits for one


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be done; sizes in tokens or bytes.

    Attributes:
        config: `VideoModel.config`.
        weight_bytes: of the model without adapters.
        adapter_parameters: numbers in the LoRA matrices.
        prompt_tokens: of the longest prompt, visual tokens included.
        visual_tokens: of them.
        frame_tokens: visual tokens of one temporal row of a clip.
        group_size: completions of a prompt.
        completion_tokens: the most tokens of a completion.
        checkpoint: layers are computed again in the backward pass.
        beta: weight of the KL divergence.
        itemsize: bytes of a number that the model computes with.
        keys: last names of the modules with LoRA.
        quantized: the language model's weights are packed.
        accumulate: gradients of several groups are summed.
        rows: prompts of a step, over all ranks; their visual features are kept from sampling to learning.
        ranks: that share them.
        keep_reference: the reference policy has an adapter of its own, kept beside the trained one.
        prefill_step: prompt tokens that go through the model at once.
        backend: "cpu", "metal" or "cuda".
        samples_only: completions are sampled, and nothing is learned from them.
    """

    config: Mapping[str, Any]
    weight_bytes: int
    adapter_parameters: int
    prompt_tokens: int
    visual_tokens: int
    frame_tokens: int = 256
    group_size: int
    completion_tokens: int
    checkpoint: bool
    beta: float
    itemsize: int
    keys: tuple[str, ...] = PROJECTIONS
    quantized: bool = False
    accumulate: bool = True
    rows: int = 1
    ranks: int = 1
    keep_reference: bool = False
    prefill_step: int = 2048
    backend: str = "metal"
    samples_only: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a training step needs.

    Attributes:
        workload: what was asked.
        weights: of the model, quantized or not.
        adapters: the LoRA matrices; twice when the reference policy has its own.
        optimizer: AdamW's two moments, and the sum of the gradients.
        features: what the vision tower made of the prompts of a step.
        vision: the vision tower's pass.
        cache: keys and values of the prompt and all completions.
        prefill: reading the prompt, its cache aside.
        decode: one step of all completions, their cache aside.
        kept: what the gradient pass keeps of all layers until it comes back to them.
        layer: what one layer's backward pass holds beside that.
        attention: of `layer`: attention scores.
        head: logits and their gradients.
        reference: the forward pass of the reference policy, where `beta` asks for one.
        update: new weights and moments before the old ones are gone.
    """

    workload: Workload
    weights: int
    adapters: int
    optimizer: int
    features: int
    vision: int
    cache: int
    prefill: int
    decode: int
    kept: int
    layer: int
    attention: int
    head: int
    reference: int
    update: int

    @property
    def rollout(self) -> int:
        """Bytes of the rollout: vision tower first, then prefill or decoding beside the cache."""
        return max(self.vision, self.cache + max(self.prefill, self.decode))

    @property
    def gradient(self) -> int:
        """Bytes of the gradient pass, or of the reference policy's if that is more."""
        return max(self.kept + max(self.layer, self.head), self.reference)

    @property
    def peak(self) -> int:
        """The most bytes at any time."""
        return self.resident + max(self.rollout, self.gradient, self.update)

    @property
    def resident(self) -> int:
        """Bytes that stay all the time."""
        return self.weights + self.adapters + self.optimizer + self.features

    def describe(self) -> str:
        """What needs how much, in lines, and what the peak is made of."""
        rows = [
            ("weights", self.weights, "of the model"),
            ("adapters", self.adapters, "LoRA, float32"),
            ("optimizer", self.optimizer, "two moments and the gradient"),
            ("visual features", self.features, self._of_prompts()),
            ("rollout", self.rollout, self._rollout_parts()),
            ("gradient pass", self.gradient, self._gradient_parts()),
            ("update", self.update, "new weights and moments beside the old"),
        ]
        lines = [f"{name:<16}{_gb(size):>9}  {what}" for name, size, what in rows if size]
        lines.append(f"{'peak':<16}{_gb(self.peak):>9}  mostly {self._dominant()}")
        return "\n".join(lines)

    def alternatives(self) -> list[tuple[str, "MemoryEstimate"]]:
        """Settings that need clearly less, the one that saves most first: (what to write, what that needs)."""
        work = self.workload
        changes: list[tuple[str, Workload]] = []
        if not work.checkpoint and not work.samples_only:
            changes.append(("--gradient-checkpointing", replace(work, checkpoint=True)))
        if work.group_size > 2:
            half = work.group_size // 2
            name = "--filter-samples" if work.samples_only else "--group-size"
            changes.append((f"{name} {half}", replace(work, group_size=half)))
        if work.completion_tokens > 64:
            half = work.completion_tokens // 2
            changes.append((f"--max-completion-tokens {half}", replace(work, completion_tokens=half)))
        if work.visual_tokens > 128:
            half = work.visual_tokens // 2
            fewer = replace(work, prompt_tokens=work.prompt_tokens - work.visual_tokens + half, visual_tokens=half)
            changes.append((f"--video-tokens {half}", fewer))
        if work.rows > 1:
            half = work.rows // 2
            changes.append((f"--batch-size {half}", replace(work, rows=half)))
        rank = round(work.adapter_parameters / _parameters_per_rank(work)) if work.keys else 0
        if rank > 4 and not work.samples_only:
            smaller = replace(work, adapter_parameters=work.adapter_parameters // rank * (rank // 2))
            changes.append((f"--rank {rank // 2}", smaller))
        packed, other = _matrices(work.config)
        if work.weight_bytes > packed + 2 * other:  # more than a byte for each number of the language model
            changes.append(("weights of 4 bits", replace(work, weight_bytes=packed * 9 // 16 + 2 * other)))
        options = [(flag, _estimate(changed)) for flag, changed in changes]
        return sorted(
            (option for option in options if option[1].peak < 0.995 * self.peak), key=lambda option: option[1].peak
        )

    def refuse_over(self, limit_bytes: int) -> None:
        """Raise `OutOfMemoryError` when the peak is above a limit; the message says what to lower, and to what end."""
        if self.peak <= limit_bytes:
            return
        options = [f"{flag} ({_gb(other.peak)})" for flag, other in self.alternatives()]
        lower = f"; what would lower it, most first: {', '.join(options)}" if options else ""
        work = "sampling" if self.workload.samples_only else "training"
        raise OutOfMemoryError(
            f"{work} needs about {_gb(self.peak)}, mostly {self._dominant()}; {_gb(limit_bytes)} are allowed{lower}"
        )

    def _of_prompts(self) -> str:
        count = math.ceil(self.workload.rows / self.workload.ranks)
        return "of the prompt" if count == 1 else f"of the {count} prompts of a step"

    def _rollout_parts(self) -> str:
        parts = {"vision tower": self.vision, "cache": self.cache, "prefill": self.prefill, "decoding": self.decode}
        return _listed(parts)

    def _gradient_parts(self) -> str:
        parts = {"kept of all layers": self.kept, "one layer": self.layer, "logits": self.head}
        return _listed(parts) + (f" (attention scores {_gb(self.attention)})" if self.attention else "")

    def _dominant(self) -> str:
        """The largest single part of the peak."""
        passes = {"rollout": self.rollout, "gradient": self.gradient, "update": self.update}
        name = max(passes, key=lambda key: passes[key])
        parts = {
            "the weights": self.weights,
            "the adapters and their optimizer": self.adapters + self.optimizer,
            "the visual features": self.features,
        }
        if name == "rollout":
            parts |= {"the vision tower": self.vision} if self.rollout == self.vision else {"the cache": self.cache}
            parts |= {"the prefill": self.prefill} if self.rollout != self.vision else {}
        elif name == "gradient":
            kept = "what layers keep for the backward pass" if not self.workload.checkpoint else "the layers' inputs"
            parts |= {kept: self.kept, "one layer's backward pass": self.layer, "the logits": self.head}
            parts.pop("the logits" if self.layer >= self.head else "one layer's backward pass")
        return max(parts, key=lambda key: parts[key])


def estimate(
    model_config: Mapping[str, Any],
    *,
    weight_bytes: int,
    adapter_parameters: int,
    prompt_tokens: int,
    visual_tokens: int,
    group_size: int,
    completion_tokens: int,
    checkpoint: bool,
    beta: float = 0.0,
    itemsize: int = 2,
    keys: Collection[str] = PROJECTIONS,
    **more: Any,
) -> MemoryEstimate:
    """Work out what a training step needs at most.

    Args:
        model_config: `VideoModel.config`.
        weight_bytes: of the model without adapters.
        adapter_parameters: numbers in the LoRA matrices.
        prompt_tokens: of the longest prompt, visual tokens included.
        visual_tokens: of them.
        group_size: completions of a prompt.
        completion_tokens: the most tokens of a completion.
        checkpoint: layers are computed again in the backward pass.
        beta: weight of the KL divergence.
        itemsize: bytes of a number that the model computes with.
        keys: last names of the modules with LoRA.
        **more: other attributes of `Workload`.
    """
    return _estimate(
        Workload(
            config=model_config,
            weight_bytes=weight_bytes,
            adapter_parameters=adapter_parameters,
            prompt_tokens=prompt_tokens,
            visual_tokens=visual_tokens,
            group_size=group_size,
            completion_tokens=completion_tokens,
            checkpoint=checkpoint,
            beta=beta,
            itemsize=itemsize,
            keys=tuple(keys),
            **more,
        )
    )


def estimate_training(
    model: VideoModel,
    *,
    prompt_tokens: int,
    visual_tokens: int,
    group_size: int,
    completion_tokens: int,
    checkpoint: bool,
    beta: float = 0.0,
    **more: Any,
) -> MemoryEstimate:
    """`estimate` for a loaded model with adapters: weights, adapters, dtype and backend are the model's own."""
    adapters = lora_weights(model)
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.network.parameters())  # type: ignore[assignment]
    known = {
        "weight_bytes": sum(array.nbytes for _, array in parameters) - sum(array.nbytes for array in adapters.values()),
        "adapter_parameters": sum(array.size for array in adapters.values()),
        "itemsize": model.layers[0].input_layernorm.weight.dtype.size,
        "keys": sorted({name.rpartition(".")[2] for name in find_layers(model.network)}),
        "quantized": any(name.endswith(".scales") for name, _ in parameters),
        "backend": backend(),
    }
    return estimate(
        model.config,
        prompt_tokens=prompt_tokens,
        visual_tokens=visual_tokens,
        group_size=group_size,
        completion_tokens=completion_tokens,
        checkpoint=checkpoint,
        beta=beta,
        **{**known, **more},
    )


@dataclass(frozen=True)
class _Sizes:
    """Numbers a token has in each array of the language model."""

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    heads: int
    head_norms: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_Sizes":
        text = config["text_config"]
        heads = int(text["num_attention_heads"])
        family = family_of(config)
        head_dim = family.head_dim(config)
        return cls(
            layers=int(text["num_hidden_layers"]),
            hidden=int(text["hidden_size"]),
            queries=heads * head_dim,
            keys=int(text["num_key_value_heads"]) * head_dim,
            inner=int(text["intermediate_size"]),
            vocabulary=int(text["vocab_size"]),
            heads=heads,
            head_norms=family.has_head_norms,
        )

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the modules that LoRA goes around."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }


def _estimate(work: Workload) -> MemoryEstimate:
    sizes = _Sizes.of(work.config)
    adapters = work.adapter_parameters * _LORA
    levels = len(family_of(work.config).deepstack_layers(work.config))
    kept, layer, attention = _layers_pass(work, sizes, levels)
    head = _head_pass(work, sizes)
    learned = 0 if work.samples_only else 1
    return MemoryEstimate(
        workload=work,
        weights=work.weight_bytes,
        adapters=adapters * (2 if work.keep_reference else 1),
        optimizer=learned * adapters * (3 if work.accumulate else 2),
        features=math.ceil(work.rows / work.ranks) * work.visual_tokens * sizes.hidden * (1 + levels) * work.itemsize,
        vision=_vision_pass(work),
        cache=_cache(work, sizes),
        prefill=_prefill_pass(work, sizes),
        decode=_decode_pass(work, sizes),
        kept=learned * kept,
        layer=learned * layer,
        attention=learned * attention,
        head=learned * head,
        reference=learned * (head + _columns(work) * sizes.hidden * work.itemsize) if work.beta > 0.0 else 0,
        update=learned * 3 * adapters,
    )


def _layers_pass(work: Workload, sizes: _Sizes, levels: int) -> tuple[int, int, int]:
    """What is kept of all layers, what the backward pass of one needs beside it, and the attention scores in that.

    Attention keeps what goes into it and is computed again. Without checkpoints the last layer's backward pass comes
    when everything is kept. With them, a layer keeps its input, and gradients come as inputs go: the larger of the two
    ends counts.
    """
    tokens = _columns(work)
    scores = 0 if work.backend == "cuda" else 6 * _largest_block(work, sizes.heads) * sizes.heads * work.itemsize
    whole = tokens * _kept_by_token(work, sizes)
    hidden = tokens * sizes.hidden * work.itemsize
    gradients = work.adapter_parameters * _LORA
    unpacked = _unpacked(work, sizes.inner * sizes.hidden, _IN_LINE)
    backward = tokens * _backward_by_token(work, sizes)
    attention = scores + tokens * (4 * sizes.queries * work.itemsize + 8 * sizes.keys * 4)
    if not work.checkpoint:
        return sizes.layers * whole + levels * hidden, max(backward, attention) + unpacked, scores
    inputs = (sizes.layers + levels) * hidden
    again = whole - hidden + max(backward + tokens * _forward_by_token(work, sizes), attention)
    return max(inputs, gradients + hidden), again + unpacked, scores


def _kept_by_token(work: Workload, sizes: _Sizes) -> int:
    """Bytes that a layer keeps of a token until its backward pass.

    - its input and the sum after attention, for the two norms: 2 hidden
    - what goes into the modules with LoRA, for the gradient of their matrices: once each distinct array where it is
      float32 already, else a float32 copy for each module
    - queries and keys before the heads' norms, where there are any
    - queries, keys and values as attention takes them
    - gate, up, sigmoid(gate), and the product of gate and sigmoid: 4 inner
    - the short products of LoRA: the rank for each module
    """
    item = work.itemsize
    numbers = 2 * sizes.hidden + sizes.queries + 2 * sizes.keys + 4 * sizes.inner
    if sizes.head_norms:
        numbers += sizes.queries + sizes.keys
    return numbers * item + _lora_inputs(work, sizes) + _rank(work) * len(work.keys) * _LORA


def _lora_inputs(work: Workload, sizes: _Sizes) -> int:
    shapes = sizes.shapes()
    if work.itemsize < _LORA:
        return sum(shapes[key][0] for key in work.keys) * _LORA
    together = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    return sum(shapes[names[0]][0] for names in together if set(names) & set(work.keys)) * work.itemsize


def _backward_by_token(work: Workload, sizes: _Sizes) -> int:
    """Bytes that the backward pass of the MLP and its norm makes of a token, nothing given back yet.

    Of the width of the MLP: the gradients of the product, of gate, up and sigmoid, and two steps to that of sigmoid. Of
    the hidden width: what gate and up send back, by weight and by LoRA, and five of the norm.
    """
    item = work.itemsize
    adapted = len({"gate_proj", "up_proj"} & set(work.keys))
    cast = 0 if item == _LORA else _LORA + item
    return 6 * sizes.inner * item + sizes.hidden * (7 * item + adapted * (_LORA + cast))


def _forward_by_token(work: Workload, sizes: _Sizes) -> int:
    """Bytes that a layer's forward pass makes of a token beside what it keeps, nothing given back yet.

    Of each module with LoRA: what the weight gives, what LoRA gives, and that again scaled.
    """
    shapes = sizes.shapes()
    return sum(shapes[key][1] for key in work.keys) * (work.itemsize + 2 * _LORA)


def _largest_block(work: Workload, heads: int) -> int:
    """Attention scores of a head in the largest block.

    The prompt goes in blocks of queries, which see what came before; short completions share a block.
    """
    prompt, own = work.prompt_tokens, work.completion_tokens - 1
    size = max(1, min(QUERIES_AT_ONCE, SCORES_AT_ONCE // (heads * (prompt + max(own, 1)))))
    block = min(size, prompt) * prompt
    if own * 2 > size:  # each completion alone
        return max(block, min(size, own) * (prompt + own))
    together = min(work.group_size, size // own) if own > 0 else 0
    return max(block, together * own * (prompt + together * own))


def _head_pass(work: Workload, sizes: _Sizes) -> int:
    """Bytes of the logits: two float32 arrays of a chunk, and a third where four chunks or more take turns.

    What the last layer's forward pass made has not been given back yet.
    """
    targets = work.group_size * work.completion_tokens
    chunk = min(targets, max(1, LOGITS_AT_ONCE // sizes.vocabulary))
    chunks = math.ceil(targets / chunk)
    arrays = (2 if chunks < 4 else 3) * _LORA + (0 if work.itemsize == _LORA else work.itemsize)
    unpacked = _unpacked(work, sizes.vocabulary * sizes.hidden, chunks)
    return chunk * sizes.vocabulary * arrays + _columns(work) * _forward_by_token(work, sizes) + unpacked


def _unpacked(work: Workload, numbers: int, products: int) -> int:
    """Bytes of packed weights that CUDA unpacks for a product of many rows, which ten products in line hold."""
    if work.backend != "cuda" or not work.quantized:
        return 0
    return min(products, _IN_LINE) * numbers * work.itemsize


def _columns(work: Workload) -> int:
    """Length of the packed sequence."""
    return work.prompt_tokens + work.group_size * (work.completion_tokens - 1)


def _cache(work: Workload, sizes: _Sizes) -> int:
    """Bytes of keys and values of a group's tree; the layer that grows has its old arrays too."""
    tokens = work.prompt_tokens + work.group_size * work.completion_tokens
    tokens = math.ceil(tokens / CACHE_STEP) * CACHE_STEP
    return (sizes.layers + 1) * tokens * 2 * sizes.keys * work.itemsize


def _prefill_pass(work: Workload, sizes: _Sizes) -> int:
    """Bytes of a step of the prompt in a layer's MLP, nothing given back yet; and attention scores where not fused.

    Gate, up, sigmoid and product, what LoRA adds to gate and up; the residual, its norm, and what comes back.
    """
    step = min(work.prompt_tokens, work.prefill_step)
    adapted = len({"gate_proj", "up_proj"} & set(work.keys))
    mlp = sizes.inner * (4 * work.itemsize + adapted * _LORA) + 7 * sizes.hidden * work.itemsize
    whole, rest = divmod(work.prompt_tokens, step)
    seen = max(step * whole * step, rest * work.prompt_tokens)
    scores = sizes.heads * seen * work.itemsize if work.backend == "cpu" else 0
    return step * mlp + scores


def _decode_pass(work: Workload, sizes: _Sizes) -> int:
    """Bytes of a step of all completions: logits, and what is drawn from them."""
    seen = work.prompt_tokens + work.group_size * work.completion_tokens
    scores = 2 * sizes.heads * work.group_size * seen * work.itemsize
    return 6 * work.group_size * sizes.vocabulary * _LORA + scores


def _vision_pass(work: Workload) -> int:
    """Bytes of the vision tower over as many rows of a clip as go at once.

    The pixels, and the larger part of a layer. Attention: its input, the norm's output, queries, keys and values, five
    float32 arrays for rotating queries and keys each, and scores where not fused. The MLP: as in the language model.
    """
    vision = work.config["vision_config"]
    if work.visual_tokens == 0:
        return 0
    width, inner, heads = int(vision["hidden_size"]), int(vision["intermediate_size"]), int(vision["num_heads"])
    merge = int(vision["spatial_merge_size"]) ** 2
    frame = min(work.frame_tokens, work.visual_tokens) * merge
    rows = max(1, min(PATCHES_AT_ONCE // frame, VISION_SCORES_AT_ONCE // (heads * frame**2)))
    patches = min(rows * frame, work.visual_tokens * merge)
    values = 3 * int(vision["temporal_patch_size"]) * int(vision["patch_size"]) ** 2
    scores = min(heads * frame, VISION_SCORES_AT_ONCE // patches) * work.itemsize if work.backend == "cpu" else 0
    attention = width * (5 * work.itemsize + 10 * 4) + scores
    mlp = width * 4 * work.itemsize + inner * 5 * work.itemsize
    return patches * (values * (4 + work.itemsize) + max(attention, mlp))


def _rank(work: Workload) -> int:
    return round(work.adapter_parameters / max(1, _parameters_per_rank(work)))


def _parameters_per_rank(work: Workload) -> int:
    sizes = _Sizes.of(work.config)
    shapes = sizes.shapes()
    return sizes.layers * sum(sum(shapes[key]) for key in work.keys)


def _matrices(config: Mapping[str, Any]) -> tuple[int, int]:
    """How many numbers are in the language model's matrices, which can be quantized, and how many elsewhere."""
    shapes = family_of(config).expected_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values())
    packed = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("language_model.") and shape[1:])
    return packed, total - packed


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
