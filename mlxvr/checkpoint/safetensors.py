"""The content of a safetensors file, read from its header alone.

The format (https://huggingface.co/docs/safetensors): eight bytes are the length of a JSON header in little-endian
order, the header maps names to dtype, shape and byte range, and the data follow without gaps. Reading the header takes
a few milliseconds for any size of model, needs no MLX, and detects a truncated or damaged file before any loading.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxvr.errors import CheckpointError

__all__ = ["DTYPE_BYTES", "TensorInfo", "holds_the_same", "read_header"]

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
_PIECE = 1 << 22  # bytes
_LONGEST_HEADER = 100_000_000  # the reference implementation's own limit


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor on disk.

    Attributes:
        file: the file that contains it.
        dtype: as the header spells it ("BF16", "F32", "U32", ..).
        shape: sizes of its axes.
        offsets: first byte and the byte after the last, counted from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the place of each tensor of a file, by name.

    Raises `CheckpointError` when the file is not a safetensors file, is cut short, or has an inconsistent header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or size < 8 + length:
            if len(prefix) == 8 and length > _LONGEST_HEADER:
                raise _damaged(path, "it does not begin like a safetensors file")
            raise _truncated(path, size, 8 + length)
        if length > _LONGEST_HEADER:
            raise _damaged(path, f"its header claims {length} bytes")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    end = max((info.offsets[1] for info in tensors.values()), default=8 + length)
    if size < end:
        raise _truncated(path, size, end)
    if size > end:
        raise _damaged(path, f"it has {size - end} bytes more than its header describes")
    return tensors


def holds_the_same(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; reads in pieces, up to the first difference."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as left, second.file.open("rb") as right:
        left.seek(first.offsets[0])
        right.seek(second.offsets[0])
        remaining = first.offsets[1] - first.offsets[0]
        while remaining > 0:
            size = min(_PIECE, remaining)
            if left.read(size) != right.read(size):
                return False
            remaining -= size
    return True


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [*shape, begin, end]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its header describes {name} in a way that cannot be read") from error
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{path}: {name} has the dtype {dtype!r}, which is not supported: use a bf16 release")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _damaged(path, f"{name} is {dtype} {list(shape)} but takes {end - begin} bytes")
    return TensorInfo(path, dtype, shape, (data_start + begin, data_start + end))


def _truncated(path: Path, size: int, expected: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is cut short: it has {size} bytes, expected at least {expected}: download or copy it again"
    )


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {why}: download or copy it again")
