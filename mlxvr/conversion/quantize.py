"""Conversion of a checkpoint: from a Hub id or folder of float weights to a folder of quantized MLX weights.

`source` checks the headers, `tensor_plan` decides how every tensor is written, and `stream` reads, casts, quantizes and
writes one tensor after the other, into a folder that appears once it is complete (`staging`). mlx-vlm's converter
writes the same layout, but builds the whole network first.

Stock mlx-vlm loads the output: it has MLX's tensor names and layout, and `quantization` in `config.json` (twice, as
mlx-lm's tools write it) with an entry for each module that differs from the rest.
"""

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mlxvr.checkpoint import hub
from mlxvr.checkpoint import recipe as recipes
from mlxvr.checkpoint.defaults import find_recipe
from mlxvr.checkpoint.recipe import Precision, Quantization, Recipe, VerificationLimits
from mlxvr.cli.settings import check_keywords
from mlxvr.conversion import card
from mlxvr.conversion.conversion_options import ConvertKeywords, ConvertOptions
from mlxvr.conversion.shards import is_finished, write_index
from mlxvr.conversion.source import Checkpoint
from mlxvr.conversion.stream import write_shards
from mlxvr.conversion.summary import ConversionReport, peak_memory
from mlxvr.conversion.tensor_plan import Plan, make_plan
from mlxvr.errors import ConfigError, RecipeError, VerificationError
from mlxvr.runtime.device_lock import use_device
from mlxvr.runtime.hooks import Hooks, Progress
from mlxvr.storage.staging import check_target, staged

if TYPE_CHECKING:
    from mlxvr.conversion.measure.verify import VerificationReport

__all__ = ["ConversionReport", "Judge", "NewModel", "choose_recipe", "convert", "convert_with", "write_model"]

_SPARE_DISK = 64 * 2**20  # for tokenizer, config and card
_log = logging.getLogger(__name__)

# A finished folder that does not have its final name yet -> its differences from the source.
Judge = Callable[[Path], "VerificationReport"]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    on_tensor: Callable[[str], None] | None = None,
    **options: Unpack[ConvertKeywords],
) -> ConversionReport:
    """Convert `source`, a model folder or Hub id, into the new folder `out`.

    Args:
        source: weights in float types, or fp8 blocks; quantized MLX weights with `dequantize` only.
        out: the folder to write. It appears when it is complete, or not at all.
        recipe: a name or a TOML file; None: the checkpoint's own, else its family's. The next four stand above it.
        bits: 2, 3, 4, 5, 6, 8, 0 for unquantized weights, or "auto": chosen for each module (see `mixed_precision`).
        group_size: 32, 64 or 128 weights to a scale.
        mode: "affine", or MLX's floating-point formats "mxfp4", "nvfp4" and "mxfp8".
        dtype: "bfloat16", "float16" or "float32", for scales and all that is not quantized.
        target_bytes: with "auto", what the weights of the output may take in all.
        dequantize: unpack quantized MLX weights; the output is unquantized.
        revision: branch, tag or commit of a Hub id.
        verify: compare the result with its source (see `verify`) before it gets its name.
        title: what the model card calls the model, such as the Hub id that it will have; None: as the folder.
        force: replace a model folder that lies at `out`, and keep a result that verification finds too far off.
        progress: called with (stage, done, total); the stages "download", "check" and "convert" count bytes.
        on_tensor: called with the name of each tensor as it is begun.

    Raises:
        CheckpointError: the source cannot be converted.
        RecipeError: a bad recipe or value.
        ConfigError: an output that must not or cannot be written, or options that contradict each other.
        VerificationError: the result is further from its source than the recipe allows; finished shards are kept for
            a second run with `force`.
    """
    check_keywords(options, ConvertKeywords, "progress", "on_tensor")
    return convert_with(ConvertOptions(source=source, out=out, **options), progress=progress, on_tensor=on_tensor)


