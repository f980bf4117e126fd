"""What a memory estimate is made from: the work of a training step, and the sizes of the model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxvr.grpo.step.lora import lora_weights
from mlxvr.grpo.step.lora_config import PROJECTIONS
from mlxvr.model.adapter import find_layers
from mlxvr.model.families.base import family_of
from mlxvr.model.network import VideoModel
from mlxvr.runtime.device_memory import backend

__all__ = ["LayerSizes", "Workload", "count_weights", "workload_of"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of a training step; sizes in tokens or bytes.

    Attributes:
        config: `VideoModel.config`.
        weight_bytes: bytes of the model without adapters.
        adapter_parameters: numbers in the LoRA matrices.
        prompt_tokens: of the longest prompt, visual tokens included.
        visual_tokens: the visual tokens among them.
        frame_tokens: visual tokens of one temporal patch of a clip.
        group_size: completions of a prompt.
        completion_tokens: the most tokens of a completion.
        checkpoint: whether layers are computed again in the backward pass.
        beta: KL coefficient; at 0 there is no pass of the reference policy.
        itemsize: bytes of a number in the dtype that the model computes in.
        target_modules: last names of the modules with LoRA.
        quantized: whether the language model's weights are packed.
        accumulate: whether gradients of several groups are summed.
        rows: prompts of a step, over all ranks; their visual features are kept from sampling to learning.
        ranks: processes that share the rows.
        keep_reference: whether the reference policy has an adapter of its own, kept beside the trained one.
        prefill_step: prompt tokens of a forward pass.
        backend: "cpu", "metal" or "cuda".
        samples_only: whether completions are only sampled, and nothing is learned from them.
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
    beta: float = 0.0
    itemsize: int = 2
    target_modules: tuple[str, ...] = PROJECTIONS
    quantized: bool = False
    accumulate: bool = True
    rows: int = 1
    ranks: int = 1
    keep_reference: bool = False
    prefill_step: int = 2048
    backend: str = "metal"
    samples_only: bool = False

    @property
    def columns(self) -> int:
        """Length of the packed sequence."""
        return self.prompt_tokens + self.group_size * (self.completion_tokens - 1)

    @property
    def rank(self) -> int:
        """The LoRA rank."""
        return round(self.adapter_parameters / max(1, self.parameters_per_rank))

    @property
    def parameters_per_rank(self) -> int:
        """Numbers in the LoRA matrices of a rank of 1."""
        sizes = LayerSizes.of(self.config)
        shapes = sizes.shapes()
        return sizes.layers * sum(sum(shapes[module]) for module in self.target_modules)

    @property
    def gate_and_up_adapted(self) -> int:
        """How many of the MLP's two input projections have LoRA."""
        return len({"gate_proj", "up_proj"} & set(self.target_modules))


@dataclass(frozen=True)
class LayerSizes:
    """How many numbers a token has in each array of a layer of the language model."""

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    heads: int
    head_norms: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LayerSizes":
        """Read the sizes from `VideoModel.config`."""
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
        """(inputs, outputs) of the modules that can have LoRA."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }


def workload_of(model: VideoModel, **sizes: Any) -> Workload:
    """The workload of a loaded model with adapters.

    Args:
        model: its weights, adapters, dtype and backend are read.
        **sizes: the attributes of `Workload` that the model does not know; they win over what was read.
    """
    adapters = lora_weights(model)
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.network.parameters())  # type: ignore[assignment]
    known: dict[str, Any] = {
        "weight_bytes": sum(array.nbytes for _, array in parameters) - sum(array.nbytes for array in adapters.values()),
        "adapter_parameters": sum(array.size for array in adapters.values()),
        "itemsize": model.layers[0].input_layernorm.weight.dtype.size,
        "target_modules": tuple(sorted({name.rpartition(".")[2] for name in find_layers(model.network)})),
        "quantized": any(name.endswith(".scales") for name, _ in parameters),
        "backend": backend(),
    }
    return Workload(**{"config": model.config, **known, **sizes})


def count_weights(config: Mapping[str, Any]) -> tuple[int, int]:
    """How many numbers are in the language model's matrices, which can be quantized, and how many are elsewhere."""
    shapes = family_of(config).expected_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values())
    packed = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("language_model.") and shape[1:])
    return packed, total - packed
