"""The settings of a training run; each field is also a flag and a key of `--config`.

Pure data with checks: a value that cannot be used is refused before anything is loaded.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from mlxvr.cli.settings import flag
from mlxvr.errors import ConfigError

__all__ = ["LABEL_FREE", "PROJECTIONS", "SCHEDULES", "TrainConfig", "idle_options"]

SCHEDULES = ("constant", "cosine")
LABEL_FREE = ("agreement", "coherence")
_SINKS = ("tensorboard", "wandb")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how; refuses values that cannot be used.

    Defaults follow the public scripts (arXiv 2601.05175) where a laptop can: group 8 instead of 16, LoRA instead of
    all weights, and so a learning rate of 1e-5 instead of 1e-6.

    Each field is the flag of the same name, with hyphens; its help says what it means.
    """

    model: str | Path | None = field(
        default=None, metadata=flag("model", "folder or Hub id (default: the bundled demo checkpoint)", metavar="M")
    )
    adapter: Path | None = field(
        default=None, metadata=flag("model", "folder of LoRA weights to train on from", metavar="DIR")
    )
    revision: str | None = field(default=None, metadata=flag("model", "branch, tag or commit of a Hub id", metavar="R"))
    dtype: str | None = field(
        default=None, metadata=flag("model", "what to compute in (default: the checkpoint's)", metavar="T")
    )

    data: Path = field(metadata=flag("data", "JSONL, one question a line, or what --format says", metavar="FILE"))
    format: str = field(default="mlxvr", metadata=flag("data", "whose layout the data has", metavar="NAME"))
    media_root: Path | None = field(
        default=None, metadata=flag("data", "folder that holds the media (default: the file's)", metavar="DIR")
    )
    skip_bad_rows: bool = field(
        default=False, metadata=flag("data", "leave rows out that cannot be used, instead of stopping")
    )
    limit: int | None = field(default=None, metadata=flag("data", "use only the first so many rows", metavar="N"))
    filter_only: bool = field(
        default=False,
        metadata=flag("data", "sample each row, write those that are right sometimes to OUTPUT/kept.jsonl, and stop"),
    )
    filter_samples: int = field(default=8, metadata=flag("data", "samples of a row for --filter-only", metavar="N"))
    filter_threshold: float = field(
        default=0.7, metadata=flag("data", "reward from which a sample is right for --filter-only", metavar="X")
    )

    fps: float | None = field(default=None, metadata=flag("frames", "frames to sample per second", metavar="F"))
    max_frames: int | None = field(default=None, metadata=flag("frames", "the most frames to sample", metavar="N"))
    video_tokens: int | None = field(
        default=None, metadata=flag("frames", "the most tokens that a clip may take", metavar="N")
    )
    image_tokens: int | None = field(
        default=None, metadata=flag("frames", "the most tokens that an image may take", metavar="N")
    )

    output: Path = field(metadata=flag("run", "folder for adapter, metrics and state", metavar="DIR"))
    resume: bool = field(default=False, metadata=flag("run", "go on where the run in --output was last saved"))
    epochs: int = field(default=1, metadata=flag("run", "times that every row is seen", metavar="N"))
    steps: int | None = field(
        default=None, metadata=flag("run", "end after so many steps, whatever --epochs says", metavar="N")
    )
    batch_size: int = field(
        default=4,
        metadata=flag(
            "run", "questions of a step, over all ranks; they go through the model one at a time", metavar="N"
        ),
    )
    seed: int = field(default=0, metadata=flag("run", "of order, samples and new weights", metavar="N"))
    save_every: int = field(default=10, metadata=flag("run", "steps between savings", metavar="N"))
    memory_limit: float | None = field(
        default=None,
        metadata=flag(
            "run",
            "refuse to start if more GB would be needed (default: what Metal recommends, elsewhere 90%% of all)",
            metavar="GB",
        ),
    )
    plot: Path | None = field(default=None, metadata=flag("run", "write the curves as PNG or SVG", metavar="FILE"))
    report_to: tuple[str, ...] = field(
        default=(), metadata=flag("run", "also to tensorboard, wandb", metavar="NAME[,NAME]")
    )

    group_size: int = field(default=8, metadata=flag("sampling", "completions of a question", metavar="G"))
    max_completion_tokens: int = field(
        default=1024, metadata=flag("sampling", "the most tokens of a completion", metavar="N")
    )
    max_prompt_tokens: int = field(default=8192, metadata=flag("sampling", "the most tokens of a prompt", metavar="N"))
    temperature: float = field(default=1.0, metadata=flag("sampling", "what to sample at", metavar="T"))
    top_p: float = field(default=1.0, metadata=flag("sampling", "sample from this share of probability", metavar="P"))
    prefill_step_size: int = field(
        default=2048, metadata=flag("sampling", "prompt tokens that go through the model at once", metavar="N")
    )

    reward: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            "reward",
            "agreement and coherence judge rows without answer; module:function or an entry point takes the place of "
            "the paper's reward",
            metavar="NAME[,NAME]",
        ),
    )
    first_weight: float = field(default=0.9, metadata=flag("reward", "of the first answer", metavar="W"))
    second_weight: float = field(default=1.1, metadata=flag("reward", "of the second answer", metavar="W"))
    format_weight: float = field(default=1.0, metadata=flag("reward", "of the format", metavar="W"))
    fallback_weight: float = field(
        default=0.3, metadata=flag("reward", "of declining a direct answer and being right after all", metavar="W")
    )

    loss_type: str = field(default="grpo", metadata=flag("loss", "grpo, bnpo or dr_grpo", metavar="NAME"))
    importance: str = field(
        default="token", metadata=flag("loss", "what has a ratio of its own: token or sequence", metavar="NAME")
    )
    clip_low: float = field(default=0.2, metadata=flag("loss", "a ratio counts down to 1 - X", metavar="X"))
    clip_high: float = field(default=0.2, metadata=flag("loss", "a ratio counts up to 1 + X", metavar="X"))
    beta: float = field(default=0.01, metadata=flag("loss", "of the distance to the model that it was", metavar="X"))
    scale_advantages: bool = field(
        default=True, metadata=flag("loss", "divide advantages by their standard deviation in the group")
    )
    mask_truncated: bool = field(
        default=False, metadata=flag("loss", "do not learn from completions that hit the limit of tokens")
    )
    skip_unanimous: bool = field(
        default=True,
        metadata=flag("loss", "skip groups that all earned the same, which saves their distance's pull as well"),
    )
    updates: int = field(default=1, metadata=flag("loss", "updates from one batch of samples", metavar="N"))
    gradient_checkpointing: bool = field(
        default=False, metadata=flag("loss", "compute layers again instead of keeping them: far less memory")
    )

    rank: int = field(default=16, metadata=flag("adapter", "of the two matrices' product", metavar="N"))
    scale: float = field(default=2.0, metadata=flag("adapter", "of the product", metavar="X"))
    dropout: float = field(default=0.0, metadata=flag("adapter", "share of inputs not seen", metavar="X"))
    dora: bool = field(default=False, metadata=flag("adapter", "also learn the length of each row of a weight"))
    modules: tuple[str, ...] = field(
        default=PROJECTIONS, metadata=flag("adapter", "which projections", metavar="NAME[,NAME]")
    )

    learning_rate: float = field(default=1e-5, metadata=flag("optimizer", "AdamW's, at its highest", metavar="X"))
    schedule: str = field(default="constant", metadata=flag("optimizer", "constant or cosine", metavar="NAME"))
    warmup_steps: int = field(
        default=0, metadata=flag("optimizer", "steps over which the rate rises from 0", metavar="N")
    )
    weight_decay: float = field(default=0.01, metadata=flag("optimizer", "AdamW's", metavar="X"))
    max_grad_norm: float = field(
        default=1.0, metadata=flag("optimizer", "a longer gradient is cut to this length", metavar="X")
    )

    valid: Path | None = field(default=None, metadata=flag("validation", "JSONL to measure on", metavar="FILE"))
    valid_every: int = field(default=50, metadata=flag("validation", "steps between measurements", metavar="N"))
    valid_limit: int | None = field(
        default=None, metadata=flag("validation", "use only the first so many of its rows", metavar="N")
    )
    threshold: float | None = field(
        default=None,
        metadata=flag("validation", "confidence that is sure enough (default: the checkpoint's own)", metavar="T"),
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every", "valid_every", "updates", "max_completion_tokens"):
            self._at_least(name, 1)
        for name in ("max_prompt_tokens", "prefill_step_size"):
            self._at_least(name, 1)
        for name in ("limit", "steps", "valid_limit", "max_frames", "video_tokens", "image_tokens"):
            self._at_least(name, 1, optional=True)
        for name in ("filter_samples", "group_size"):
            self._at_least(name, 2)
        for name in ("warmup_steps", "seed"):
            self._at_least(name, 0)
        self._positive("learning_rate", "temperature", "max_grad_norm", "memory_limit", "fps")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise ConfigError(f"weight_decay is {self.weight_decay}: give a number from 0 up, such as 0.01")
        for name in ("top_p", "threshold", *(() if self.own_reward else ("filter_threshold",))):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}: give a number from 0 to 1")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule {self.schedule!r} is unknown: use {' or '.join(SCHEDULES)}")
        if unknown := sorted(set(self.report_to) - set(_SINKS)):
            raise ConfigError(f"report_to names {unknown[0]!r}: use some of {', '.join(_SINKS)}")
        own = [name for name in self.reward if name not in LABEL_FREE]
        if len(own) > 1:
            raise ConfigError(f"reward names both {own[0]} and {own[1]}: one function can take the paper's place")
        if self.plot is not None and self.plot.suffix.lower() not in (".png", ".svg"):
            raise ConfigError(f"plot is {self.plot}: give a file that ends in .png or .svg")
        if self.filter_only and self.resume:
            raise ConfigError("filter_only goes on by itself where it was stopped: leave resume out")

    @property
    def label_free(self) -> tuple[str, ...]:
        """What judges rows that have no answer; empty: nothing does, and such rows are refused."""
        return tuple(name for name in LABEL_FREE if name in self.reward)

    @property
    def own_reward(self) -> str | None:
        """The user's own reward function by name; None: the paper's."""
        return next((name for name in self.reward if name not in LABEL_FREE), None)

    def _at_least(self, name: str, least: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if not (optional and value is None) and value < least:
            raise ConfigError(f"{name} is {value}: give at least {least}")

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"{name} is {value}: give a number above 0")


