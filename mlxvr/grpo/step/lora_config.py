"""The settings of a new adapter; `mlxvr.grpo.step.lora` attaches it."""

import math
from dataclasses import dataclass, field

from mlxvr.cli.settings import flag
from mlxvr.errors import ConfigError

__all__ = ["PROJECTIONS", "LoraConfig"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """How many weights are trained, and where; raises `ConfigError` for a value that cannot be used.

    Attributes:
        rank: LoRA rank, PEFT's `r`.
        scale: what the product of the two matrices is multiplied with, PEFT's `lora_alpha / r`.
        dropout: share of a layer's inputs that the matrices do not see while a gradient is computed. Sampling uses no
            dropout, so the importance ratio is exactly 1 only without it.
        dora: use DoRA: also learn the length of each row of the weight (arXiv 2402.09353).
        target_modules: the last names of the adapted modules, from `PROJECTIONS`, in every layer of the language model.
    """

    rank: int = field(default=16, metadata=flag("adapter", "LoRA rank", metavar="N"))
    scale: float = field(default=2.0, metadata=flag("adapter", "LoRA scale (alpha / rank)", metavar="X"))
    dropout: float = field(default=0.0, metadata=flag("adapter", "LoRA dropout", metavar="X"))
    dora: bool = field(default=False, metadata=flag("adapter", "use DoRA: also learn the length of each weight row"))
    target_modules: tuple[str, ...] = field(
        default=PROJECTIONS, metadata=flag("adapter", "projections that get an adapter", metavar="NAME[,NAME]")
    )

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank {self.rank} is not positive: 16 is usual")
        if not (math.isfinite(self.scale) and self.scale > 0.0):
            raise ConfigError(f"scale {self.scale} is not a positive number: 2 is usual")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout {self.dropout} is outside [0, 1): 0 is usual")
        unknown = sorted(set(self.target_modules) - set(PROJECTIONS))
        if unknown or not self.target_modules:
            named = repr(unknown[0]) if unknown else "no module"
            raise ConfigError(f"target_modules name {named}: use some of {', '.join(PROJECTIONS)}")
