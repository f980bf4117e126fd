"""Which model is loaded and how: the options of `mlxvr.load`, of every verb that loads a model, and of lmms-eval."""

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TypedDict

from mlxvr.answering.sampling_config import is_number, is_whole
from mlxvr.checkpoint.recipe import DTYPES
from mlxvr.cli.settings import flag
from mlxvr.errors import ConfigError

__all__ = ["LoadKeywords", "LoadOptions", "ModelOptions"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is loaded and how, for answers and for training; refuses values that cannot be used when it is built.

    `mlxvr.load` describes the fields.
    """

    model: str | PathLike[str] | None = field(
        default=None, metadata=flag("model", "folder or Hub id (default: the bundled demo checkpoint)", metavar="M")
    )
    adapter: str | PathLike[str] | None = field(
        default=None, metadata=flag("model", "folder of LoRA weights to put on top", metavar="DIR", type=Path)
    )
    revision: str | None = field(default=None, metadata=flag("model", "branch, tag or commit of a Hub id", metavar="R"))
    dtype: str | None = field(
        default=None, metadata=flag("model", "what to compute in (default: the checkpoint's)", choices=DTYPES)
    )
    prefill_step_size: int = field(
        default=2048, metadata=flag("model", "prompt tokens that go through the model at once", metavar="N")
    )
    memory_limit: float | None = field(
        default=None,
        metadata=flag(
            "model", "GB that MLX may use (default: what Metal recommends, elsewhere all memory)", metavar="GB"
        ),
    )

    def __post_init__(self) -> None:
        if not is_whole(self.prefill_step_size) or self.prefill_step_size < 1:
            raise ConfigError(
                f"prefill_step_size {self.prefill_step_size!r} is no whole number above 0: 2048 is the default"
            )
        for name, value in (("model", self.model), ("adapter", self.adapter)):
            if value is not None and not isinstance(value, str | PathLike):
                raise ConfigError(
                    f"{name} is {value!r}: give the path of a folder" + " or a Hub id" * (name == "model")
                )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        if self.memory_limit is not None and not (is_number(self.memory_limit) and self.memory_limit > 0):
            raise ConfigError(f"memory_limit is {self.memory_limit!r}: give gigabytes, a number above 0")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(ModelOptions):
    """How a model is loaded to answer; training never quantizes keys and values. `mlxvr.load` describes the fields."""

    kv_bits: int | None = field(
        default=None, metadata=flag("model", "quantize keys and values to 2, 3, 4, 6 or 8 bits", metavar="N")
    )


class LoadKeywords(TypedDict, total=False):
    """The keywords of `mlxvr.load`: the fields of `LoadOptions` beside the model."""

    adapter: str | PathLike[str] | None
    revision: str | None
    dtype: str | None
    kv_bits: int | None
    prefill_step_size: int
    memory_limit: float | None
