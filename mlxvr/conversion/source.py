"""The source of a conversion, checked by its headers.

Everything that can be known without reading weights is checked before any output exists: tensors that are missing,
extra, duplicated, of a wrong shape or of a dtype that cannot be converted, and weights that are already quantized.
`weight_formats` reads the tensors.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxvr.checkpoint.folder import ModelFolder, TensorInfo
from mlxvr.checkpoint.weight_formats import NUMPY_DTYPES, Fp8Blocks, MlxQuantized, Plain, WeightFormat
from mlxvr.errors import CheckpointError

__all__ = ["Checkpoint", "SourceTensor", "all_finite"]

# The bit patterns from here on, sign aside, are infinity and NaN.
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000}
_FLOATS = frozenset(_INFINITY)
_DECLARED = {"quantization", "quantization_config"}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the source: its MLX name, its shape in MLX's layout, and its format on disk."""

    key: str
    shape: tuple[int, ...]
    format: WeightFormat

    @property
    def module(self) -> str:
        """MLX path of the module that the tensor is a parameter of."""
        return self.key.rpartition(".")[0]

    @property
    def is_matrix(self) -> bool:
        """Whether it is the float weight of a linear layer or an embedding, and so can be quantized."""
        return len(self.shape) == 2 and self.key.endswith(".weight") and self.dtype in _FLOATS

    @property
    def dtype(self) -> str:
        """The dtype of its rows as they are read, as safetensors spells it."""
        return self.format.dtype

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return self.format.nbytes

    def chunks(self, max_bytes: int) -> Iterator[np.ndarray]:
        """Yield the tensor in MLX's layout, whole rows at a time, as `NUMPY_DTYPES[self.dtype]` arrays."""
        return self.format.chunks(max_bytes)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were checked.

    Attributes:
        folder: its files.
        tensors: the tensors to read (see `open`), in the network's order.
        parameters: number of the network's parameters.
    """

    folder: ModelFolder
    tensors: tuple[SourceTensor, ...]
    parameters: int

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        prefixes: Sequence[tuple[str, str]] = (),
        unpack: Callable[[str], bool] | None = None,
    ) -> "Checkpoint":
        """Check a folder (in the layout of transformers, or of MLX in any float dtype).

        Args:
            path: the folder.
            prefixes: see `ModelFolder.open`.
            unpack: accepts weights that MLX has quantized: MLX path of a module -> whether its weight is unpacked to
                floats, or copied as it is (its scales are then tensors of their own). None: such weights are an error.

        Raises `CheckpointError` that names the first problem.
        """
        folder = ModelFolder.open(path, prefixes=prefixes)
        if unpack is None:
            _refuse_packed(folder)
        spelled = _spelled(folder)
        _refuse_dtypes(folder, spelled)
        folder.check_shapes()
        expected = folder.family.expected_shapes(folder.config)
        tensors: dict[str, SourceTensor] = {}
        companions: set[str] = set()
        for key in sorted(expected.keys() & spelled.keys(), key=_network_order):
            for tensor, made_of in _read_as(folder, spelled, key, expected[key], unpack):
                tensors[tensor.key] = tensor
                companions |= made_of
        if extra := sorted(spelled.keys() - tensors.keys() - companions, key=_network_order):
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise CheckpointError(
                f"{path} holds {spelled[extra[0]]}{more}, which a {folder.family.name} network of this config.json "
                "has no place for: the files do not belong together, or the checkpoint is of another kind"
            )
        return cls(folder, tuple(tensors.values()), sum(math.prod(expected[key]) for key in expected))

    @property
    def nbytes(self) -> int:
        """Size of the tensors that are read, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def identity(self) -> str:
        """Names, sizes and times of its files: differs for any other source, and for this one after a change."""
        files = sorted({info.file for tensor in self.tensors for info in tensor.format.infos})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return json.dumps([stats, self.folder.sample()])


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether bits read as `dtype` hold neither infinity nor NaN; always True for integers.

    The exponent bits are compared as integers, which is several times as fast as `isfinite` and needs no bfloat16.
    """
    if values.size == 0 or dtype not in _INFINITY:
        return True
    bits = values.view(np.dtype(f"<u{values.dtype.itemsize}"))
    largest = int((bits & np.iinfo(bits.dtype).max // 2).max())
    return largest < _INFINITY[dtype]


def _spelled(folder: ModelFolder) -> dict[str, str]:
    """MLX name -> name on disk, for the tensors that the network uses."""
    tied = bool(folder.family.mlx_config(folder.config)["tie_word_embeddings"])
    spelled: dict[str, str] = {}
    for name in folder.tensors:
        key = folder.mlx_key(name, tied=tied)
        if key is None:
            continue
        if key in spelled:
            raise CheckpointError(
                f"{folder.path} holds {key} twice, as {spelled[key]} and as {name}: keep the one that belongs to it"
            )
        spelled[key] = name
    return spelled


def _read_as(
    folder: ModelFolder,
    spelled: dict[str, str],
    key: str,
    shape: tuple[int, ...],
    unpack: Callable[[str], bool] | None,
) -> Iterator[tuple[SourceTensor, set[str]]]:
    """Yield the source tensors of a tensor of the network, each with the keys of its companions (scales and biases)."""
    info = folder.tensors[spelled[key]]
    module = key.removesuffix(".weight")
    if info.dtype == "F8_E4M3":
        scale = f"{key}_scale_inv"
        yield SourceTensor(key, shape, Fp8Blocks(info, folder.tensors[spelled[scale]], folder.fp8_block)), {scale}
        return
    if info.dtype != "U32" or unpack is None:
        yield SourceTensor(key, shape, Plain(key, info, folder.family)), set()
        return
    parts = {
        part: folder.tensors[spelled[part]] for part in (f"{module}.scales", f"{module}.biases") if part in spelled
    }
    if unpack(module):
        scales, biases = parts[f"{module}.scales"], parts.get(f"{module}.biases")
        how = folder.quantization_of(module)
        yield SourceTensor(key, shape, MlxQuantized(info, scales, biases, how)), set(parts)
        return
    for part, raw in {key: info, **parts}.items():
        yield SourceTensor(part, raw.shape, Plain(part, raw, folder.family)), set()


def _refuse_packed(folder: ModelFolder) -> None:
    """Raise `CheckpointError` for quantized weights, except 8-bit float blocks, in which some sources are published."""
    config = folder.config
    declared: Any = config.get("quantization") or config.get("quantization_config")
    declared = declared or (config.get("text_config") or {}).get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, dict) else None
    if not declared or (method == "fp8" and "quantization" not in config):
        return
    kind = method or f"{declared.get('bits', '?')}-bit" if isinstance(declared, dict) else ""
    original = folder.settings.get("source") or "the bfloat16 checkpoint that it was made from"
    raise CheckpointError(
        f"{folder.path} is quantized already ({kind}); rounding twice loses more than either rounding alone: "
        f"convert {original} (or --dequantize this one)"
    )


def _refuse_dtypes(folder: ModelFolder, spelled: dict[str, str]) -> None:
    for key, name in spelled.items():
        info: TensorInfo = folder.tensors[name]
        if info.dtype not in NUMPY_DTYPES:
            raise CheckpointError(
                f"{folder.path}: {name} has the type {info.dtype}; expected BF16, F16 or F32 weights (or F8_E4M3 "
                "blocks): get the bf16 release"
            )
        if info.dtype in ("U8", "U32") and not _DECLARED & folder.config.keys():
            raise CheckpointError(
                f"{folder.path}: {name} has the type {info.dtype}, but config.json does not mention quantization: "
                f"expected floats for {key}, get the bf16 release"
            )


def _network_order(key: str) -> tuple[tuple[int, str], ...]:
    """A sort key that orders layers by number: 2 before 10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in key.split("."))
