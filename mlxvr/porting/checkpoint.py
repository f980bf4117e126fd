"""The checkpoint that is to be converted: judged from its headers, then read a few megabytes at a time.

Everything that can be known without reading weights is checked here, before a byte of output exists: tensors that
are missing, extra, there twice, of a wrong shape or of a type that is not a plain float, and weights that are
quantized already. Reading is plain file reads rather than a memory map, so that what has been passed on leaves
memory. No MLX is needed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxvr.errors import CheckpointError
from mlxvr.model.folder import ModelFolder, TensorInfo

__all__ = ["Checkpoint", "SourceTensor", "all_finite"]

# How each dtype is held in numpy; it has no bfloat16, so those travel as their bit patterns.
_HELD_AS: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
# The bit patterns from here on, sign aside, are infinity and NaN.
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the source under its MLX name, with the shape that it has in MLX's layout."""

    key: str
    shape: tuple[int, ...]
    info: TensorInfo
    folder: ModelFolder

    @property
    def module(self) -> str:
        """MLX path of the module whose parameter this is."""
        return self.key.rpartition(".")[0]

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a linear layer or an embedding: what can be quantized."""
        return len(self.shape) == 2 and self.key.endswith(".weight")

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return self.info.offsets[1] - self.info.offsets[0]

    def chunks(self, max_bytes: int) -> Iterator[np.ndarray]:
        """Yield the tensor in MLX's layout, whole rows at a time, as `<u2` (bfloat16), `<f2` or `<f4` arrays.

        A tensor of more than two dimensions comes in one piece, because its axes may have to change places.
        """
        dtype, shape = _HELD_AS[self.info.dtype], self.info.shape
        rows, width = (shape[0], math.prod(shape[1:])) if len(shape) == 2 else (1, math.prod(shape))
        step = max(1, max_bytes // max(1, width * dtype.itemsize))
        with self.info.file.open("rb", buffering=0) as file:
            file.seek(self.info.offsets[0])
            for start in range(0, rows, step):
                count = min(step, rows - start) * width
                values = np.fromfile(file, dtype=dtype, count=count)
                if values.size != count:
                    raise CheckpointError(f"{self.info.file} became shorter while it was read: download it again")
                if len(shape) == 2:
                    yield values.reshape(-1, width)
                else:
                    moved = self.folder.family.mlx_tensor(self.key, values.reshape(shape))
                    yield np.ascontiguousarray(moved)


@dataclass(frozen=True)
class Checkpoint:
    """An unquantized checkpoint whose headers are in order; `tensors` are in the network's own order."""

    folder: ModelFolder
    tensors: tuple[SourceTensor, ...]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Check a folder (as transformers writes it, or MLX in any float type).

        Raises `CheckpointError` naming the first thing that is wrong with it.
        """
        folder = ModelFolder.open(path)
        _refuse_quantized(folder)
        tied = bool(folder.family.mlx_config(folder.config)["tie_word_embeddings"])
        spelled: dict[str, str] = {}
        for name in folder.tensors:
            key = folder.family.mlx_key(name, tied=tied)
            if key is None:
                continue
            if key in spelled:
                raise CheckpointError(
                    f"{path} holds {key} twice, as {spelled[key]} and as {name}: keep the one that belongs to it"
                )
            spelled[key] = name
        folder.check_shapes()
        expected = folder.family.expected_shapes(folder.config)
        if extra := sorted(spelled.keys() - expected.keys(), key=_network_order):
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise CheckpointError(
                f"{path} holds {spelled[extra[0]]}{more}, which a {folder.family.name} network of this config.json "
                "has no place for: the files do not belong together, or the checkpoint is of another kind"
            )
        keys = sorted(spelled, key=_network_order)
        return cls(
            folder, tuple(SourceTensor(key, expected[key], folder.tensors[spelled[key]], folder) for key in keys)
        )

    @property
    def nbytes(self) -> int:
        """Size of the tensors that are read, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """How many numbers the network has."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether bits read as `dtype` ("BF16", "F16" or "F32") hold neither infinity nor NaN.

    Looks at the exponent bits as integers, which is several times as fast as `isfinite` and needs no bfloat16.
    """
    if values.size == 0:
        return True
    bits = values.view(np.dtype(f"<u{values.dtype.itemsize}"))
    largest = int((bits & np.iinfo(bits.dtype).max // 2).max())
    return largest < _INFINITY[dtype]


def _refuse_quantized(folder: ModelFolder) -> None:
    config = folder.config
    declared: Any = config.get("quantization") or config.get("quantization_config")
    declared = declared or (config.get("text_config") or {}).get("quantization_config")
    original = folder.settings.get("source") or "the bfloat16 checkpoint that it was made from"
    advice = f"rounding twice loses more than either rounding alone: convert {original}"
    if declared:
        kind = declared.get("quant_method") or f"{declared.get('bits', '?')}-bit" if isinstance(declared, dict) else ""
        raise CheckpointError(f"{folder.path} is quantized already ({kind}); {advice}")
    for name, info in folder.tensors.items():
        if info.dtype not in _HELD_AS and folder.family.mlx_key(name) is not None:
            raise CheckpointError(
                f"{folder.path}: {name} has the type {info.dtype}; expected BF16, F16 or F32 weights; {advice}"
            )


def _network_order(key: str) -> tuple[tuple[int, str], ...]:
    """Sort key that counts layers as numbers: 2 before 10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in key.split("."))
