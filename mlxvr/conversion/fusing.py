"""Fusing: an adapter's LoRA weights are merged into the model's own, so that the adapter is no longer needed.

Only the matrices that the adapter changes are computed: each is read row by row, unpacked if it is quantized, changed
in float32 and stored as before (packed again with the same bits, or unquantized with `dequantize`). All other tensors
are copied bit by bit, so memory stays as small as in a conversion (see `stream`).

    LoRA   W + scale * (A B)^T                       A: (inputs, rank), B: (rank, outputs); arXiv 2106.09685
    DoRA   m * (W + scale * (A B)^T) / ||..||        rows scaled to the learned lengths m; arXiv 2402.09353

Packing a changed matrix rounds it again, so the fused model differs from the adapted one as quantized weights differ
from unquantized ones; with `dequantize`, weights are only rounded to their own float type.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import mlx.core as mx

from mlxvr.checkpoint import hub
from mlxvr.checkpoint.recipe import Precision, Quantization, Recipe
from mlxvr.cli.settings import check_keywords
from mlxvr.conversion import card
from mlxvr.conversion.conversion_options import FuseKeywords, FuseOptions
from mlxvr.conversion.quantize import NewModel, choose_recipe, write_model
from mlxvr.conversion.source import Checkpoint
from mlxvr.conversion.summary import ConversionReport
from mlxvr.conversion.tensor_plan import DTYPE_CODES, RowUpdate, make_plan
from mlxvr.errors import CheckpointError
from mlxvr.model.adapter import Adapter
from mlxvr.model.adapter_base import describe_base, warn_of_another_base
from mlxvr.runtime.hooks import Progress
from mlxvr.storage.staging import check_target

__all__ = ["fuse", "fuse_with"]


def fuse(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    on_tensor: Callable[[str], None] | None = None,
    **options: Unpack[FuseKeywords],
) -> ConversionReport:
    """Merge `adapter` into `model` and write the result into the new folder `out`.

    Args:
        model: a model folder or Hub id, quantized or not.
        adapter: a folder with an adapter of mlxvr, mlx-vlm, mlx-lm or PEFT.
        out: the folder to write; it appears once it is complete.
        dequantize: write unquantized weights.
        revision: branch, tag or commit of a Hub id.
        force: replace an existing model folder at `out`.
        progress: called with (stage, done, total); the stages "download", "check" and "convert" count bytes.
        on_tensor: called with the name of each tensor before it is read.

    Raises:
        CheckpointError: the model or the adapter is damaged, or they do not belong together.
        ConfigError: an option does not exist, or the output must not or cannot be written.
    """
    check_keywords(options, FuseKeywords, "progress", "on_tensor")
    return fuse_with(
        FuseOptions(model=model, adapter=adapter, out=out, **options), progress=progress, on_tensor=on_tensor
    )


def fuse_with(
    options: FuseOptions, *, progress: Progress | None = None, on_tensor: Callable[[str], None] | None = None
) -> ConversionReport:
    """Do as `fuse` does, for code that has its keywords as an object."""
    opened, out, dequantize = Adapter.open(Path(options.adapter).expanduser()), Path(options.out), options.dequantize
    check_target(out, force=options.force)
    folder = hub.resolve(options.model, revision=options.revision, progress=progress)
    target = check_target(out, folder, force=options.force)
    checkpoint = Checkpoint.open(folder, unpack=lambda module: dequantize or module in opened.layers)
    updates = _updates(opened, checkpoint)
    warn_of_another_base(opened.folder, opened.config, describe_base(checkpoint.folder))
    recipe = _as_it_is(checkpoint, dequantize=dequantize)
    origin = card.origin(checkpoint.folder, options.model)

    tensors = checkpoint.folder.mlx_tensors()

    def stored(module: str) -> Precision | None:
        packed = not dequantize and f"{module}.scales" in tensors
        return Precision(**checkpoint.folder.quantization_of(module)) if packed else None

    plan = make_plan(checkpoint, stored, None, updates=updates, note=f"fused {opened.fingerprint()}")
    settings = card.settings(checkpoint.folder, origin, recipe, keep_measured=True)
    settings["adapter"] = {"name": opened.folder.resolve().name, "fingerprint": opened.fingerprint()}
    return write_model(
        target,
        NewModel(checkpoint, plan, recipe, origin, settings),
        force=options.force,
        progress=progress,
        on_tensor=on_tensor,
    )


def _as_it_is(checkpoint: Checkpoint, *, dequantize: bool) -> Recipe:
    """The model's recipe, with the quantization and dtype of its folder."""
    folder = checkpoint.folder
    recipe = choose_recipe(checkpoint, card.origin(folder, folder.path))
    names = {code: name for name, code in DTYPE_CODES.items()}
    dtype = next(names[tensor.dtype] for tensor in checkpoint.tensors if tensor.dtype in names)
    whole = None if dequantize else folder.config.get("quantization") or folder.config.get("quantization_config")
    usual = {"bits": 0} if not whole else {key: whole[key] for key in ("bits", "group_size", "mode") if key in whole}
    return dataclasses.replace(recipe, quantization=Quantization(dtype=dtype, **usual))


def _updates(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, RowUpdate]:
    """Module -> the adapter's change of its rows.

    Raises `CheckpointError` when the adapter was made for another model.
    """
    weights = adapter.load()
    shapes = {tensor.module: tensor.shape for tensor in checkpoint.tensors if tensor.is_matrix}
    updates: dict[str, RowUpdate] = {}
    for module, layer in sorted(adapter.layers.items()):
        parts = {part: weights.get(f"{module}.{part}") for part in ("lora_a", "lora_b", "m")}
        first, second, lengths = parts["lora_a"], parts["lora_b"], parts["m"]
        if first is None or second is None or (lengths is None) == adapter.is_dora:
            raise CheckpointError(f"the adapter {adapter.folder} lacks a part of {module}: copy it again")
        shape = (second.shape[-1], first.shape[0])
        if shapes.get(module) != shape or first.shape[1] != second.shape[0]:
            raise CheckpointError(
                f"the adapter {adapter.folder} changes {module} {list(shape)}, which this model does not have in that "
                "shape: it was made for another model"
            )
        updates[module] = _update(first, second, lengths, layer.scale)
    return updates


def _update(first: mx.array, second: mx.array, lengths: mx.array | None, scale: float) -> RowUpdate:
    inner = scale * second.astype(mx.float32).T  # (outputs, rank)
    outer = first.astype(mx.float32).T  # (rank, inputs)

    def change(rows: mx.array, start: int) -> mx.array:
        end = start + rows.shape[0]
        changed = rows + inner[start:end] @ outer
        if lengths is None:
            return changed
        norms = mx.linalg.norm(changed, axis=1)
        return changed * (lengths[start:end].astype(mx.float32) / norms)[:, None]

    return change
