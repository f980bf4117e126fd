"""LoRA and DoRA adapters of a loaded network.

PEFT (`adapter_model.safetensors`), mlx-vlm and mlxvr, and mlx-lm (`adapters.safetensors`) write adapter folders, each
with an `adapter_config.json`; `mlxvr.model.adapter_layouts` reads all three layouts. In the network, adapters are
mlx-vlm 0.7.10's layers: `<module>.lora_a`, `<module>.lora_b` and, for DoRA, `.m`.

mlx-vlm's own function adds the layers, but then loads the weights without a check: with a folder for another model, the
layers would silently stay untrained. So names and shapes are compared here. It also builds DoRA layers of a wrong width
around weights of 3, 5 or 6 bits; `add_layers` builds the right width.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxvr.checkpoint.safetensors import TensorInfo, read_header
from mlxvr.errors import CheckpointError
from mlxvr.model.adapter_layouts import AdapterLayer, read_mlx, read_peft

__all__ = ["LORA_PARTS", "Adapter", "add_layers", "apply_adapter", "find_layers", "swap_modules"]

LORA_PARTS = ("lora_a", "lora_b", "m")

_PEFT_WEIGHTS = "adapter_model.safetensors"
_MLX_WEIGHTS = "adapters.safetensors"
_LAYERS = "language_model.model.layers."
_LORA_ENDINGS = (".lora_a", ".lora_b", ".m", ".A", ".B")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose files are readable; whether it fits a model is not checked yet.

    Attributes:
        folder: the folder's path.
        config: `adapter_config.json`.
        weights_file: the file with its tensors.
        tensors: headers of that file's tensors, by their names on disk.
        layers: MLX path of each adapted module -> its layer.
    """

    folder: Path
    config: dict[str, Any]
    weights_file: Path
    tensors: dict[str, TensorInfo]
    layers: dict[str, AdapterLayer]

    @classmethod
    def open(cls, folder: Path) -> "Adapter":
        """Read config and header.

        Raises `CheckpointError` when a file is missing or damaged, when the adapter is no LoRA or DoRA adapter, or when
        MLX's LoRA layers cannot express one of its settings.
        """
        config_file = folder / "adapter_config.json"
        weights = _find_weights(folder)
        if not config_file.is_file():
            raise _no_file(folder, config_file.name)
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{config_file} cannot be read as JSON ({error}): copy the adapter again") from error
        tensors = read_header(weights)
        if weights.name == _PEFT_WEIGHTS:
            if not isinstance(config, dict):
                raise CheckpointError(f"{config_file} contains no JSON object: copy the adapter again")
            return cls(folder, config, weights, tensors, read_peft(config, tensors, folder))
        _check_config(config, config_file)
        return cls(folder, config, weights, tensors, read_mlx(config, tensors, folder))

    @property
    def is_peft(self) -> bool:
        """Whether PEFT wrote the folder."""
        return self.weights_file.name == _PEFT_WEIGHTS

    @property
    def is_dora(self) -> bool:
        """Whether each row of an adapted weight is scaled to a learned length (arXiv 2402.09353)."""
        return bool(self.config.get("use_dora")) or self.config.get("fine_tune_type", "lora") == "dora"

    def load(self) -> dict[str, mx.array]:
        """The weights by their names in the network; each `lora_a` is (inputs, rank)."""
        arrays = cast("dict[str, mx.array]", mx.load(str(self.weights_file)))
        return {
            f"{module}.{part}": arrays[name].T if self.is_peft and part != "m" else arrays[name]
            for module, layer in self.layers.items()
            for part, name in layer.parts.items()
        }

    def fingerprint(self) -> str:
        """A short hash of the files."""
        config = (self.folder / "adapter_config.json").read_bytes()
        return hashlib.sha256(self.weights_file.read_bytes() + config).hexdigest()[:16]


def apply_adapter(network: Any, folder: Path) -> str:
    """Add an adapter's layers to a network and load their weights; return a short hash of the adapter's files.

    Raises `CheckpointError` when a file is missing or damaged, or the adapter was made for another model.
    """
    adapter = Adapter.open(folder)
    if adapter.is_peft or _is_mlx_lm(adapter):
        _attach_by_name(network, adapter)
    else:
        _attach(network, folder, adapter.config)
    weights = adapter.load()
    _check_fit(network, {name: tuple(array.shape) for name, array in weights.items()}, folder)
    network.load_weights(list(weights.items()), strict=False)
    return adapter.fingerprint()


