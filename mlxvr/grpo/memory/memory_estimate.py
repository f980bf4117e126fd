"""How much memory a training step needs, worked out before it starts.

Pure arithmetic from the model's settings: no array is made. The passes of a step follow each other (vision tower,
prefill, decoding, the gradient's head, the gradient's layers, the optimizer), so the peak is what always stays plus the
largest of them. `passes` has the bytes of each.

`mx.set_memory_limit` makes MLX queue less: with a limit below what is needed, the same passes took up to 40% less on a
CPU.

Measured against `mx.get_peak_memory` on MLX's CPU backend (0.32.4), random models of both families, float32 and 4 bits,
prompts of 400 to 2,800 tokens, groups of 4 to 16, completions of 24 to 300: what a gradient pass takes beyond the
weights is estimated at 0.95 to 1.09 of the measured peak (8 shapes, with and without checkpoints), rollouts at 1.00 to
1.19 (7), vision towers at 0.88 to 0.97 (4). On an NVIDIA GPU through MLX's CUDA backend the gradient of Qwen3-VL-8B at
4 bits, rank 16, with checkpoints is estimated at 1.06 to 1.19 of the measured peak (3 shapes); its term for unpacked
weights was inferred from these. Without checkpoints it was not measured there since attention is computed again. Metal
was not measured at all: attention is assumed to be fused in the forward pass and not in training.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlxvr.errors import OutOfMemoryError
from mlxvr.grpo.memory.passes import (
    LORA_ITEMSIZE,
    decode_pass,
    group_cache,
    head_pass,
    layers_pass,
    prefill_pass,
    vision_pass,
)
from mlxvr.grpo.memory.workload import LayerSizes, Workload, count_weights
from mlxvr.model.families.base import family_of

__all__ = ["MemoryEstimate", "estimate"]


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a training step needs.

    Attributes:
        workload: what the estimate is for.
        weights: the model's weights, quantized or not.
        adapters: the LoRA matrices; twice when the reference policy has its own.
        optimizer: AdamW's two moments, and the sum of the gradients.
        features: the visual features of the prompts of a step.
        vision: the vision tower's pass.
        cache: keys and values of the prompt and all completions.
        prefill: reading the prompt, without its cache.
        decode: one step of all completions, without their cache.
        saved: what the gradient pass keeps of all layers until their backward pass.
        layer: what the backward pass of one layer holds beside that.
        attention: the attention scores, which are part of `layer`.
        head: logits and their gradients.
        reference: the forward pass of the reference policy, if `beta` is positive.
        update: new weights and moments before the old ones are freed.
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
    saved: int
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
        """Bytes of the gradient pass, or of the reference policy's pass if that takes more."""
        return max(self.saved + max(self.layer, self.head), self.reference)

    @property
    def peak(self) -> int:
        """The most bytes at any time."""
        return self.resident + max(self.rollout, self.gradient, self.update)

    @property
    def resident(self) -> int:
        """Bytes that stay all the time."""
        return self.weights + self.adapters + self.optimizer + self.features

    def describe(self) -> str:
        """A line for each part with its size, and one for the peak with its largest part."""
        rows = [
            ("weights", self.weights, "of the model"),
            ("adapters", self.adapters, "LoRA, float32"),
            ("optimizer", self.optimizer, "two moments and the gradient"),
            ("visual features", self.features, self._of_prompts()),
            ("rollout", self.rollout, self._rollout_parts()),
            ("gradient pass", self.gradient, self._gradient_parts()),
            ("update", self.update, "new weights and moments beside the old"),
        ]
        lines = [f"{name:<16}{_gb(size):>9}  {details}" for name, size, details in rows if size]
        lines.append(f"{'peak':<16}{_gb(self.peak):>9}  mostly {self._dominant()}")
        return "\n".join(lines)

    def alternatives(self) -> list[tuple[str, "MemoryEstimate"]]:
        """Settings that need clearly less, the one that saves most first: (the flag to write, its estimate)."""
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
        rank = work.rank if work.target_modules else 0
        if rank > 4 and not work.samples_only:
            smaller = replace(work, adapter_parameters=work.adapter_parameters // rank * (rank // 2))
            changes.append((f"--rank {rank // 2}", smaller))
        packable, remaining = count_weights(work.config)
        if work.weight_bytes > packable + 2 * remaining:  # more than a byte for each number of the language model
            changes.append(("weights of 4 bits", replace(work, weight_bytes=packable * 9 // 16 + 2 * remaining)))
        options = [(flag, estimate(changed)) for flag, changed in changes]
        return sorted(
            (option for option in options if option[1].peak < 0.995 * self.peak), key=lambda option: option[1].peak
        )

    def refuse_over(self, limit_bytes: int) -> None:
        """Raise `OutOfMemoryError` when the peak is above a limit; the message names what to lower, and its effect."""
        if self.peak <= limit_bytes:
            return
        options = [f"{flag} ({_gb(option.peak)})" for flag, option in self.alternatives()]
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
        parts = {"kept of all layers": self.saved, "one layer": self.layer, "logits": self.head}
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
            saved = "what layers keep for the backward pass" if not self.workload.checkpoint else "the layers' inputs"
            parts |= {saved: self.saved, "one layer's backward pass": self.layer, "the logits": self.head}
            parts.pop("the logits" if self.layer >= self.head else "one layer's backward pass")
        return max(parts, key=lambda key: parts[key])


def estimate(work: Workload) -> MemoryEstimate:
    """Work out what a training step needs at most."""
    sizes = LayerSizes.of(work.config)
    adapters = work.adapter_parameters * LORA_ITEMSIZE
    levels = len(family_of(work.config).deepstack_layers(work.config))
    saved, layer, attention = layers_pass(work, sizes, levels)
    head = head_pass(work, sizes)
    learned = 0 if work.samples_only else 1
    return MemoryEstimate(
        workload=work,
        weights=work.weight_bytes,
        adapters=adapters * (2 if work.keep_reference else 1),
        optimizer=learned * adapters * (3 if work.accumulate else 2),
        features=math.ceil(work.rows / work.ranks) * work.visual_tokens * sizes.hidden * (1 + levels) * work.itemsize,
        vision=vision_pass(work),
        cache=group_cache(work, sizes),
        prefill=prefill_pass(work, sizes),
        decode=decode_pass(work, sizes),
        saved=learned * saved,
        layer=learned * layer,
        attention=learned * attention,
        head=learned * head,
        reference=learned * (head + work.columns * sizes.hidden * work.itemsize) if work.beta > 0.0 else 0,
        update=learned * 3 * adapters,
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
