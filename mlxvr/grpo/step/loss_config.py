"""The settings of the loss; `mlxvr.grpo.step.loss` computes it."""

from dataclasses import dataclass, field

from mlxvr.cli.settings import flag
from mlxvr.errors import ConfigError

__all__ = ["IMPORTANCE_SAMPLING_LEVELS", "LOSS_TYPES", "LossConfig"]

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss to minimise, in the words of TRL's GRPOConfig; raises `ConfigError` for a value that cannot be used.

    Attributes:
        loss_type: one of `LOSS_TYPES`.
        importance_sampling_level: one of `IMPORTANCE_SAMPLING_LEVELS`: each token has a ratio (GRPO), or each
            completion (GSPO).
        epsilon: ratios are clipped to [1 - epsilon, 1 + epsilon_high].
        epsilon_high: None: the same as `epsilon`.
        beta: KL coefficient against the reference policy; at 0 the reference policy is not computed.
        mask_truncated: leave out completions that hit the token limit.
        max_completion_tokens: the token limit, which dr_grpo divides by.
    """

    loss_type: str = field(
        default="grpo", metadata=flag("loss", "how token losses are averaged: grpo, bnpo or dr_grpo", metavar="NAME")
    )
    importance_sampling_level: str = field(
        default="token",
        metadata=flag("loss", "importance ratio per token (GRPO) or per sequence (GSPO)", metavar="NAME"),
    )
    epsilon: float = field(default=0.2, metadata=flag("loss", "clip the importance ratio below at 1 - X", metavar="X"))
    epsilon_high: float | None = field(
        default=None,
        metadata=flag("loss", "clip the importance ratio above at 1 + X (default: --epsilon)", metavar="X"),
    )
    beta: float = field(default=0.01, metadata=flag("loss", "KL coefficient against the reference policy", metavar="X"))
    mask_truncated: bool = field(
        default=False, metadata=flag("loss", "leave completions that hit the token limit out of the loss")
    )
    max_completion_tokens: int | None = field(
        default=None, metadata=flag("sampling", "maximum tokens of a completion", metavar="N")
    )

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ConfigError(f"loss_type {self.loss_type!r} is unknown: use one of {', '.join(LOSS_TYPES)}")
        if self.importance_sampling_level not in IMPORTANCE_SAMPLING_LEVELS:
            raise ConfigError(
                f"importance_sampling_level {self.importance_sampling_level!r} is unknown: use one of "
                f"{', '.join(IMPORTANCE_SAMPLING_LEVELS)}"
            )
        if not 0.0 <= self.epsilon <= 1.0:
            raise ConfigError(f"epsilon {self.epsilon} is outside [0, 1]: 0.2 is usual")
        if self.epsilon_high is not None and not 0.0 <= self.epsilon_high < float("inf"):
            raise ConfigError(f"epsilon_high {self.epsilon_high} is no number from 0 up: 0.2 is usual")
        if not 0.0 <= self.beta < float("inf"):
            raise ConfigError(f"beta {self.beta} is no number from 0 up: 0.01 is usual, 0 leaves the reference out")
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            raise ConfigError(f"max_completion_tokens is {self.max_completion_tokens}: give at least 1")
        if self.loss_type == "dr_grpo" and self.max_completion_tokens is None:
            raise ConfigError("loss_type 'dr_grpo' divides by max_completion_tokens: set it")

    @property
    def clip_range(self) -> tuple[float, float]:
        """The smallest and the largest ratio that is not clipped."""
        return 1.0 - self.epsilon, 1.0 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)
