"""The execution of a plan: rows are read, cast, changed, quantized and appended to shards, a few megabytes at a time.

Quantization works within a row, so the split into chunks of rows changes no bit of the result, and memory depends
neither on the model's size nor on its largest tensor. A shard that an interrupted run has finished is skipped, and its
source tensors are not read again.
"""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxvr.checkpoint.weight_formats import as_mlx, as_numpy
from mlxvr.conversion.shards import ShardWriter, is_finished, write_shard
from mlxvr.conversion.source import all_finite
from mlxvr.conversion.tensor_plan import Job, Plan
from mlxvr.errors import CheckpointError
from mlxvr.runtime.hooks import Progress

__all__ = ["write_shards"]

_CHUNK_BYTES = 8 * 2**20  # of the source: large enough for the accelerator, negligible in memory
_MLX_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def write_shards(
    stage: Path, plan: Plan, *, progress: Progress | None = None, on_tensor: Callable[[str], None] | None = None
) -> int:
    """Write every shard of `plan` that is not in `stage` yet; return the number of shards that were.

    `progress("convert", done, total)` counts bytes of the source; `on_tensor(name)` is called before a tensor is read.
    Raises `CheckpointError` for numbers that are not finite.
    """
    total = sum(job.source.nbytes for job in plan.jobs)
    done = resumed = 0
    waiting = iter(plan.jobs)
    for name, outputs in plan.shards.items():
        jobs: list[Job] = []
        while sum(len(job.outputs) for job in jobs) < len(outputs):
            jobs.append(next(waiting))
        if is_finished(stage / name, outputs):
            resumed += 1
            done += sum(job.source.nbytes for job in jobs)
            continue
        with write_shard(stage / name, outputs) as writer:
            for job in jobs:
                if on_tensor is not None:
                    on_tensor(job.source.key)
                before, read = done, 0
                for values in job.source.chunks(_CHUNK_BYTES):
                    _write_rows(job, values, read, writer)
                    read += values.shape[0] if values.ndim else 1
                    done = before + job.source.nbytes * read // max(1, job.source.shape[0] if job.source.shape else 1)
                    if progress is not None:
                        progress("convert", done, total)
                mx.clear_cache()  # its buffers have this tensor's sizes; the next tensor needs others
    return resumed


def _write_rows(job: Job, values: np.ndarray, first: int, writer: ShardWriter) -> None:
    """Cast some rows, change and quantize them if the job demands it, and append them to the shard."""
    same = job.source.dtype == job.dtype
    if same and job.precision is None and job.update is None:
        _check_finite(job, values, values)
        writer.append(job.source.key, values)
        return
    array = as_mlx(values, job.source.dtype)
    if job.update is not None:
        array = job.update(array.astype(mx.float32), first)
    array = array.astype(_MLX_DTYPES[job.dtype])
    _check_finite(job, values, values if same and job.update is None else as_numpy(array))
    parts = [array]
    if job.precision is not None:
        how = job.precision
        parts = list(mx.quantize(array, group_size=how.group_size, bits=how.bits, mode=how.mode))
    mx.eval(parts)
    for output, part in zip(job.outputs, parts, strict=True):
        writer.append(output.name, as_numpy(part))


def _check_finite(job: Job, source: np.ndarray, cast: np.ndarray) -> None:
    if all_finite(cast, job.dtype):
        return
    where = f"{job.source.format.infos[0].file}: {job.source.key}"
    if not all_finite(source, job.source.dtype):
        raise CheckpointError(f"{where} holds NaN or infinity: the checkpoint is damaged, download it again")
    raise CheckpointError(f"{where} holds numbers too large for the chosen dtype; convert with dtype bfloat16")
