"""The settings for sampling completions of rows and scoring them, which training and `--filter-only` share."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxvr.cli.settings import flag
from mlxvr.errors import ConfigError
from mlxvr.media.frame_options import FrameLimitOptions
from mlxvr.reasoner.load_options import ModelOptions

__all__ = ["LABEL_FREE", "RolloutConfig", "check_at_least", "check_positive"]

LABEL_FREE = ("agreement", "coherence")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(FrameLimitOptions, ModelOptions):
    """Which model answers which rows, and how its completions are sampled and scored.

    The base of `mlxvr.grpo.train_config.TrainConfig`, which adds the settings that only training uses. `adapter` and
    `memory_limit` mean more to a run than to `mlxvr.load`, so they have a help of their own.
    """

    adapter: Path | None = field(
        default=None, metadata=flag("model", "folder of LoRA weights to continue training from", metavar="DIR")
    )
    memory_limit: float | None = field(
        default=None,
        metadata=flag(
            "run",
            "refuse to start if the run would need more (default: what Metal recommends, elsewhere 90%% of all memory)",
            metavar="GB",
        ),
    )

    data: Path = field(metadata=flag("data", "JSONL with one question per line, or see --format", metavar="FILE"))
    format: str = field(default="mlxvr", metadata=flag("data", "layout of the data", metavar="NAME"))
    media_root: Path | None = field(
        default=None, metadata=flag("data", "folder that holds the media (default: the data file's)", metavar="DIR")
    )
    skip_bad_rows: bool = field(
        default=False, metadata=flag("data", "leave out rows that cannot be used instead of stopping")
    )
    limit: int | None = field(default=None, metadata=flag("data", "use only the first N rows", metavar="N"))
    filter_only: bool = field(
        default=False,
        metadata=flag(
            "data", "keep rows whose pass rate is neither 0 nor 1: write them to OUTPUT/kept.jsonl, and stop"
        ),
    )
    filter_samples: int = field(default=8, metadata=flag("data", "completions per row for --filter-only", metavar="N"))
    filter_threshold: float = field(
        default=0.7,
        metadata=flag("data", "reward from which a completion is right for --filter-only", metavar="X"),
    )

    output: Path = field(metadata=flag("run", "folder for adapter, metrics and state", metavar="DIR"))
    resume: bool = field(default=False, metadata=flag("run", "continue the run in --output from its last saved step"))
    seed: int = field(default=0, metadata=flag("run", "seed of data order, sampling and new weights", metavar="N"))

    max_prompt_tokens: int = field(default=8192, metadata=flag("sampling", "maximum tokens of a prompt", metavar="N"))
    temperature: float = field(default=1.0, metadata=flag("sampling", "sampling temperature", metavar="T"))
    top_p: float = field(
        default=1.0, metadata=flag("sampling", "sample from the top tokens with this total probability", metavar="P")
    )

    reward: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            "reward",
            "agreement and coherence score rows without an answer; module:function or an entry point replaces the "
            "paper's reward",
            metavar="NAME[,NAME]",
        ),
    )

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        check_at_least(self, 1, "max_prompt_tokens")
        check_at_least(self, 1, "limit", "max_frames", "video_tokens", "image_tokens")
        check_at_least(self, 2, "filter_samples")
        check_at_least(self, 0, "seed")
        check_positive(self, "temperature", "memory_limit", "fps")
        for name in ("top_p", *(() if self.own_reward else ("filter_threshold",))):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}: give a number from 0 to 1")
        own = [name for name in self.reward if name not in LABEL_FREE]
        if len(own) > 1:
            raise ConfigError(f"reward names both {own[0]} and {own[1]}: only one function can replace the paper's")
        if self.filter_only and self.resume:
            raise ConfigError("filter_only continues by itself where it was stopped: leave resume out")

    @property
    def label_free(self) -> tuple[str, ...]:
        """The scores of rows that have no answer; empty: such rows are refused."""
        return tuple(name for name in LABEL_FREE if name in self.reward)

    @property
    def own_reward(self) -> str | None:
        """The name of the user's own reward function; None: the paper's reward is used."""
        return next((name for name in self.reward if name not in LABEL_FREE), None)


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raise `ConfigError` for the first of the named settings that is below `least`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}: give at least {least}")


def check_positive(config: Any, *names: str) -> None:
    """Raise `ConfigError` for the first of the named settings that is no finite number above 0; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0.0):
            raise ConfigError(f"{name} is {value}: give a number above 0")
