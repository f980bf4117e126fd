"""The trained weights: small LoRA matrices beside the language model's own weights, which stay as they are.

Everything else is frozen, vision tower and embeddings included. The layers are mlx-vlm's and so is the layout on disk
(see `mlxvr.model.adapter`): stock mlx-vlm, `mlxvr.load(adapter=...)` and `mlxvr.fuse` read what is saved here. The
matrices are float32 whatever the model computes in: a step of 1e-6 is lost in bfloat16.

The reference policy is the same model with its adapters off: no second copy of the weights. When training begins from
an adapter, it is the model with that adapter as it was: an `adapter_state`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.grpo.step.lora_config import PROJECTIONS, LoraConfig
from mlxvr.model.adapter import LORA_PARTS, Adapter, add_layers, apply_adapter, find_layers, swap_modules
from mlxvr.model.adapter_base import warn_of_another_base
from mlxvr.model.network import VideoModel
from mlxvr.storage.atomic import replacing, write_synced

__all__ = [
    "adapter_digest",
    "adapter_state",
    "attach",
    "attach_saved",
    "disable_adapters",
    "lora_weights",
    "save_adapter",
]


def attach(model: VideoModel, config: LoraConfig, *, seed: int) -> None:
    """Put new LoRA layers into the language model and freeze everything else; the model answers as before.

    Args:
        model: is changed.
        config: of the layers.
        seed: of the first matrices; the second ones are 0.

    Raises `ConfigError` when the model has adapters already.
    """
    _check_bare(model)
    names = _targets(model, config.target_modules)
    add_layers(model.network, names, rank=config.rank, scale=config.scale, dropout=config.dropout, dora=config.dora)
    key = mx.random.key(seed)
    for _, layer in sorted(find_layers(model.network).items()):
        key, own = mx.random.split(key)
        limit = layer.lora_a.shape[0] ** -0.5
        layer.lora_a = mx.random.uniform(-limit, limit, layer.lora_a.shape, key=own)
    _freeze_the_rest(model)


def attach_saved(model: VideoModel, folder: Path) -> LoraConfig:
    """Put a saved adapter into the language model, to train it on, and freeze everything else.

    Returns its config, which `save_adapter` needs to write it again.

    Raises:
        ConfigError: the model has adapters already.
        CheckpointError: the adapter is damaged, was made for another model, or changes more than the language model's
            projections.
    """
    _check_bare(model)
    adapter = Adapter.open(folder)
    warn_of_another_base(folder, adapter.config, model.base)
    apply_adapter(model.network, folder)
    names = sorted(find_layers(model.network))
    last = {name.rpartition(".")[2] for name in names}
    if not names or not last <= set(PROJECTIONS) or not all(name.startswith(_LAYERS) for name in names):
        raise CheckpointError(
            f"the adapter {folder} changes other modules than the language model's projections: fuse it, and train the "
            "fused model"
        )
    _freeze_the_rest(model)
    shared = {(layer.rank, layer.scale) for layer in adapter.layers.values()}
    if len(shared) > 1:
        raise CheckpointError(
            f"the adapter {folder} has modules of several ranks or scales, and a training has one of each: fuse it, "
            "and train the fused model"
        )
    ((rank, scale),) = shared
    dropout = adapter.config.get("lora_dropout") or adapter.config.get("lora_parameters", {}).get("dropout", 0.0)
    try:
        return LoraConfig(
            rank=rank,
            scale=scale,
            dropout=float(dropout),
            dora=adapter.is_dora,
            target_modules=tuple(key for key in PROJECTIONS if key in last),
        )
    except ConfigError as error:
        raise CheckpointError(f"the adapter {folder} cannot be trained on: {error}") from error


def lora_weights(model: VideoModel) -> dict[str, mx.array]:
    """The trained weights, by their names on disk."""
    return {
        f"{name}.{part}": layer[part]
        for name, layer in sorted(find_layers(model.network).items())
        for part in LORA_PARTS
        if part in layer
    }


def adapter_state(model: VideoModel) -> dict[str, mx.array]:
    """A copy of the trained weights as they are now, for `disable_adapters`."""
    copies = {name: mx.array(array) for name, array in lora_weights(model).items()}
    mx.eval(copies)
    return copies


def adapter_digest(model: VideoModel) -> str:
    """Identifies an adapter: 16 hexadecimal digits of its weights and scales, whatever folder it came from."""
    digest = hashlib.sha256()
    for name, layer in sorted(find_layers(model.network).items()):
        digest.update(f"{name} {layer.scale}".encode())
    for name, array in lora_weights(model).items():
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()[:16]


def save_adapter(folder: Path, model: VideoModel, config: LoraConfig) -> None:
    """Write the trained weights as an adapter folder in mlx-vlm's layout, each file atomically.

    Beside what mlx-vlm reads, `adapter_config.json` says under "base" which weights it was trained on.

    Args:
        folder: is made if it does not exist; other files in it stay.
        model: with LoRA layers.
        config: of the LoRA layers.

    Raises `ConfigError` when a file cannot be written or there is nothing to write.
    """
    weights = lora_weights(model)
    if not weights:
        raise ConfigError("the model has no adapter to save: attach one first")
    described = {
        "fine_tune_type": "dora" if config.dora else "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": sorted(find_layers(model.network)),
        },
        "base": {"fingerprint": model.parts["model"], **model.base},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            replacing(folder / "adapters.safetensors") as tensors,
            replacing(folder / "adapter_config.json") as settings,
        ):
            write_synced(settings, (json.dumps(described, indent=2) + "\n").encode())
            mx.save_safetensors(str(tensors), weights)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"the adapter cannot be written to {folder}: {error}") from error


@contextmanager
def disable_adapters(model: VideoModel, start: Mapping[str, mx.array] | None = None) -> Iterator[None]:
    """Make the model the reference policy while the context lasts.

    Args:
        model: with LoRA layers.
        start: None: the model without its adapters, bit for bit; an `adapter_state`: the model with them as they were.
    """
    layers = find_layers(model.network)
    if start is None:
        swap_modules(model.network, {name: layer.linear for name, layer in layers.items()})
        try:
            yield
        finally:
            swap_modules(model.network, layers)
        return
    now = lora_weights(model)
    _put(layers, start)
    try:
        yield
    finally:
        _put(layers, now)


_LAYERS = "language_model.model.layers."


def _put(layers: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
    for name, array in weights.items():
        module, _, part = name.rpartition(".")
        layers[module][part] = array


def _targets(model: VideoModel, keys: tuple[str, ...]) -> list[str]:
    return [
        name
        for name, _ in model.network.named_modules()
        if name.startswith(_LAYERS) and name.rpartition(".")[2] in keys
    ]


def _check_bare(model: VideoModel) -> None:
    if find_layers(model.network):
        raise ConfigError("the model has an adapter already: load it without one, then attach the adapter to train")


def _freeze_the_rest(model: VideoModel) -> None:
    model.network.freeze()
    layers = find_layers(model.network)
    for layer in layers.values():
        layer.unfreeze(recurse=False, keys=[part for part in LORA_PARTS if part in layer])
    _put(layers, {name: array.astype(mx.float32) for name, array in lora_weights(model).items()})
    model.network.eval()  # dropout is used for gradients only
    mx.eval(model.network.trainable_parameters())
