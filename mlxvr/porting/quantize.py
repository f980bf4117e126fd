"""Converting a checkpoint: a Hub id or folder of float weights becomes a folder of quantized MLX weights.

One tensor after the other is read, a few megabytes of rows at a time, cast, quantized and written to its place in a
shard (see `shards`). Affine quantization works within a row, so rows can be cut anywhere without changing a bit of
the result, and memory depends neither on the model's size nor on its largest tensor. mlx-vlm's converter, which the
layout of the output follows, builds the whole network first.

The output is what stock mlx-vlm loads: MLX's tensor names and layout, `quantization` in `config.json` (written twice,
as mlx-lm's tools do) with an entry for each module that departs from the rest.
"""

import logging
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvr.errors import CheckpointError, ConfigError, RecipeError
from mlxvr.porting import card, hub
from mlxvr.porting import recipe as recipes
from mlxvr.porting.checkpoint import Checkpoint, SourceTensor, all_finite
from mlxvr.porting.hub import Progress
from mlxvr.porting.recipe import Precision, Quantization, Recipe
from mlxvr.porting.shards import OutputTensor, ShardWriter, plan_shards, write_index
from mlxvr.porting.staging import check_target, staged

__all__ = ["ConversionReport", "convert"]

_CHUNK_BYTES = 8 * 2**20  # of the source; large enough for the accelerator, small enough not to be noticed
_SPARE_DISK = 64 * 2**20  # for tokenizer, config and card
_MLX_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
_DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion made.

    `bytes_before` and `bytes_after` count tensors; `indivisible` are the modules that the recipe wanted quantized and
    whose rows cannot be divided into groups; `peak_memory` is the process's largest resident size in bytes.
    """

    path: Path
    source: str
    commit: str
    recipe: str
    bits: int
    group_size: int
    dtype: str
    threshold: float
    parameters: int
    quantized: int
    indivisible: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory: int

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each number of the network, scales and unquantized tensors included."""
        return 8 * self.bytes_after / self.parameters


@dataclass(frozen=True)
class _Job:
    """One tensor of the source and how it is written."""

    source: SourceTensor
    precision: Precision | None
    outputs: list[OutputTensor]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert `source`, a model folder or Hub id of unquantized weights, into the new folder `out`.

    `bits` (2, 3, 4, 6, 8; 0 leaves the weights unquantized), `group_size` (32, 64, 128) and `dtype` ("bfloat16",
    "float16", "float32": scales and what is not quantized) stand above the recipe's; `recipe` is a name or a TOML
    file (None: the checkpoint's own, else its family's). `force` replaces a model folder that lies at `out`.
    `progress(stage, done, total)` counts bytes, stage "download" or "convert".

    `out` appears when it is complete, or not at all. Raises `CheckpointError` for a source that cannot be converted,
    `RecipeError` for a bad recipe or value, `ConfigError` for an output that must not or cannot be written.
    """
    started = time.perf_counter()
    named = None if recipe is None else recipes.load(recipe)
    _check_values(bits, group_size, dtype)
    check_target(Path(out), force=force)
    folder = hub.resolve(source, revision=revision or _pinned(source, named), progress=progress)
    target = check_target(Path(out), folder, force=force)
    checkpoint = Checkpoint.open(folder)
    origin = card.origin(checkpoint.folder, source)
    chosen = named or _choose(checkpoint, origin)
    if chosen.family != checkpoint.folder.family.name:
        raise RecipeError(
            f"the recipe {chosen.name} is for {chosen.family}, the checkpoint is {checkpoint.folder.family.name}; "
            "leave out the recipe, or name one of that family"
        )
    chosen = chosen.with_quantization(bits=bits, group_size=group_size, dtype=dtype)
    jobs, indivisible = _plan(checkpoint, chosen)
    shards = plan_shards(job.outputs for job in jobs)
    _check_disk(target, sum(output.nbytes for job in jobs for output in job.outputs))

    settings = card.settings(checkpoint.folder, origin, chosen, keep_measured=named is None)
    with staged(target) as stage:
        _write_shards(stage, jobs, shards, dtype=_DTYPE_CODES[chosen.quantization.dtype], progress=progress)
        bytes_after = write_index(stage, shards)
        report = ConversionReport(
            path=target,
            source=origin.name,
            commit=origin.commit,
            recipe=chosen.name,
            bits=chosen.quantization.bits,
            group_size=chosen.quantization.group_size,
            dtype=chosen.quantization.dtype,
            threshold=settings["threshold"],
            parameters=checkpoint.parameters,
            quantized=sum(job.precision is not None for job in jobs),
            indivisible=indivisible,
            bytes_before=checkpoint.nbytes,
            bytes_after=bytes_after,
            seconds=time.perf_counter() - started,
            peak_memory=_peak_memory(),
        )
        settings["quantization"]["bits_per_weight"] = round(report.bits_per_weight, 3)
        card.write(stage, checkpoint.folder, _config(checkpoint, chosen, jobs), settings, target.name)
    _log.info("wrote %s: %.2f bits per weight", target, report.bits_per_weight)
    return report


def _check_values(bits: int | None, group_size: int | None, dtype: str | None) -> None:
    """Refuse what no recipe would take, before anything is downloaded."""
    usual = Quantization()
    Quantization(
        bits=usual.bits if bits is None else bits,
        group_size=usual.group_size if group_size is None else group_size,
        dtype=usual.dtype if dtype is None else dtype,
    )


def _pinned(source: str | Path, recipe: Recipe | None) -> str | None:
    """Return the revision that a recipe pins for the Hub id `source`; None for a local folder."""
    if not hub.is_hub_id(source):
        return None
    known = recipe or recipes.for_source(str(source))
    matches = known is not None and known.source.casefold() == str(source).casefold()
    return (known.revision or None) if known is not None and matches else None


def _choose(checkpoint: Checkpoint, origin: card.Origin) -> Recipe:
    """Return the recipe that the folder's own mlxvr.json names, else its source's, else its family's."""
    folder = checkpoint.folder
    named: Any = folder.settings.get("recipe")
    name = named.get("name") if isinstance(named, dict) else named
    if isinstance(name, str) and name in recipes.available():
        return recipes.load(name)
    return recipes.for_source(origin.name) or recipes.for_config(folder.config)


