"""Layouts of an adapter's weights on disk: PEFT's and the two of MLX, all read into `AdapterLayer`s.

    PEFT      `adapter_model.safetensors`: `base_model.model.<module>.lora_A.weight` (rank, inputs) and `.lora_B.weight`
              (outputs, rank), with `lora_magnitude_vector` for DoRA; scale alpha / rank, or alpha / sqrt(rank) for
              rsLoRA (arXiv 2312.03732); `alpha_pattern` may set a module's own alpha
    mlx-vlm   `adapters.safetensors`: `<module>.lora_a` (inputs, rank), `.lora_b` (rank, outputs) and `.m`, one scale
    mlx-lm    the same parts; modules named from a text model (`model.layers.3..`), keys from a layer

The names of the tensors say which modules are adapted: a PEFT config names them by a list, a regular expression or
"all-linear", and PEFT resolved each of these to tensor names. Module names are those of the network in memory, which
changed in transformers 4.52 (`model.layers.0` became `model.language_model.layers.0`); both are mapped to MLX's.

A setting that MLX's LoRA layers cannot express, or that is unknown here, is an error that names it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxvr.checkpoint.safetensors import TensorInfo
from mlxvr.errors import CheckpointError
from mlxvr.model.families.base import mlx_name

__all__ = ["AdapterLayer", "read_mlx", "read_peft"]

_PEFT_PARTS = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}
_PEFT_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?P<end>(\.[^.]+){0,2})"
)
# Settings about how the adapter was made or trained, not about what it computes.
_NEUTRAL = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode"),
        *("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_type", "peft_version"),
        *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # settings of initialisations, see below
    }
)
_READ = frozenset({"alpha_pattern", "init_lora_weights", "lora_alpha", "r", "rank_pattern", "use_dora", "use_rslora"})
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that subtract from the weights
_TREES = (("language_model.layers.", "language_model.model.layers."), ("layers.", "language_model.model.layers."))


@dataclass(frozen=True)
class AdapterLayer:
    """The adapter's layer of one linear module.

    Attributes:
        rank: LoRA rank.
        scale: factor of the two matrices' product.
        parts: "lora_a", "lora_b" and, with DoRA, "m" -> the tensor's name on disk. A part may be missing.
    """

    rank: int
    scale: float
    parts: Mapping[str, str]


def read_peft(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], folder: Path) -> dict[str, AdapterLayer]:
    """Read a PEFT adapter: MLX path of each adapted module -> its layer.

    Raises `CheckpointError` for a setting or tensor that MLX's layers cannot express, and for a missing part.
    """
    _refuse_settings(config, folder)
    parts: dict[str, dict[str, str]] = {}
    for name in tensors:
        if name.endswith(".base_layer.weight"):
            continue  # PEFT adds a copy of the frozen weight where the output head is adapted
        match = _PEFT_TENSOR.fullmatch(name)
        if match is None or (match["end"] not in ("", ".weight") and not _is_named(match["end"], match["part"])):
            raise CheckpointError(
                f"the adapter {folder} holds {name}, which is no LoRA matrix of a linear module: merge the adapter "
                "with PEFT (merge_and_unload), and convert the merged model"
            )
        own = parts.setdefault(match["module"], {})
        if own.setdefault(_PEFT_PARTS[match["part"]], name) != name:
            raise CheckpointError(
                f"the adapter {folder} holds {match['part']} of {match['module']} twice: save only one adapter in it"
            )
    needed = ("lora_a", "lora_b", "m") if config.get("use_dora") else ("lora_a", "lora_b")
    layers: dict[str, AdapterLayer] = {}
    for module, own in parts.items():
        if missing := [part for part in needed if part not in own]:
            raise CheckpointError(f"the adapter {folder} lacks the {missing[0]} of {module}: copy it again")
        shape = tensors[own["lora_a"]].shape
        if len(shape) != 2 or not shape[0]:
            raise CheckpointError(
                f"the adapter {folder} adapts {module}, which is no linear module: leave it out of target_modules, or "
                "merge the adapter with PEFT"
            )
        layers[_mlx_module(module)] = AdapterLayer(shape[0], _peft_scale(config, module, shape[0], folder), own)
    return layers


def read_mlx(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], folder: Path) -> dict[str, AdapterLayer]:
    """Read an adapter of mlx-vlm, mlx-lm or mlxvr: MLX path of each adapted module -> its layer.

    Raises `CheckpointError` when the config has no scale.
    """
    scale = config["lora_parameters"].get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise CheckpointError(f"{folder / 'adapter_config.json'} has no number as scale: copy it again")
    parts: dict[str, dict[str, str]] = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = name
    return {
        _mlx_module(module): AdapterLayer(tensors[own["lora_a"]].shape[-1] if "lora_a" in own else 0, float(scale), own)
        for module, own in parts.items()
    }


def _mlx_module(name: str) -> str:
    """A module's MLX path, from its path in the network of any transformers release."""
    for tree, mlx_tree in _TREES:
        if name.startswith(tree):
            return mlx_tree + name[len(tree) :]
    return mlx_name(f"{name}.weight").removesuffix(".weight")


def _is_named(end: str, part: str) -> bool:
    """Whether the end of a tensor's name contains an adapter's name: `.default.weight`, or `.default` for a vector."""
    words = end[1:].split(".")
    if words[-1] == "bias":
        return False
    return (len(words) == 2 and words[1] == "weight") or (part == "lora_magnitude_vector" and len(words) == 1)


def _peft_scale(config: Mapping[str, Any], module: str, rank: int, folder: Path) -> float:
    alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8), folder)
    stated = _of_module(config.get("rank_pattern"), module, config.get("r", 8), folder)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(f"{folder / 'adapter_config.json'} has no number as lora_alpha: copy it again")
    if stated != rank:
        raise CheckpointError(
            f"the adapter {folder}: the matrices of {module} have rank {rank}, but adapter_config.json says {stated}: "
            "the files do not belong together"
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(patterns: Mapping[str, Any] | None, module: str, default: Any, folder: Path) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in PEFT's lookup."""
    try:
        return next(
            (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), default
        )
    except (AttributeError, re.error) as error:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'} has patterns that cannot be read ({error}): expected regular "
            "expressions and their values in rank_pattern and alpha_pattern"
        ) from error


def _refuse_settings(config: Mapping[str, Any], folder: Path) -> None:
    file = folder / "adapter_config.json"
    merge = "merge the adapter with PEFT (merge_and_unload), and convert the merged model"
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file} describes a {config.get('peft_type')} adapter; only LORA is implemented: {merge}"
        )
    method = config.get("init_lora_weights")
    if isinstance(method, str) and method.lower().startswith(_CHANGES_THE_BASE):
        raise CheckpointError(
            f"{file} says init_lora_weights {method!r}, which also changed the model's own weights: save it with "
            "path_initial_model_for_weight_conversion, or merge it with PEFT"
        )
    for key in sorted(config.keys() - _NEUTRAL - _READ):
        if config[key] and not (key == "bias" and config[key] == "none"):
            raise CheckpointError(f"{file} sets {key} to {config[key]!r}, which is not implemented: {merge}")
