"""Formats of weights on disk; each yields a weight's rows as plain floats, a few megabytes at a time.

    Plain          floats (or the integers of packed weights that are copied as they are)
    Fp8Blocks      8-bit floats with a scale for each block of rows and columns (see `mlxvr.checkpoint.fp8`)
    MlxQuantized   MLX's own quantized weights: 32-bit words, scales and, in the affine mode, biases

Files are read, not mapped into memory, so that rows leave memory once they have been used.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlxvr.checkpoint.fp8 import unpack_fp8
from mlxvr.checkpoint.safetensors import TensorInfo
from mlxvr.errors import CheckpointError
from mlxvr.model.families.base import Family

__all__ = ["NUMPY_DTYPES", "Fp8Blocks", "MlxQuantized", "Plain", "WeightFormat", "as_mlx", "as_numpy"]

# The numpy dtype for each dtype of safetensors; numpy has no bfloat16, so its bit patterns are stored as integers.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F8_E4M3": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "U32": np.dtype("<u4"),
}
_MLX_CODES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}


def as_mlx(values: np.ndarray, dtype: str) -> mx.array:
    """An MLX array of `values`, an array of `NUMPY_DTYPES[dtype]`."""
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def as_numpy(array: mx.array) -> np.ndarray:
    """A numpy view of an MLX array; bfloat16 as its bit patterns."""
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


class WeightFormat(ABC):
    """A tensor on disk.

    Attributes:
        infos: the stored tensors that it consists of.
        dtype: dtype of the rows that `chunks` yields: "BF16", "F16", "F32" ("U32", "U8" for copied integers).
    """

    infos: tuple[TensorInfo, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return sum(info.offsets[1] - info.offsets[0] for info in self.infos)

    @abstractmethod
    def chunks(self, max_bytes: int) -> Iterator[np.ndarray]:
        """Yield whole rows in order, about `max_bytes` at a time, as `NUMPY_DTYPES[self.dtype]` arrays."""


class Plain(WeightFormat):
    """Plain numbers. A tensor with more than two dimensions is yielded at once, since its axes may be reordered."""

    def __init__(self, key: str, info: TensorInfo, family: Family) -> None:
        """`key`: the tensor's MLX name."""
        self.infos = (info,)
        self.dtype = info.dtype
        self._key = key
        self._family = family

    def chunks(self, max_bytes: int) -> Iterator[np.ndarray]:
        """Yield rows, see `WeightFormat`."""
        (info,) = self.infos
        if len(info.shape) == 2:
            with _RowReader(info) as rows:
                for _, count in _steps(info.shape[0], rows.step(max_bytes)):
                    yield rows.read(count)
            return
        with _RowReader(info) as rows:
            whole = rows.read(info.shape[0] if info.shape else 1).reshape(info.shape)
            yield np.ascontiguousarray(self._family.mlx_tensor(self._key, whole))


class Fp8Blocks(WeightFormat):
    """8-bit floats times the scale of their block, as float32."""

    dtype = "F32"

    def __init__(self, weight: TensorInfo, scales: TensorInfo, block: tuple[int, int]) -> None:
        """`block`: rows and columns that share a scale."""
        self.infos = (weight, scales)
        self._block = block

    def chunks(self, max_bytes: int) -> Iterator[np.ndarray]:
        """Yield whole blocks of rows, see `WeightFormat`."""
        weight, scales = self.infos
        height = self._block[0]
        with _RowReader(scales) as file:
            factors = as_mlx(file.read(scales.shape[0]), scales.dtype)
        with _RowReader(weight) as rows:
            step = max(1, rows.step(max_bytes // 4) // height) * height
            for start, count in _steps(weight.shape[0], step):
                own = factors[start // height : -(-(start + count) // height)]
                yield as_numpy(unpack_fp8(mx.array(rows.read(count)), own, self._block))


class MlxQuantized(WeightFormat):
    """MLX's quantized weights, unpacked to the dtype of their scales; to bfloat16 in the floating-point modes."""

    def __init__(
        self, weight: TensorInfo, scales: TensorInfo, biases: TensorInfo | None, how: Mapping[str, Any]
    ) -> None:
        """`how`: bits, group_size and mode, as `mx.dequantize` takes them."""
        self.infos = (weight, scales) if biases is None else (weight, scales, biases)
        self.dtype = "BF16" if biases is None else scales.dtype
        self._how = dict(how)

    def chunks(self, max_bytes: int) -> Iterator[np.ndarray]:
        """Yield rows, see `WeightFormat`."""
        readers = [_RowReader(info) for info in self.infos]
        try:
            step = max(1, readers[0].step(max_bytes) * self._how["bits"] // 16)
            for _, count in _steps(self.infos[0].shape[0], step):
                parts = [as_mlx(rows.read(count), info.dtype) for rows, info in zip(readers, self.infos, strict=True)]
                array = mx.dequantize(parts[0], parts[1], parts[2] if parts[2:] else None, **self._how)
                if _MLX_CODES[array.dtype] != self.dtype:
                    array = array.astype(mx.bfloat16)
                mx.eval(array)
                yield as_numpy(array)
        finally:
            for rows in readers:
                rows.close()


class _RowReader:
    """Reads the rows of a tensor on disk in order."""

    def __init__(self, info: TensorInfo) -> None:
        self._info = info
        self._dtype = NUMPY_DTYPES[info.dtype]
        self._width = math.prod(info.shape[1:])
        self._file: BinaryIO = info.file.open("rb", buffering=0)
        self._file.seek(info.offsets[0])

    def step(self, max_bytes: int) -> int:
        """The number of rows, at least one, that take about `max_bytes`."""
        return max(1, max_bytes // max(1, self._width * self._dtype.itemsize))

    def read(self, count: int) -> np.ndarray:
        """The next `count` rows: (count, width)."""
        values = np.fromfile(self._file, dtype=self._dtype, count=count * self._width)
        if values.size != count * self._width:
            raise CheckpointError(f"{self._info.file} became shorter while it was read: download it again")
        return values.reshape(count, self._width)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "_RowReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _steps(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, count) of steps over `rows` rows."""
    for start in range(0, rows, step):
        yield start, min(step, rows - start)
