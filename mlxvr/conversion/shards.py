"""Safetensors files that are written piece by piece, so that no file is ever in memory as a whole.

A safetensors file (https://github.com/huggingface/safetensors) is 8 bytes of header length, a JSON header with the
dtype, shape and byte range of every tensor, then the data. All shapes are known before the first tensor is computed, so
the header is written first, and rows are appended within the byte range of their tensor as they come: a weight, its
scales and its biases grow side by side. A file gets its final name only once it is complete.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from mlxvr.storage.atomic import replacing, write_synced

__all__ = ["MAX_SHARD_BYTES", "OutputTensor", "ShardWriter", "is_finished", "plan_shards", "write_index", "write_shard"]

MAX_SHARD_BYTES = 10**9  # an interrupted conversion repeats at most one shard; loaders take any number of shards
_DTYPE_BYTES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4, "U32": 4}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: its name, safetensors dtype ("U8", "BF16", "F16", "F32" or "U32") and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


def plan_shards(
    groups: Iterable[list[OutputTensor]], max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[OutputTensor]]:
    """Distribute tensors over files of at most `max_bytes`, in order; a group (a weight and its scales) stays together.

    A larger group gets a file of its own.

    Returns file name -> tensors; one file is called `model.safetensors`, several `model-00001-of-0000N.safetensors`.
    """
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for group in groups:
        size = sum(tensor.nbytes for tensor in group)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_index(folder: Path, shards: dict[str, list[OutputTensor]]) -> int:
    """Write `model.safetensors.index.json`; return the total size of the tensors in bytes."""
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_synced(folder / "model.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())
    return total


def is_finished(path: Path, tensors: list[OutputTensor]) -> bool:
    """Whether `path` is a shard of exactly these tensors; a shard gets its name once every byte is on disk."""
    start = _header(tensors)
    if not path.is_file() or path.stat().st_size != len(start) + sum(tensor.nbytes for tensor in tensors):
        return False
    with path.open("rb") as file:
        return file.read(len(start)) == start


@contextmanager
def write_shard(path: Path, tensors: list[OutputTensor]) -> Iterator["ShardWriter"]:
    """Yield the writer of a safetensors file, which gets its name once every byte is on disk.

    Raises `ValueError` when bytes are missing at the end.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        writer = ShardWriter(file, tensors)
        yield writer
        writer.check_complete(path.name)


class ShardWriter:
    """Writes the tensors of a safetensors file, each in any number of pieces."""

    def __init__(self, file: IO[bytes], tensors: list[OutputTensor]) -> None:
        self._file = file
        start = _header(tensors)
        self._next: dict[str, int] = {}
        self._end: dict[str, int] = {}
        offset = len(start)
        for tensor in _in_order(tensors):
            self._next[tensor.name], self._end[tensor.name] = offset, offset + tensor.nbytes
            offset += tensor.nbytes
        self._file.write(start)

    def append(self, name: str, rows: np.ndarray) -> None:
        """Append the bytes of `rows` (C-contiguous, of the tensor's element size) to the tensor `name`."""
        start = self._next[name]
        if start + rows.nbytes > self._end[name]:
            raise ValueError(f"{name}: more bytes than its shape holds")
        self._file.seek(start)
        self._file.write(rows.data.cast("B"))
        self._next[name] = start + rows.nbytes

    def check_complete(self, name: str) -> None:
        """Raise `ValueError`, which calls the file `name`, when bytes of a tensor are missing."""
        short = [name for name, position in self._next.items() if position != self._end[name]]
        if short:
            raise ValueError(f"{name} is not complete: bytes of {short[0]} are missing")


def _in_order(tensors: list[OutputTensor]) -> list[OutputTensor]:
    """Tensors with wider elements first, so that each is aligned to its element size, as the format requires."""
    return sorted(tensors, key=lambda tensor: -_DTYPE_BYTES[tensor.dtype])


def _header(tensors: list[OutputTensor]) -> bytes:
    """The bytes before a shard's data."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for tensor in _in_order(tensors):
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
