"""What a training run starts from, by its settings: rows, model, frames, and the run's identity."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlxvr.checkpoint.defaults import Defaults
from mlxvr.data.rows import Row, load_rows, to_record
from mlxvr.data.training_sets import read_rows
from mlxvr.errors import CheckpointError, ConfigError, DataError, MediaError
from mlxvr.grading import math_equality
from mlxvr.grading.reward import Weights
from mlxvr.grpo.memory.memory_estimate import MemoryEstimate, estimate
from mlxvr.grpo.memory.workload import workload_of
from mlxvr.grpo.prompt_lengths import PromptLengths, first_too_long, measure_prompts
from mlxvr.grpo.step.rollout import prefill_step
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.grpo.train_state import read_state, state_file
from mlxvr.media.spec import VisionSpec
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel
from mlxvr.reasoner.reasoner import find_folder
from mlxvr.runtime import device_memory
from mlxvr.runtime.hooks import Progress

__all__ = [
    "check_lengths",
    "check_output",
    "check_rows",
    "check_sizes",
    "default_threshold",
    "estimate_memory",
    "frame_spec",
    "identity",
    "load",
    "read_training_rows",
    "read_validation_rows",
    "reward_weights",
]

_SHARE = 0.9  # of all memory that a run may need where Metal recommends no limit
# The settings that may differ when a run is resumed: none of them decides what a step does.
_FREE = {
    "output", "resume", "steps", "epochs", "save_every", "memory_limit", "plot", "report_to", "skip_bad_rows",
    "valid", "valid_every", "valid_limit", "model", "data", "media_root", "adapter", "revision", "filter_only",
    "filter_samples", "filter_threshold", "limit", "format",
}  # fmt: skip


def frame_spec(config: TrainConfig, model: VideoModel) -> VisionSpec:
    """How frames are sampled and sized: by the flags, else by the checkpoint's own limits."""
    return config.applied_to(_defaults(model).spec)


def reward_weights(config: TrainConfig) -> Weights:
    """The weights of the reward's parts."""
    return Weights(
        first=config.first_weight,
        second=config.second_weight,
        format=config.format_weight,
        fallback=config.fallback_weight,
    )


