"""How tokens are chosen and how many there may be, for answers and for rollouts alike."""

from dataclasses import dataclass, field
from numbers import Integral, Real

from mlxvr.cli.settings import flag
from mlxvr.errors import ConfigError

__all__ = ["SamplingConfig", "is_number", "is_whole"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are chosen; refuses values that cannot be used when it is built.

    Attributes:
        temperature: 0 decodes greedily; above 0 samples. Confidence is read at temperature 1 either way.
        top_p: sample from the smallest set of tokens that holds this much probability.
        seed: makes sampling repeatable.
        max_tokens: the most tokens that are generated.
    """

    max_tokens: int = field(default=4096, metadata=flag("sampling", "the most tokens of an answer", metavar="N"))
    temperature: float = field(default=0.0, metadata=flag("sampling", "0 decodes greedily", metavar="T"))
    top_p: float = field(default=1.0, metadata=flag("sampling", "sample from this share of probability", metavar="P"))
    seed: int | None = field(default=None, metadata=flag("sampling", "makes sampling repeatable", metavar="N"))

    def __post_init__(self) -> None:
        for name, number in (("temperature", self.temperature), ("top_p", self.top_p)):
            if not is_number(number):
                raise ConfigError(f"{name} {number!r} is no number: give one such as 0.97")
        if not is_whole(self.max_tokens):
            raise ConfigError(f"max_tokens {self.max_tokens!r} is no whole number: give one such as 4096")
        if self.seed is not None and not (is_whole(self.seed) and 0 <= self.seed < 2**64):
            raise ConfigError(f"seed {self.seed!r} cannot be used: give a whole number from 0 on")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens {self.max_tokens} leaves no room for an answer: use at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature} cannot be used: 0 is greedy, 1 the model's own")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p {self.top_p} is outside (0, 1]: 1 keeps every token")


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)
