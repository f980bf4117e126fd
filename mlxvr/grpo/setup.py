"""What a training run begins with, from its settings: rows, model, frames, and what tells it from other runs."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from mlxvr import mathematics
from mlxvr.callbacks import Progress
from mlxvr.dataset import Row, load_rows, to_record
from mlxvr.errors import ConfigError, DataError, MediaError
from mlxvr.grpo.config import TrainConfig
from mlxvr.grpo.formats import read_rows
from mlxvr.grpo.lora import LoraConfig
from mlxvr.grpo.loss import LossConfig
from mlxvr.grpo.memory import MemoryEstimate, estimate_training
from mlxvr.grpo.prompts import write_prompt
from mlxvr.grpo.rollout import prefill_step
from mlxvr.grpo.state import state_file
from mlxvr.media.rows import load_row
from mlxvr.media.spec import VisionSpec
from mlxvr.model import memory
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel
from mlxvr.porting import hub
from mlxvr.reasoner import demo_folder
from mlxvr.rewards import Weights

__all__ = [
    "check_output",
    "estimate_memory",
    "frame_spec",
    "identity",
    "load",
    "lora_config",
    "loss_config",
    "read_training_rows",
    "read_validation_rows",
    "reward_weights",
]

_LOOKED_AT = 8  # rows whose prompts are measured before the start
# What may differ between a run and the one that goes on from it: nothing that decides what a step does.
_FREE = {
    "output", "resume", "steps", "epochs", "save_every", "memory_limit", "plot", "report_to", "skip_bad_rows",
    "valid", "valid_every", "valid_limit", "model", "data", "media_root", "adapter", "revision", "filter_only",
    "filter_samples", "filter_threshold", "limit", "format",
}  # fmt: skip


def frame_spec(config: TrainConfig, model: VideoModel) -> VisionSpec:
    """How frames are sampled and sized: the flags, then the model's own budgets."""
    own = model.spec.with_overrides(**model.settings.get("budgets", {}))
    return own.with_overrides(fps=config.fps, max_frames=config.max_frames, video_tokens=config.video_tokens)


def reward_weights(config: TrainConfig) -> Weights:
    """The weights of the reward's parts."""
    return Weights(
        first=config.first_weight,
        second=config.second_weight,
        format=config.format_weight,
        fallback=config.fallback_weight,
    )


def identity(config: TrainConfig, fingerprint: str, rows: Sequence[Row], total: int) -> dict[str, Any]:
    """What decides the steps of a run, JSON-ready."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(to_record(row, media=row.media), sort_keys=True).encode())
    told = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in _FREE}
    told |= {"weights": fingerprint, "rows": digest.hexdigest()[:16]}
    if config.schedule != "constant":
        told["steps"] = total
    plain: dict[str, Any] = json.loads(json.dumps(told))
    return plain


def estimate_memory(
    config: TrainConfig, model: VideoModel, rows: Sequence[Row], spec: VisionSpec, *, ranks: int = 1
) -> tuple[MemoryEstimate, int]:
    """What a step may need, and how many bytes it may have.

    The prompt is the longest of the first rows, which are read for it, up to the longest that is allowed; completions
    count as if they all hit their limit.

    Args:
        config: of the run.
        model: with LoRA layers.
        rows: to learn from, in any order.
        spec: how their frames are sampled and sized.
        ranks: that share the rows of a step.
    """
    longest, visual, frame = 1, 0, 0
    for row in rows[:_LOOKED_AT]:
        try:
            vision = load_row(row, spec)
            prompt = write_prompt(model, row, vision)
        except (DataError, MediaError):
            continue  # the step that meets it says so
        if len(prompt.ids) > longest:
            longest, visual = len(prompt.ids), int(prompt.media_mask.sum())
            frame = visual // max(1, 0 if vision is None else vision.grid[0])
    longest = min(longest, config.max_prompt_tokens)
    found = estimate_training(
        model,
        prompt_tokens=longest,
        visual_tokens=min(visual, longest),
        frame_tokens=frame,
        group_size=config.group_size,
        completion_tokens=min(config.max_completion_tokens, max(1, model.context_length - longest)),
        checkpoint=config.gradient_checkpointing,
        beta=config.beta,
        accumulate=config.batch_size > 1,
        rows=min(config.batch_size, len(rows)),
        ranks=ranks,
        keep_reference=config.adapter is not None,
        prefill_step=prefill_step(config.prefill_step_size),
    )
    allowed = memory.physical_memory() if config.memory_limit is None else int(config.memory_limit * 1e9)
    return found, allowed


def lora_config(config: TrainConfig) -> LoraConfig:
    """The new adapter that settings ask for; raises `ConfigError` when there can be none."""
    return LoraConfig(
        rank=config.rank, scale=config.scale, dropout=config.dropout, dora=config.dora, keys=config.modules
    )


def read_training_rows(config: TrainConfig) -> tuple[list[Row], list[str]]:
    """The rows to learn from, and why others were left out.

    Raises as `formats.read_rows`; and `ConfigError` when one needs a package that is not installed, before hours of
    work end at that row.
    """
    rows, left_out = read_rows(
        config.data,
        format=config.format,
        media_root=config.media_root,
        skip_bad=config.skip_bad_rows,
        labelled=not config.label_free and config.own_reward is None,
    )
    rows = rows[: config.limit]
    formula = next((row for row in rows if row.kind == "math"), None)
    if formula is not None and (config.filter_only or config.own_reward is None):
        try:
            mathematics.require()
        except ConfigError as error:
            raise ConfigError(f"{formula.line}: {error}") from None
    return rows, left_out


def read_validation_rows(config: TrainConfig) -> list[Row]:
    """The rows to measure on, all with an answer; none without `config.valid`. Raises as `dataset.load_rows`."""
    if config.valid is None:
        return []
    return load_rows(config.valid, media_root=config.media_root if config.format == "mlxvr" else None)[
        : config.valid_limit
    ]


def check_output(config: TrainConfig) -> None:
    """Raise `ConfigError` when the output folder holds a run that this one is not, or no run to go on with."""
    if not config.resume and not config.filter_only and state_file(config.output).exists():
        raise ConfigError(f"{config.output} holds a run already: go on with --resume, or give another folder")
    if config.resume and not state_file(config.output).is_file():
        raise ConfigError(f"{config.output} holds no state to resume from: leave --resume out to start a run there")


def load(config: TrainConfig, progress: Progress | None) -> VideoModel:
    """Load the model without an adapter; raises `CheckpointError`."""
    if config.model is None:
        folder = demo_folder() / "checkpoint"
    else:
        folder = hub.resolve(config.model, revision=config.revision, progress=progress)
    return load_model(folder, dtype=config.dtype)


def loss_config(config: TrainConfig) -> LossConfig:
    """The loss that settings ask for; raises `ConfigError` when it cannot be computed."""
    return LossConfig(
        loss_type=config.loss_type,
        importance=config.importance,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        beta=config.beta,
        mask_truncated=config.mask_truncated,
        max_completion_tokens=config.max_completion_tokens,
    )
