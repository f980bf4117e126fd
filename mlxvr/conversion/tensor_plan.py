"""The plan of a conversion: how every tensor is written, decided from shapes alone, before any weight is read.

The plan knows the output to the byte: its tensors, their sizes and the shard of each. So free disk space is checked
first, and after an interruption the finished shards are recognised.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvr.checkpoint.recipe import Precision, Quantization
from mlxvr.conversion.shards import OutputTensor, plan_shards
from mlxvr.conversion.source import Checkpoint, SourceTensor

__all__ = ["DTYPE_CODES", "Job", "Plan", "RowUpdate", "make_plan", "packed_tensors"]

DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

# (float32 rows of a matrix, index of the first) -> the rows to write; an adapter is fused with it.
RowUpdate = Callable[[mx.array, int], mx.array]


@dataclass(frozen=True)
class Job:
    """A tensor of the source and what is done to it: cast to `dtype`, changed, quantized (`precision`), or copied."""

    source: SourceTensor
    dtype: str
    precision: Precision | None
    outputs: list[OutputTensor]
    update: RowUpdate | None = None


@dataclass(frozen=True)
class Plan:
    """All jobs in order.

    Attributes:
        jobs: one for each tensor of the source.
        stored: module -> precision of its matrix in the output; None: unquantized.
        indivisible: modules that stay unquantized because their rows cannot be divided into groups.
        note: distinguishes this plan from others with the same source and tensors.
    """

    jobs: tuple[Job, ...]
    stored: dict[str, Precision | None]
    indivisible: tuple[str, ...] = ()
    note: str = ""
    shards: dict[str, list[OutputTensor]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", plan_shards(job.outputs for job in self.jobs))

    @property
    def nbytes(self) -> int:
        """Size of all tensors of the output in bytes."""
        return sum(output.nbytes for job in self.jobs for output in job.outputs)

    @property
    def bits(self) -> float:
        """Mean bits of the quantized weights, scales not counted; 16 without quantized weights."""
        counts = [(np.prod(job.source.shape), job.precision.bits) for job in self.jobs if job.precision is not None]
        total = sum(count for count, _ in counts)
        return float(sum(count * bits for count, bits in counts) / total) if total else 16.0

    def fingerprint(self, checkpoint: Checkpoint) -> str:
        """A hash of everything that decides the bytes of the output."""
        jobs = [
            (job.source.key, job.source.dtype, job.dtype, job.precision and asdict(job.precision), str(job.outputs))
            for job in self.jobs
        ]
        parts = [checkpoint.identity(), jobs, list(self.shards), self.note, version("mlx"), version("mlxvr")]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def quantization(self, base: Quantization, is_vision: Callable[[str], bool]) -> dict[str, Any] | None:
        """`quantization` of `config.json`: the usual precision, and an entry for each module with another one.

        None when nothing is quantized.
        """
        if not any(self.stored.values()):
            return None
        usual = Precision(bits=base.bits, group_size=base.group_size, mode=base.mode)
        whole: dict[str, Any] = _entry(usual)
        shapes = {job.source.module: job.source.shape for job in self.jobs if job.source.key.endswith(".weight")}
        for module, precision in self.stored.items():
            # mlx-vlm skips matrices whose size is not divisible by 64 unless they have an entry.
            if precision is not None and (precision != usual or np.prod(shapes[module]) % 64):
                whole[module] = _entry(precision)
            elif precision is None and not is_vision(module):
                whole[module] = False
        return whole


def make_plan(
    checkpoint: Checkpoint,
    choose: Callable[[str], Precision | None],
    dtype: str | None,
    *,
    updates: dict[str, RowUpdate] | None = None,
    note: str = "",
) -> Plan:
    """Decide how every tensor is written.

    Args:
        checkpoint: the source.
        choose: MLX path of a module -> precision of its matrix.
        dtype: dtype of unquantized tensors and of scales, a key of `DTYPE_CODES`; None: each tensor's own.
        updates: module -> change of its rows before they are quantized.
        note: see `Plan`.
    """
    jobs: list[Job] = []
    stored: dict[str, Precision | None] = {}
    indivisible: list[str] = []
    for tensor in checkpoint.tensors:
        if tensor.dtype not in DTYPE_CODES.values() or _is_companion(tensor):
            jobs.append(Job(tensor, tensor.dtype, None, [OutputTensor(tensor.key, tensor.dtype, tensor.shape)]))
            if tensor.key.endswith(".weight"):
                stored[tensor.module] = Precision(**checkpoint.folder.quantization_of(tensor.module))
            continue
        precision = choose(tensor.module) if tensor.is_matrix else None
        if precision is not None and tensor.shape[1] % precision.group_size:
            indivisible.append(tensor.module)
            precision = None
        if tensor.is_matrix:
            stored[tensor.module] = precision
        code = tensor.dtype if dtype is None else DTYPE_CODES[dtype]
        outputs = [OutputTensor(tensor.key, code, tensor.shape)]
        if precision is not None:
            outputs = packed_tensors(tensor.key, tensor.shape, precision, code)
        update = (updates or {}).get(tensor.module) if tensor.is_matrix else None
        jobs.append(Job(tensor, code, precision, outputs, update))
    return Plan(tuple(jobs), stored, tuple(indivisible), note)


def packed_tensors(key: str, shape: tuple[int, ...], precision: Precision, code: str) -> list[OutputTensor]:
    """The tensors of a quantized matrix: 32-bit words, scales and, in the affine mode, biases in the dtype `code`."""
    rows, columns = shape
    module = key.removesuffix(".weight")
    words = OutputTensor(key, "U32", (rows, columns * precision.bits // 32))
    grouped = (rows, columns // precision.group_size)
    if precision.mode != "affine":
        return [words, OutputTensor(f"{module}.scales", "U8", grouped)]
    return [words, *(OutputTensor(f"{module}.{part}", code, grouped) for part in ("scales", "biases"))]


def _is_companion(tensor: SourceTensor) -> bool:
    """Whether a tensor belongs to a quantized weight that is copied, and so keeps its dtype."""
    return tensor.key.endswith((".scales", ".biases")) and len(tensor.shape) == 2


def _entry(precision: Precision) -> dict[str, Any]:
    return {"group_size": precision.group_size, "bits": precision.bits, "mode": precision.mode}
