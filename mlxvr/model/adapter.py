"""LoRA weights on top of a loaded network.

An adapter folder has mlx-vlm 0.7.10's layout: `adapters.safetensors`, whose tensors are `<module>.lora_a` and
`<module>.lora_b` (and `.m` for DoRA), and `adapter_config.json` with `lora_parameters` {"rank", "scale", "dropout",
"keys"}. mlx-vlm's own function puts the layers in, but then loads the weights without looking: a folder made for
another model would leave them untrained and say nothing. So names and shapes are compared here. It also builds DoRA
layers of the wrong width around weights of 3, 5 or 6 bits; `add_layers` builds them right.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxvr.errors import CheckpointError
from mlxvr.model.safetensors import TensorInfo, read_header

__all__ = ["LORA_PARTS", "Adapter", "add_layers", "apply_adapter", "find_layers", "swap_modules"]

LORA_PARTS = ("lora_a", "lora_b", "m")

_LORA_ENDINGS = (".lora_a", ".lora_b", ".m", ".A", ".B")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose files are there and readable; whether it fits a model is not known yet.

    Attributes:
        folder: where it lies.
        config: `adapter_config.json`.
        tensors: what `adapters.safetensors` holds.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> "Adapter":
        """Read config and header; raises `CheckpointError` when a file is missing, damaged or of another kind."""
        weights, config_file = folder / "adapters.safetensors", folder / "adapter_config.json"
        for file in (weights, config_file):
            if not file.is_file():
                raise CheckpointError(
                    f"{folder} has no {file.name}: give the folder of an adapter, with adapters.safetensors and "
                    "adapter_config.json"
                )
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{config_file} cannot be read as JSON ({error}): copy the adapter again") from error
        tensors = read_header(weights)
        _check_config(config, config_file)
        return cls(folder, config, tensors)

    @property
    def weights_file(self) -> Path:
        """The file with its tensors."""
        return self.folder / "adapters.safetensors"

    @property
    def is_dora(self) -> bool:
        """Whether each row of an adapted weight is scaled to a learned length (arXiv 2402.09353)."""
        return self.config.get("fine_tune_type", "lora") == "dora"

    @property
    def scale(self) -> float:
        """What the product of the two LoRA matrices is multiplied with.

        Raises `CheckpointError` when the config does not say.
        """
        scale = self.config["lora_parameters"].get("scale")
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise CheckpointError(f"{self.folder / 'adapter_config.json'} has no number as scale: copy it again")
        return float(scale)

    def fingerprint(self) -> str:
        """A short hash of its files."""
        config = (self.folder / "adapter_config.json").read_bytes()
        return hashlib.sha256(self.weights_file.read_bytes() + config).hexdigest()[:16]


def apply_adapter(network: Any, folder: Path) -> str:
    """Put an adapter's layers into a network and load their weights.

    Returns a short hash of the adapter's files.

    Raises `CheckpointError` when a file is missing or damaged, or the adapter was made for another model.
    """
    adapter = Adapter.open(folder)
    _attach(network, folder, adapter.config)
    _check_fit(network, adapter.tensors, folder)
    network.load_weights(str(adapter.weights_file), strict=False)
    return adapter.fingerprint()


def add_layers(
    network: Any, names: Iterable[str], *, rank: int, scale: float, dropout: float = 0.0, dora: bool = False
) -> None:
    """Put LoRA or DoRA layers (mlx-vlm's) around linear modules; they change nothing until their `lora_b` does.

    Args:
        network: is changed.
        names: of modules, from the network's root, quantized or not.
        rank, scale, dropout: of each layer.
        dora: also learn the length of each row of the weight.

    Raises `ValueError` for a name that is no linear module.
    """
    from mlx_vlm.trainer.peft.dora_layers import DoRALinear
    from mlx_vlm.trainer.peft.lora_layers import LoRALinear

    modules = dict(network.named_modules())
    layers: dict[str, Any] = {}
    for name in names:
        module = modules.get(name)
        if not isinstance(module, nn.Linear | nn.QuantizedLinear):
            raise ValueError(f"{name} is no linear module")
        outputs, inputs = module.weight.shape
        if isinstance(module, nn.QuantizedLinear):
            inputs = inputs * 32 // module.bits
        layer = (DoRALinear if dora else LoRALinear)(inputs, outputs, r=rank, dropout=dropout, scale=scale)
        if dora:
            layer.set_linear(module)
        else:
            layer.linear = module
        layers[name] = layer
    swap_modules(network, layers)


def find_layers(network: Any) -> dict[str, Any]:
    """The LoRA and DoRA layers of a network by their name from its root; `.linear` is the module inside."""
    return {name: module for name, module in network.named_modules() if "lora_a" in module and "linear" in module}


def swap_modules(network: Any, modules: Mapping[str, Any]) -> None:
    """Put modules in the places that their names say, counted from the network's root."""
    for name, module in modules.items():
        *path, last = name.split(".")
        parent = network
        for part in path:
            parent = parent[int(part)] if part.isdigit() else parent[part]
        parent[last] = module


def _check_config(config: Any, file: Path) -> None:
    kind = config.get("fine_tune_type", "lora") if isinstance(config, dict) else None
    if kind == "full":
        raise CheckpointError(f"{file} describes a fully fine-tuned model, not an adapter: load that model itself")
    if kind not in ("lora", "dora") or not isinstance(config.get("lora_parameters"), dict):
        raise CheckpointError(
            f"{file} does not describe a LoRA adapter as mlx-vlm or mlxvr writes it (lora_parameters with rank, scale, "
            "dropout and keys): convert the adapter, or fuse it into its model first"
        )


def _attach(network: Any, folder: Path, config: dict[str, Any]) -> None:
    """Replace the modules that the adapter names by LoRA layers around them."""
    from mlx_vlm.trainer.peft import utils as peft

    try:
        peft._restore_quantization(network, config.get("base_quantization", {}))
        settings = config["lora_parameters"]
        if "keys" in settings:
            names = peft._resolve_lora_targets(network, settings["keys"])
            how = {key: settings[key] for key in ("rank", "scale", "dropout")}
            add_layers(network, names, dora=config.get("fine_tune_type") == "dora", **how)
        else:
            peft._apply_lora_layers(network, config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the adapter {folder} does not fit this model: {error}") from error


def _check_fit(network: Any, tensors: dict[str, TensorInfo], folder: Path) -> None:
    """Every LoRA weight of the network is in the file in its shape, and the file holds nothing else."""
    present = {key: tuple(array.shape) for key, array in cast("list[Any]", tree_flatten(network.parameters()))}
    wanted = {key for key in present if key.endswith(_LORA_ENDINGS)}
    if missing := sorted(wanted - tensors.keys()):
        raise CheckpointError(f"the adapter {folder} lacks {missing[0]}: it was made for another model")
    for key, info in tensors.items():
        if key not in present:
            raise CheckpointError(f"the adapter {folder} holds {key}, which this model does not have")
        if present[key] != info.shape:
            raise CheckpointError(
                f"the adapter {folder}: {key} has the shape {list(info.shape)}, expected {list(present[key])}: it was "
                "made for another model"
            )