def add_layers(
    network: Any, names: Iterable[str], *, rank: int, scale: float, dropout: float = 0.0, dora: bool = False
) -> None:
    """Put LoRA or DoRA layers (mlx-vlm's) around linear modules; outputs stay the same while `lora_b` is zero.

    Args:
        network: is changed in place.
        names: the modules' names from the network's root, quantized or not.
        rank, scale, dropout: of each layer.
        dora: use DoRA: also learn the length of each row of the weight.

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
    """The LoRA and DoRA layers of a network, by their name from its root; `.linear` is the wrapped module."""
    return {name: module for name, module in network.named_modules() if "lora_a" in module and "linear" in module}


def swap_modules(network: Any, modules: Mapping[str, Any]) -> None:
    """Replace modules of a network, by their names from its root."""
    for name, module in modules.items():
        *path, last = name.split(".")
        parent = network
        for part in path:
            parent = parent[int(part)] if part.isdigit() else parent[part]
        parent[int(last) if last.isdigit() else last] = module


def _check_config(config: Any, file: Path) -> None:
    kind = config.get("fine_tune_type", "lora") if isinstance(config, dict) else None
    if kind == "full":
        raise CheckpointError(f"{file} describes a fully fine-tuned model, not an adapter: load that model itself")
    if kind not in ("lora", "dora") or not isinstance(config.get("lora_parameters"), dict):
        raise CheckpointError(
            f"{file} does not describe a LoRA adapter of mlx-vlm, mlx-lm or mlxvr (lora_parameters with rank, scale, "
            "dropout and keys): convert the adapter, or fuse it into its model first"
        )


def _find_weights(folder: Path) -> Path:
    """The file with the tensors; raises `CheckpointError` when no file is safe to read."""
    present = [folder / name for name in (_PEFT_WEIGHTS, _MLX_WEIGHTS) if (folder / name).is_file()]
    if len(present) == 2:
        raise CheckpointError(f"{folder} holds both {_PEFT_WEIGHTS} and {_MLX_WEIGHTS}: give each a folder of its own")
    if present:
        return present[0]
    if (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} has its weights as a pickle only (adapter_model.bin), which can run code when it is read and is "
            "never loaded: save the adapter again with safe_serialization=True"
        )
    raise _no_file(folder, _MLX_WEIGHTS)


def _no_file(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} has no {name}: give the folder of an adapter, with adapters.safetensors (of MLX) or "
        "adapter_model.safetensors (of PEFT) and adapter_config.json"
    )


def _is_mlx_lm(adapter: Adapter) -> bool:
    """Whether mlx-lm wrote it: modules are named from a text model, or keys from a layer."""
    keys = adapter.config["lora_parameters"].get("keys") or []
    return any(name.startswith("model.layers.") for name in adapter.tensors) or any(
        str(key).startswith(("self_attn.", "mlp.")) for key in keys
    )


def _attach_by_name(network: Any, adapter: Adapter) -> None:
    """Add layers around the modules that the adapter has weights for, each with its own rank and scale."""
    linear = {
        name: tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }
    wanted = set(adapter.layers)
    if not adapter.is_peft:
        wanted |= _mlx_lm_targets(adapter.config, linear)
    for name in sorted(wanted):
        if name not in linear:
            raise CheckpointError(
                f"the adapter {adapter.folder} adapts {name}, but this model has no linear module of that name: it was "
                "made for another model"
            )
        if name not in adapter.layers:
            raise CheckpointError(f"the adapter {adapter.folder} lacks {name}, which its config names: copy it again")
    groups: dict[tuple[int, float], list[str]] = {}
    for name, layer in adapter.layers.items():
        groups.setdefault((layer.rank, layer.scale), []).append(name)
    for (rank, scale), names in groups.items():
        add_layers(network, names, rank=rank, scale=scale, dora=adapter.is_dora)


def _mlx_lm_targets(config: Mapping[str, Any], linear: Iterable[str]) -> set[str]:
    """The modules that an mlx-lm config names: `keys` in each of the last `num_layers` layers."""
    layers = [name.removeprefix(_LAYERS).split(".", 1) for name in linear if name.startswith(_LAYERS)]
    count = 1 + max((int(index) for index, _ in layers), default=-1)
    keys = config["lora_parameters"].get("keys")
    last = config.get("num_layers", config.get("lora_layers", -1))
    first = count - last if isinstance(last, int) and 0 < last <= count else 0
    return {f"{_LAYERS}{index}.{key}" for index, key in layers if int(index) >= first and key in (keys or ())}


def _attach(network: Any, folder: Path, config: dict[str, Any]) -> None:
    """Add layers around the modules that the config names."""
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


def _check_fit(network: Any, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise `CheckpointError` unless the file holds exactly the network's LoRA weights, each in its shape."""
    present = {key: tuple(array.shape) for key, array in cast("list[Any]", tree_flatten(network.parameters()))}
    wanted = {key for key in present if key.endswith(_LORA_ENDINGS)}
    if missing := sorted(wanted - shapes.keys()):
        raise CheckpointError(f"the adapter {folder} lacks {missing[0]}: it was made for another model")
    for key, shape in shapes.items():
        if key not in present:
            raise CheckpointError(f"the adapter {folder} holds {key}, which this model does not have")
        if present[key] != shape:
            raise CheckpointError(
                f"the adapter {folder}: {key} has the shape {list(shape)}, expected {list(present[key])}: it was "
                "made for another model"
            )