def convert_with(
    options: ConvertOptions, *, progress: Progress | None = None, on_tensor: Callable[[str], None] | None = None
) -> ConversionReport:
    """Do as `convert` does, for code that has its keywords as an object."""
    started = time.perf_counter()
    source, out, bits = options.source, Path(options.out), options.bits
    named = None if options.recipe is None else recipes.load(options.recipe)
    check_target(out, force=options.force)
    folder = hub.resolve(source, revision=options.revision or _pinned(source, named), progress=progress)
    target = check_target(out, folder, force=options.force)
    prefixes = [(rule.prefix, rule.becomes) for rule in named.key_rules] if named is not None else []
    checkpoint = Checkpoint.open(folder, prefixes=prefixes, unpack=(lambda _: True) if options.dequantize else None)
    origin = card.origin(checkpoint.folder, source)
    chosen = named or choose_recipe(checkpoint, origin)
    if chosen.family != checkpoint.folder.family.name:
        raise RecipeError(
            f"the recipe {chosen.name} is for {chosen.family}, the checkpoint is {checkpoint.folder.family.name}; "
            "leave out the recipe, or name one of that family"
        )
    chosen = chosen.with_quantization(
        bits=0 if options.dequantize else None if isinstance(bits, str) else bits,
        group_size=options.group_size,
        mode=options.mode,
        dtype=options.dtype,
    )
    if checkpoint.folder.family.mlx_config(checkpoint.folder.config)["tie_word_embeddings"]:
        chosen = chosen.with_tied_head()
    precision: Callable[[str], Precision | None] = chosen.precision
    if bits == "auto":
        assert options.target_bytes is not None, "checked with the options"
        precision = _measured(checkpoint, chosen, options.target_bytes, progress)
    plan = make_plan(checkpoint, precision, chosen.quantization.dtype)
    settings = card.settings(checkpoint.folder, origin, chosen, keep_measured=named is None)
    if bits == "auto":
        settings["quantization"] |= {"bits": "auto", "target_bytes": options.target_bytes}

    def judge(stage: Path) -> "VerificationReport":
        from mlxvr.conversion.measure.verify import verify as compare

        return compare(checkpoint.folder, stage, threshold=settings["threshold"], progress=progress)

    report = write_model(
        target,
        NewModel(checkpoint, plan, chosen, origin, settings, options.title),
        judge=judge if options.verify else None,
        force=options.force,
        progress=progress,
        on_tensor=on_tensor,
    )
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


@dataclass(frozen=True, eq=False)
class NewModel:
    """What a model folder is made of.

    Attributes:
        checkpoint: the source, whose other files are taken over.
        plan: what becomes of its tensors.
        recipe: how they are quantized in general, and how far the result may be from its source.
        origin: where the source comes from.
        settings: for `mlxvr.json` (see `card`); gets the figures that are known when the weights are.
        title: see `convert`.
    """

    checkpoint: Checkpoint
    plan: Plan
    recipe: Recipe
    origin: card.Origin
    settings: dict[str, Any]
    title: str | None = None


