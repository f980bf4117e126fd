"""What a run needs to resume bit for bit: adapter weights, the optimizer's moments, and its progress.

Order and samples follow from the seed, the step's number and the rows' ids, so no random state has to be kept. All of
it is one safetensors file that is replaced in one step: a killed run finds the last saving whole.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.grpo.step.lora import lora_weights
from mlxvr.model.adapter import find_layers
from mlxvr.model.network import VideoModel
from mlxvr.storage.atomic import replacing

__all__ = ["TrainState", "load_state", "read_state", "save_state", "state_file"]

_NOTES = "mlxvr_train"


@dataclass(kw_only=True)
class TrainState:
    """The progress of a run.

    Attributes:
        step: number of finished steps.
        run: the settings that decide what the steps do; a run with others cannot resume from here.
        best: the highest validation reward, None before the first.
        best_step: the step of that reward.
        skipped: rows that could not be used, by id.
        guard: the state of the collapse guard.
        pending: metrics of the last step, if its validation has not been recorded yet; else None.
    """

    step: int = 0
    run: dict[str, Any] = field(default_factory=dict)
    best: float | None = None
    best_step: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    pending: dict[str, Any] | None = None


def state_file(output: Path) -> Path:
    """Where a run in `output` keeps its state."""
    return output / "state" / "state.safetensors"


def save_state(
    output: Path,
    model: VideoModel,
    optimizer: optim.Optimizer,
    state: TrainState,
    *,
    reference: Mapping[str, mx.array] | None = None,
) -> None:
    """Write the state of a run, atomically.

    Args:
        output: the run's folder.
        model: with LoRA layers.
        optimizer: with the moments of their weights.
        progress: how far it is.
        reference: the adapter that the reference policy has, if any.

    Raises `ConfigError` when it cannot be written.
    """
    path = state_file(output)
    arrays = {f"adapter/{name}": array for name, array in lora_weights(model).items()}
    arrays |= {f"optimizer/{name}": array for name, array in cast("list[Any]", tree_flatten(optimizer.state))}
    arrays |= {f"reference/{name}": array for name, array in (reference or {}).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            mx.save_safetensors(str(temporary), arrays, {_NOTES: json.dumps(asdict(state))})
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"the state cannot be written to {path}: {error}; make room, or use another output"
        ) from error


def read_state(output: Path) -> TrainState:
    """How far the run in a folder is; raises as `load_state`."""
    return _read(output)[0]


def load_state(
    output: Path, model: VideoModel, optimizer: optim.Optimizer
) -> tuple[TrainState, dict[str, mx.array] | None]:
    """Put a saved state into model and optimizer.

    Args:
        output: the run's folder.
        model: with LoRA layers of the same shapes.
        optimizer: of the same kind.

    Returns:
        How far the run is, and the reference policy's adapter or None.

    Raises:
        ConfigError: there is no state.
        CheckpointError: it is damaged or that of another model.
    """
    progress, arrays = _read(output)
    path = state_file(output)
    try:
        mx.eval(arrays)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreadable(path, error) from error
    parts: dict[str, dict[str, mx.array]] = {"adapter": {}, "optimizer": {}, "reference": {}}
    for name, array in arrays.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = array
    now = lora_weights(model)
    if {name: array.shape for name, array in now.items()} != {n: a.shape for n, a in parts["adapter"].items()}:
        raise CheckpointError(f"{path} is the state of another model or adapter: give the settings that it began with")
    layers = find_layers(model.network)
    for name, array in parts["adapter"].items():
        module, _, kind = name.rpartition(".")
        layers[module][kind] = array
    optimizer.state = tree_unflatten(list(parts["optimizer"].items()))
    return progress, parts["reference"] or None


def _read(output: Path) -> tuple[TrainState, dict[str, mx.array]]:
    """How far the run in a folder is, and its arrays, which are not read yet."""
    path = state_file(output)
    if not path.is_file():
        raise ConfigError(
            f"{output} holds no state to resume from, so no run that could go on: leave --resume out to start one, or "
            "give the folder of a run"
        )
    try:
        loaded = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, notes = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
        return TrainState(**json.loads(notes[_NOTES])), arrays
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as the state of a run ({error}): start the run anew, in another folder"
    )