def _plan(checkpoint: Checkpoint, recipe: Recipe) -> tuple[list[_Job], tuple[str, ...]]:
    """Decide what becomes of every tensor; also returns the modules whose rows cannot be divided into groups."""
    code = _DTYPE_CODES[recipe.quantization.dtype]
    jobs, indivisible = [], []
    for tensor in checkpoint.tensors:
        precision = recipe.precision(tensor.module) if tensor.is_matrix else None
        if precision is not None and tensor.shape[1] % precision.group_size:
            indivisible.append(tensor.module)
            precision = None
        if precision is None:
            outputs = [OutputTensor(tensor.key, code, tensor.shape)]
        else:
            rows, columns = tensor.shape
            grouped = (rows, columns // precision.group_size)
            outputs = [
                OutputTensor(tensor.key, "U32", (rows, columns * precision.bits // 32)),
                OutputTensor(f"{tensor.module}.scales", code, grouped),
                OutputTensor(f"{tensor.module}.biases", code, grouped),
            ]
        jobs.append(_Job(tensor, precision, outputs))
    return jobs, tuple(indivisible)


def _check_disk(target: Path, nbytes: int) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes + _SPARE_DISK:
        raise ConfigError(
            f"{parent} has {free / 1e9:.2f} GB free and the output takes {(nbytes + _SPARE_DISK) / 1e9:.2f} GB; "
            "free some space, choose another disk, or use fewer bits"
        )


def _write_shards(
    stage: Path,
    jobs: list[_Job],
    shards: dict[str, list[OutputTensor]],
    *,
    dtype: str,
    progress: Progress | None,
) -> None:
    total = sum(job.source.nbytes for job in jobs)
    done = 0
    waiting = iter(jobs)
    for name, outputs in shards.items():
        with ShardWriter(stage / name, outputs) as writer:
            written = 0
            while written < len(outputs):
                job = next(waiting)
                for values in job.source.chunks(_CHUNK_BYTES):
                    _write_chunk(job, values, writer, dtype)
                    done += values.nbytes
                    if progress is not None:
                        progress("convert", done, total)
                written += len(job.outputs)
                mx.clear_cache()  # buffers of this tensor's sizes; the next one has others


def _write_chunk(job: _Job, values: np.ndarray, writer: ShardWriter, dtype: str) -> None:
    """Cast some rows to `dtype`, quantize them where the recipe says so, and append them to the shard."""
    same = job.source.info.dtype == dtype
    if same and job.precision is None:
        _check_finite(job, values, values, dtype)
        writer.append(job.source.key, values)
        return
    array = mx.array(values)
    if job.source.info.dtype == "BF16":
        array = array.view(mx.bfloat16)
    array = array.astype(_MLX_DTYPES[dtype])
    _check_finite(job, values, values if same else _bits(array), dtype)
    if job.precision is None:
        parts = [array]
    else:
        parts = list(mx.quantize(array, group_size=job.precision.group_size, bits=job.precision.bits))
        mx.eval(parts)
    for output, part in zip(job.outputs, parts, strict=True):
        writer.append(output.name, _bits(part))


def _check_finite(job: _Job, source: np.ndarray, cast: np.ndarray, dtype: str) -> None:
    if all_finite(cast, dtype):
        return
    where = f"{job.source.info.file}: {job.source.key}"
    if not all_finite(source, job.source.info.dtype):
        raise CheckpointError(f"{where} holds NaN or infinity: the checkpoint is damaged, download it again")
    raise CheckpointError(f"{where} holds numbers too large for the chosen dtype; convert with dtype bfloat16")


def _bits(array: mx.array) -> np.ndarray:
    """View an MLX array as numpy sees it; bfloat16 as its bit patterns."""
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _config(checkpoint: Checkpoint, recipe: Recipe, jobs: list[_Job]) -> dict[str, Any]:
    """`config.json` of the output: mlx-vlm's spelling, the new dtype, and how each module is quantized."""
    folder = checkpoint.folder
    config = folder.family.mlx_config(folder.config)
    config.pop("auto_map", None)  # code of the source's repository, which neither travels nor runs
    for section in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(section, dict):
            section.update({key: recipe.quantization.dtype for key in ("dtype", "torch_dtype") if key in section})
    config["torch_dtype"] = recipe.quantization.dtype
    if not any(job.precision for job in jobs):
        return config
    base = Precision(bits=recipe.quantization.bits, group_size=recipe.quantization.group_size)
    whole: dict[str, Any] = {"group_size": base.group_size, "bits": base.bits, "mode": "affine"}
    for job in jobs:
        ours = job.precision
        # mlx-vlm passes over matrices whose size 64 does not divide unless they have an entry.
        if ours is not None and (ours != base or np.prod(job.source.shape) % 64):
            whole[job.source.module] = {"group_size": ours.group_size, "bits": ours.bits, "mode": "affine"}
        elif ours is None and job.source.is_matrix and not folder.family.is_vision(job.source.key):
            whole[job.source.module] = False
    return {**config, "quantization": whole, "quantization_config": whole}


def _peak_memory() -> int:
    """Return the most memory that the process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
