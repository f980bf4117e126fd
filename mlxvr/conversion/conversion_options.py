"""What a conversion and a fusing are set to: the options of `convert` and `fuse`, and of their verbs."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from mlxvr.checkpoint.recipe import BITS, DTYPES, GROUP_SIZES, MODES, Quantization
from mlxvr.cli.settings import flag
from mlxvr.errors import ConfigError, RecipeError

__all__ = ["ConvertKeywords", "ConvertOptions", "FuseKeywords", "FuseOptions"]


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


def _bits(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        bits = 0 if text == "none" else int(text)
    except ValueError:
        bits = -1
    if bits not in BITS or text == "0":
        raise argparse.ArgumentTypeError(f"{text!r} is not one of none, auto, {_listed(BITS[1:])}")
    return bits


def _size(text: str) -> int:
    """Gigabytes as bytes."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes above 0")
    return round(size * 1e9)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What is converted, and how; refuses values that no recipe accepts when it is built, before any download.

    `convert` describes the fields.
    """

    source: str | Path = field(
        metadata=flag("where", "the checkpoint: a Hub id or a folder", metavar="ID_OR_DIR", spelling="--hf-path")
    )
    out: str | Path = field(metadata=flag("where", "the folder to write", metavar="DIR", spelling="--mlx-path"))
    revision: str | None = field(
        default=None, metadata=flag("where", "branch, tag or commit of the Hub repository", metavar="R")
    )
    recipe: str | Path | None = field(
        default=None,
        metadata=flag(
            "weights", "a recipe's name or TOML file (default: the checkpoint's own)", metavar="NAME_OR_FILE"
        ),
    )
    bits: int | str | None = field(
        default=None,
        metadata=flag(
            "weights",
            f"bits per weight: none, {_listed(BITS[1:])}, or auto: what each module needs (default: the recipe's)",
            metavar="B",
            type=_bits,
            spelling="--q-bits",
        ),
    )
    target_bytes: int | None = field(
        default=None,
        metadata=flag(
            "weights",
            "with --q-bits auto: gigabytes of weights to fit in",
            metavar="N",
            type=_size,
            spelling="--target-gb",
        ),
    )
    group_size: int | None = field(
        default=None,
        metadata=flag(
            "weights",
            f"weights per scale: {_listed(GROUP_SIZES)}",
            metavar="G",
            choices=GROUP_SIZES,
            spelling="--q-group-size",
        ),
    )
    mode: str | None = field(
        default=None,
        metadata=flag(
            "weights", f"format of the weights: {_listed(MODES)}", metavar="M", choices=MODES, spelling="--q-mode"
        ),
    )
    dequantize: bool = field(default=False, metadata=flag("weights", "unpack quantized MLX weights instead"))
    dtype: str | None = field(
        default=None,
        metadata=flag("weights", f"of the unquantized tensors: {_listed(DTYPES)}", metavar="T", choices=DTYPES),
    )
    verify: bool = field(default=False, metadata=flag("result", "compare the result with its source before it is kept"))
    force: bool = field(
        default=False,
        metadata=flag("result", "replace a model folder in the way; also keep a result that fails --verify"),
    )
    title: str | None = None

    def __post_init__(self) -> None:
        groups_or_mode = self.group_size is not None or self.mode is not None
        if (self.bits == "auto") != (self.target_bytes is not None):
            raise ConfigError("bits chosen for each module need a size: give --q-bits auto and --target-gb together")
        if self.bits == "auto" and groups_or_mode:
            raise ConfigError(
                "bits that are measured bring their groups and mode: leave out --q-group-size and --q-mode"
            )
        if self.dequantize and (self.bits not in (None, 0) or groups_or_mode):
            raise ConfigError("dequantized weights have no bits, groups or mode: leave out the --q options")
        if isinstance(self.bits, str) and self.bits != "auto":
            raise RecipeError(f"bits = {self.bits!r}; expected a number or 'auto'")
        bits = None if isinstance(self.bits, str) else self.bits
        usual = Quantization() if self.mode is not None or bits is None else Quantization(bits=bits)
        usual.changed(bits=bits, group_size=self.group_size, mode=self.mode, dtype=self.dtype)


class ConvertKeywords(TypedDict, total=False):
    """The keywords of `convert`: the fields of `ConvertOptions` beside source and output."""

    revision: str | None
    recipe: str | Path | None
    bits: int | str | None
    target_bytes: int | None
    group_size: int | None
    mode: str | None
    dequantize: bool
    dtype: str | None
    verify: bool
    force: bool
    title: str | None


@dataclass(frozen=True, kw_only=True)
class FuseOptions:
    """What is fused, and how. `fuse` describes the fields."""

    model: str | Path = field(metadata=flag("where", "the model that the adapter was trained on", metavar="ID_OR_DIR"))
    adapter: str | Path = field(metadata=flag("where", "the adapter's folder", metavar="DIR"))
    out: str | Path = field(metadata=flag("where", "the folder to write", metavar="DIR", spelling="--mlx-path"))
    revision: str | None = field(
        default=None, metadata=flag("where", "branch, tag or commit of the Hub repository", metavar="R")
    )
    dequantize: bool = field(
        default=False, metadata=flag("result", "write all weights unquantized, so that none is rounded again")
    )
    force: bool = field(default=False, metadata=flag("result", "replace a model folder that is in the way"))


class FuseKeywords(TypedDict, total=False):
    """The keywords of `fuse`: the fields of `FuseOptions` beside model, adapter and output."""

    revision: str | None
    dequantize: bool
    force: bool