def identity(
    config: TrainConfig, model: VideoModel, fingerprint: str, rows: Sequence[Row], total: int
) -> dict[str, Any]:
    """The values that decide the steps of a run, JSON-ready, with those that settings leave to the checkpoint."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(to_record(row, media=row.media), sort_keys=True).encode())
    names = [field.name for field in dataclasses.fields(config) if field.name not in _FREE]
    values = {name: getattr(config, name) for name in names}
    spec = frame_spec(config, model)
    values |= {name: getattr(spec, name) for name in ("fps", "max_frames", "video_tokens")}
    values["threshold"] = default_threshold(model) if config.threshold is None else config.threshold
    values["frames"] = hashlib.sha256(repr(spec).encode()).hexdigest()[:16]
    values["system_prompt"] = hashlib.sha256(model.system_prompt.encode()).hexdigest()[:16]
    values |= {"weights": fingerprint, "rows": digest.hexdigest()[:16]}
    if config.schedule != "constant":
        values["steps"] = total
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def estimate_memory(
    config: TrainConfig, model: VideoModel, lengths: PromptLengths, rows: int, *, ranks: int = 1
) -> tuple[MemoryEstimate, int]:
    """Estimate the memory of a step, or with `filter_only` of sampling; also returns the allowed bytes.

    The prompt is the longest that was measured, and all completions count as hitting their limit. Allowed are
    `memory_limit`, else what Metal recommends, else nine tenths of the memory.

    Args:
        config: of the run.
        model: with LoRA layers, if it will be trained.
        lengths: of the prompts.
        rows: number of rows.
        ranks: number of ranks that share the rows of a step.
    """
    longest = lengths.longest
    work = workload_of(
        model,
        prompt_tokens=longest,
        visual_tokens=min(lengths.visual, longest),
        frame_tokens=lengths.frame,
        group_size=config.filter_samples if config.filter_only else config.group_size,
        completion_tokens=min(config.max_completion_tokens, max(1, model.context_length - longest)),
        checkpoint=config.gradient_checkpointing,
        beta=config.beta,
        accumulate=config.batch_size > 1,
        rows=1 if config.filter_only else min(config.batch_size, rows),
        ranks=ranks,
        keep_reference=config.adapter is not None and not config.filter_only,
        prefill_step=prefill_step(config.prefill_step_size),
        samples_only=config.filter_only,
    )
    if config.memory_limit is not None:
        return estimate(work), int(config.memory_limit * 1e9)
    usable = device_memory.usable_memory()
    return estimate(work), usable if device_memory.backend() == "metal" else int(_SHARE * usable)


def check_rows(config: TrainConfig, rows: Sequence[Row]) -> None:
    """Raise `MediaError` for the first row whose file is missing, unless `skip_bad_rows` leaves such rows out."""
    if config.skip_bad_rows:
        return
    for row in rows:
        path = row.video or row.image
        if path is not None and not path.exists():
            raise MediaError(f"{row.line}: {path} does not exist: check the path; --skip-bad-rows leaves such rows out")


def check_sizes(
    config: TrainConfig,
    model: VideoModel,
    rows: Sequence[Row],
    spec: VisionSpec,
    *,
    note: Callable[[str], None],
    ranks: int = 1,
) -> None:
    """Refuse prompts that are too long and steps that cannot fit, and note what a step needs.

    Raises:
        DataError: a prompt is too long; with `skip_bad_rows`: all are.
        OutOfMemoryError: a step would not fit.
    """
    lengths = measure_prompts(model, rows, spec, max_prompt_tokens=config.max_prompt_tokens)
    note(lengths.describe())
    left_out = check_lengths(config, model, lengths, spec)
    if left_out is not None:
        note(left_out)
    need, allowed = estimate_memory(config, model, lengths, len(rows), ranks=ranks)
    for line in need.describe().splitlines():
        note(line)
    need.refuse_over(allowed)


def check_lengths(config: TrainConfig, model: VideoModel, lengths: PromptLengths, spec: VisionSpec) -> str | None:
    """Refuse prompts that are too long before anything is written; returns a note on rows that will be left out.

    Raises `DataError` when one is too long, or with `skip_bad_rows` when all are.
    """
    count = len(lengths.too_long)
    if count == 0:
        return None
    reason = first_too_long(model, lengths, spec, max_prompt_tokens=config.max_prompt_tokens)
    if reason is None:
        return None
    if not config.skip_bad_rows:
        more = f" ({count:,} rows have such a prompt)" if count > 1 else ""
        raise DataError(f"{reason}{more}; --skip-bad-rows leaves such rows out")
    if count == lengths.total:
        raise DataError(f"all {count:,} rows have prompts that are too long; the first: {reason}")
    return f"{count:,} of {lengths.measured:,} rows have prompts that are too long and will be left out: {reason}"


def read_training_rows(config: TrainConfig) -> tuple[list[Row], list[str]]:
    """The rows to learn from, and the reasons why rows were left out.

    Raises as `training_sets.read_rows`; and `ConfigError` when a row needs a package that is not installed, so that the
    run does not end there after hours.
    """
    rows, left_out = read_rows(
        config.data,
        format=config.format,
        media_root=config.media_root,
        skip_bad=config.skip_bad_rows,
        labelled=not config.label_free and config.own_reward is None,
    )
    rows = rows[: config.limit]
    if config.own_reward is None:
        _require_mathematics(rows)
    return rows, left_out


def read_validation_rows(config: TrainConfig) -> list[Row]:
    """The validation rows, all with an answer; none without `config.valid`. Raises as `read_training_rows`."""
    if config.valid is None or config.filter_only:
        return []
    root = config.media_root if config.format == "mlxvr" else None
    rows = load_rows(config.valid, media_root=root)[: config.valid_limit]
    _require_mathematics(rows)
    return rows


def _require_mathematics(rows: Sequence[Row]) -> None:
    """Raise `ConfigError` where a row needs `math-verify` and it is not installed."""
    formula = next((row for row in rows if row.kind == "math"), None)
    if formula is None:
        return
    try:
        math_equality.require()
    except ConfigError as error:
        raise ConfigError(f"{formula.line}: {error}") from None


def check_output(config: TrainConfig) -> None:
    """Raise `ConfigError` when the output folder holds another run, or with `resume` when it holds none.

    A run that has done no step does not count.
    """
    if config.resume:
        if not state_file(config.output).is_file():
            read_state(config.output)  # raises that there is none
    elif not config.filter_only and state_file(config.output).exists() and not _is_unbegun(config.output):
        raise ConfigError(f"{config.output} holds a run already: continue it with --resume, or give another folder")


def _is_unbegun(output: Path) -> bool:
    try:
        return read_state(output).step == 0
    except CheckpointError:  # damaged: a run that somebody may want to save
        return False


def load(config: TrainConfig, progress: Progress | None) -> VideoModel:
    """Load the model without an adapter; raises `CheckpointError`, or `ConfigError` for a revision of what has none."""
    folder = find_folder(config.model, revision=config.revision, progress=progress)
    model = load_model(folder, dtype=config.dtype)
    model.system_prompt = _defaults(model).system_prompt
    return model


def default_threshold(model: VideoModel) -> float:
    """The checkpoint's own threshold."""
    return _defaults(model).threshold


def _defaults(model: VideoModel) -> Defaults:
    assert model.folder is not None, "made by load_model"
    return Defaults.of(model.folder)
