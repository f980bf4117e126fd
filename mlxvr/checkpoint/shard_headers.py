"""The tensors of a model folder, collected from the headers of its shards.

Weights come from safetensors only. A pickle (`.bin`, `.pt`) can run any code while it is read, so it is never opened.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxvr.checkpoint.safetensors import TensorInfo, read_header
from mlxvr.errors import CheckpointError
from mlxvr.storage.paths import list_visible

__all__ = ["INDEX", "read_tensors"]

INDEX = "model.safetensors.index.json"
_NOT_THE_MODEL = ("adapter", "consolidated", "optimizer", "training")  # beginnings of other files' names


def read_tensors(folder: Path, index: Mapping[str, Any] | None) -> dict[str, TensorInfo]:
    """The tensors of the shards that the index names, or of all weights files if there is no index.

    Args:
        folder: the model folder.
        index: the content of its `INDEX` file; None: there is none.

    Raises `CheckpointError` when there are no safetensors weights, or index and shards do not agree.
    """
    present = {
        file.name: file for file in list_visible(folder, "*.safetensors") if not file.name.startswith(_NOT_THE_MODEL)
    }
    if index is None:
        if not present:
            raise _no_weights(folder)
        return _merge(folder, {name: read_header(file) for name, file in sorted(present.items())})
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no usable weight_map: download it again")
    shards = sorted(set(weight_map.values()))
    if missing := [name for name in shards if name not in present]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder} lacks the shard {missing[0]}{more}: its download is not complete")
    if extra := sorted(name for name in present.keys() - set(shards) if name.startswith("model")):
        raise CheckpointError(
            f"{folder} holds {extra[0]}, which its index does not know: remove the rest of another download"
        )
    headers = {name: read_header(present[name]) for name in shards}
    for tensor, name in weight_map.items():
        if tensor not in headers[name]:
            raise CheckpointError(
                f"{folder / name} does not hold {tensor}, which the index says it does: download both again"
            )
    return _merge(folder, headers)


def _merge(folder: Path, headers: Mapping[str, dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        if twice := sorted(tensors.keys() & header.keys()):
            first = tensors[twice[0]].file.name
            raise CheckpointError(
                f"{folder}: both {first} and {file} hold {twice[0]}: remove the one that does not belong"
            )
        tensors |= header
    return tensors


def _no_weights(folder: Path) -> CheckpointError:
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        for file in list_visible(folder, pattern):
            return CheckpointError(
                f"{folder} has its weights as a pickle only ({file.name}), which can run code when it is read and is "
                "never loaded: get a release with .safetensors files, or save it again with safe_serialization"
            )
    return CheckpointError(f"{folder} has no .safetensors file: its download is not complete")