@use_device()
def write_model(
    target: Path,
    model: NewModel,
    *,
    judge: Judge | None = None,
    force: bool = False,
    progress: Progress | None = None,
    on_tensor: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Carry out a plan and write everything that belongs to a model folder around it.

    Args:
        target: see `staging.staged`.
        model: the plan, and what it was made from.
        judge: compares the finished folder with its source.
        force: keep the folder if it is too far off.
        progress: see `convert`.
        on_tensor: see `convert`.

    Raises what `convert` raises.
    """
    started = time.perf_counter()
    checkpoint, plan, recipe, settings = model.checkpoint, model.plan, model.recipe, model.settings
    usual, title = recipe.quantization, model.title or target.name
    settings["quantization"]["bits_per_weight"] = round(8 * plan.nbytes / checkpoint.parameters, 3)
    config = _config(checkpoint, plan, usual)
    verification: VerificationReport | None = None
    limits: VerificationLimits | None = None
    shortfalls: tuple[str, ...] = ()
    with staged(target, plan.fingerprint(checkpoint)) as stage:
        _check_disk(stage, plan)
        resumed = write_shards(stage, plan, progress=progress, on_tensor=on_tensor)
        write_index(stage, plan.shards)
        peak = peak_memory()
        card.write(stage, checkpoint.folder, config, settings, title)
        if judge is not None:
            verification = judge(stage)
            limits = recipe.limits_for(plan.bits)
            shortfalls = verification.failures(limits)
            if shortfalls and not force:
                raise VerificationError(
                    f"the converted model is too far from its source: {'; '.join(shortfalls)}: use more bits or a "
                    "smaller group size, or --force to keep it",
                    verification,
                )
            settings["verification"] = card.verification(verification.to_dict(limits))
            card.write(stage, checkpoint.folder, config, settings, title)
    report = ConversionReport(
        path=target,
        source=model.origin.name,
        commit=model.origin.commit,
        recipe=recipe.name,
        bits=settings["quantization"]["bits"],
        group_size=usual.group_size,
        mode=usual.mode,
        dtype=usual.dtype,
        threshold=settings["threshold"],
        parameters=checkpoint.parameters,
        quantized=sum(how is not None for how in plan.stored.values()),
        indivisible=plan.indivisible,
        bytes_before=checkpoint.nbytes,
        bytes_after=plan.nbytes,
        shards=len(plan.shards),
        resumed_shards=resumed,
        seconds=time.perf_counter() - started,
        peak_memory=peak,
        verification=verification,
        limits=limits,
        shortfalls=shortfalls,
    )
    _log.info("wrote %s: %.2f bits per weight", target, report.bits_per_weight)
    return report


def _measured(
    checkpoint: Checkpoint, recipe: Recipe, target_bytes: int, progress: Progress | None
) -> Callable[[str], Precision | None]:
    """Choose each module's precision by its measured effect on confidence, without the recipe's rules."""
    from mlxvr.conversion.measure.mixed_precision import choose_precisions

    recipe = dataclasses.replace(recipe, quantization=dataclasses.replace(recipe.quantization, rules=()))
    return choose_precisions(checkpoint, recipe, target_bytes=target_bytes, hooks=Hooks(progress)).get


def _pinned(source: str | Path, recipe: Recipe | None) -> str | None:
    """Return the revision that a recipe pins for the Hub id `source`; None for a local folder."""
    if not hub.is_hub_id(source):
        return None
    repo = hub.repo_id(str(source))
    known = recipe or recipes.for_source(repo)
    matches = known is not None and known.source.casefold() == repo.casefold()
    return (known.revision or None) if known is not None and matches else None


def choose_recipe(checkpoint: Checkpoint, origin: card.Origin) -> Recipe:
    """Return the recipe that also applies to the unconverted checkpoint, see `defaults.find_recipe`."""
    recipe, how = find_recipe(checkpoint.folder, origin.name if origin.is_hub else "")
    _log.info("recipe %s (%s)", recipe.name, how)
    return recipe


def _check_disk(stage: Path, plan: Plan) -> None:
    waiting = [tensors for name, tensors in plan.shards.items() if not is_finished(stage / name, tensors)]
    needed = sum(tensor.nbytes for tensors in waiting for tensor in tensors) + _SPARE_DISK
    free = shutil.disk_usage(stage).free
    if free < needed:
        raise ConfigError(
            f"{stage.parent} has {free / 1e9:.2f} GB free and the output takes {needed / 1e9:.2f} GB; "
            "free some space, choose another disk, or use fewer bits"
        )


def _config(checkpoint: Checkpoint, plan: Plan, base: Quantization) -> dict[str, Any]:
    """`config.json` of the output: mlx-vlm's spelling, the new dtype, and each module's quantization."""
    folder = checkpoint.folder
    config = folder.family.mlx_config(folder.config)
    config.pop("auto_map", None)  # names code in the source's repository, which is neither copied nor run
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    for section in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(section, dict):
            section.update({key: base.dtype for key in ("dtype", "torch_dtype") if key in section})
    config["torch_dtype"] = base.dtype
    whole = plan.quantization(base, lambda module: folder.family.is_vision(f"{module}."))
    return config if whole is None else {**config, "quantization": whole, "quantization_config": whole}