# What only training reads; `--filter-only` samples and judges, with its own number of samples.
_TRAINING_ONLY = (
    *("epochs", "steps", "batch_size", "save_every", "plot", "report_to", "group_size"),
    *("first_weight", "second_weight", "format_weight", "fallback_weight"),
    *("loss_type", "importance", "clip_low", "clip_high", "beta", "scale_advantages", "mask_truncated"),
    *("skip_unanimous", "updates", "gradient_checkpointing", "rank", "scale", "dropout", "dora", "modules"),
    *("learning_rate", "schedule", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("valid", "valid_every", "valid_limit", "threshold"),
)
_OF_A_NEW_ADAPTER = ("rank", "scale", "dropout", "dora", "modules")
_OF_THE_PAPERS_REWARD = ("first_weight", "second_weight", "format_weight", "fallback_weight")


def idle_options(config: TrainConfig) -> dict[str, tuple[str, ...]]:
    """The options that differ from their defaults and change nothing, by the reason.

    They are not refused: one file of settings serves filtering and training alike.
    """
    reasons: dict[str, tuple[str, ...]]
    if config.filter_only:
        reasons = {"--filter-only does not train": _TRAINING_ONLY}
    else:
        reasons = {"they are for --filter-only": ("filter_samples", "filter_threshold")}
        if config.adapter is not None:
            reasons["the adapter to train on from has its own"] = _OF_A_NEW_ADAPTER
        if config.own_reward is not None:
            reasons["the paper's reward is not used"] = _OF_THE_PAPERS_REWARD
        if config.valid is None:
            reasons["there are no rows to validate on (--valid)"] = ("valid_every", "valid_limit")
        if config.updates == 1:
            reasons["with one update of a batch every ratio is 1"] = ("importance", "clip_low", "clip_high")
        if config.steps is not None:
            reasons["--steps says when to end"] = ("epochs",)
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    changed = {
        reason: tuple(name for name in names if getattr(config, name) != defaults[name])
        for reason, names in reasons.items()
    }
    return {reason: names for reason, names in changed.items() if names}
