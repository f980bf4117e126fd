"""The settings of a training run; each field is also a flag and a key of `--config`.

Pure data with checks: a value that cannot be used is refused before anything is loaded.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.cli.settings import flag, part_of
from mlxvr.errors import ConfigError
from mlxvr.grading.reward import Weights
from mlxvr.grpo.rollout_config import RolloutConfig, check_at_least, check_positive
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.grpo.step.loss_config import LossConfig

__all__ = ["SCHEDULES", "TrainConfig", "idle_options"]

SCHEDULES = ("constant", "cosine")
_SINKS = ("tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoraConfig, LossConfig, RolloutConfig):
    """What to train, on what, and how; refuses values that cannot be used.

    Defaults follow the public scripts (arXiv 2601.05175) where a laptop can: group 8 instead of 16, LoRA instead of
    all weights, and so a learning rate of 1e-5 instead of 1e-6.

    Each field is the flag of the same name, with hyphens; its help says what it means. The fields of the parts are
    inherited, so that keywords, flags and TOML keys are flat and a default stands in one place; `loss`, `lora` and
    `sampling` are the parts alone.
    """

    epochs: int = field(default=1, metadata=flag("run", "passes over the rows", metavar="N"))
    steps: int | None = field(
        default=None, metadata=flag("run", "end after N steps, whatever --epochs says", metavar="N")
    )
    batch_size: int = field(
        default=4,
        metadata=flag(
            "run", "questions per step, over all ranks; they go through the model one at a time", metavar="N"
        ),
    )
    save_every: int = field(default=10, metadata=flag("run", "save every N steps", metavar="N"))
    plot: Path | None = field(default=None, metadata=flag("run", "write the curves as PNG or SVG", metavar="FILE"))
    report_to: tuple[str, ...] = field(
        default=(), metadata=flag("run", "also log to tensorboard, wandb", metavar="NAME[,NAME]")
    )

    group_size: int = field(default=8, metadata=flag("sampling", "completions per question", metavar="G"))
    max_completion_tokens: int = field(
        default=1024, metadata=flag("sampling", "maximum tokens of a completion", metavar="N")
    )

    first_weight: float = field(
        default=Weights.first, metadata=flag("reward", "w1: weight of the first answer", metavar="W")
    )
    second_weight: float = field(
        default=Weights.second, metadata=flag("reward", "w2: weight of the second answer", metavar="W")
    )
    format_weight: float = field(default=Weights.format, metadata=flag("reward", "weight of the format", metavar="W"))
    fallback_weight: float = field(
        default=Weights.fallback,
        metadata=flag("reward", "bonus for declining first and being right after thinking", metavar="W"),
    )

    scale_rewards: bool = field(
        default=True, metadata=flag("loss", "divide advantages by the standard deviation of the group's rewards")
    )
    skip_zero_advantage: bool = field(
        default=True, metadata=flag("loss", "skip groups with equal rewards (their KL term is skipped too)")
    )
    num_iterations: int = field(
        default=1, metadata=flag("loss", "optimizer updates per sampled batch (1: on-policy)", metavar="N")
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=flag("loss", "recompute layers in the backward pass: slower, far less memory")
    )

    learning_rate: float = field(default=1e-5, metadata=flag("optimizer", "AdamW's peak learning rate", metavar="X"))
    schedule: str = field(
        default="constant", metadata=flag("optimizer", "of the learning rate: constant or cosine", metavar="NAME")
    )
    warmup_steps: int = field(
        default=0, metadata=flag("optimizer", "steps over which the learning rate rises from 0", metavar="N")
    )
    weight_decay: float = field(default=0.01, metadata=flag("optimizer", "AdamW's weight decay", metavar="X"))
    max_grad_norm: float = field(
        default=1.0, metadata=flag("optimizer", "norm to which longer gradients are clipped", metavar="X")
    )

    valid: Path | None = field(default=None, metadata=flag("validation", "JSONL of validation rows", metavar="FILE"))
    valid_every: int = field(default=50, metadata=flag("validation", "validate every N steps", metavar="N"))
    valid_limit: int | None = field(
        default=None, metadata=flag("validation", "use only the first N validation rows", metavar="N")
    )
    threshold: float | None = field(
        default=None,
        metadata=flag(
            "validation", "confidence from which the first answer is final (default: the checkpoint's own)", metavar="T"
        ),
    )

    def __post_init__(self) -> None:
        RolloutConfig.__post_init__(self)
        LossConfig.__post_init__(self)
        LoraConfig.__post_init__(self)
        check_at_least(self, 1, "epochs", "batch_size", "save_every", "valid_every", "num_iterations")
        check_at_least(self, 1, "steps", "valid_limit")
        check_at_least(self, 2, "group_size")
        check_at_least(self, 0, "warmup_steps")
        check_positive(self, "learning_rate", "max_grad_norm")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise ConfigError(f"weight_decay is {self.weight_decay}: give a number from 0 up, such as 0.01")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"threshold is {self.threshold}: give a number from 0 to 1")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule {self.schedule!r} is unknown: use {' or '.join(SCHEDULES)}")
        if unknown := sorted(set(self.report_to) - set(_SINKS)):
            raise ConfigError(f"report_to names {unknown[0]!r}: use some of {', '.join(_SINKS)}")
        if self.plot is not None and self.plot.suffix.lower() not in (".png", ".svg"):
            raise ConfigError(f"plot is {self.plot}: give a file that ends in .png or .svg")

    @property
    def loss(self) -> LossConfig:
        """The settings of the loss alone."""
        return part_of(self, LossConfig)

    @property
    def sampling(self) -> SamplingConfig:
        """How the tokens of a completion are drawn."""
        return SamplingConfig(
            max_tokens=self.max_completion_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )

    @property
    def lora(self) -> LoraConfig:
        """The settings of a new adapter alone."""
        return part_of(self, LoraConfig)


def _names(part: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(part))


_LORA = _names(LoraConfig)
_REWARD_WEIGHTS = ("first_weight", "second_weight", "format_weight", "fallback_weight")
# What `--filter-only` uses, with a number of completions of its own; the other settings are for training alone.
_FOR_FILTERING = (*_names(RolloutConfig), "max_completion_tokens")


def idle_options(config: TrainConfig) -> dict[str, tuple[str, ...]]:
    """The options that differ from their defaults and have no effect, by the reason why.

    They are not refused: one file of settings serves filtering and training alike.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    reasons: dict[str, tuple[str, ...]]
    if config.filter_only:
        training_only = tuple(name for name in defaults if name not in _FOR_FILTERING)
        reasons = {"--filter-only does not train": training_only}
    else:
        reasons = {"they are for --filter-only": ("filter_samples", "filter_threshold")}
        if config.adapter is not None:
            reasons["the adapter to train on from has its own"] = _LORA
        if config.own_reward is not None:
            reasons["the paper's reward is not used"] = _REWARD_WEIGHTS
        if config.valid is None:
            reasons["there are no rows to validate on (--valid)"] = ("valid_every", "valid_limit")
        if config.num_iterations == 1:
            ratios = ("importance_sampling_level", "epsilon", "epsilon_high")
            reasons["with one update per batch every ratio is 1"] = ratios
        if config.steps is not None:
            reasons["--steps says when to end"] = ("epochs",)
    changed = {
        reason: tuple(name for name in names if getattr(config, name) != defaults[name])
        for reason, names in reasons.items()
    }
    return {reason: names for reason, names in changed.items() if names}
