"""Recipes: data about a checkpoint that is known before its conversion.

A recipe is a TOML file in `convert/` (in a wheel: `mlxvr/_recipes`), one per public checkpoint or family, and its name
is the file's. It contains the source of the weights and the names of their tensors, what stays in high precision, how
the rest is quantized, the limits of a verification, the system prompt, the confidence from which a direct answer is
taken, and the model's frame and token limits. The dataclasses below are the only place that defines keys, types and
defaults; `convert/README.md` explains them, and a test compares the two.

This module uses neither the network nor mlx.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlxvr.checkpoint.toml_tables import build, check_value, without_unset
from mlxvr.errors import CheckpointError, RecipeError
from mlxvr.storage.paths import list_visible

__all__ = ["BITS", "DTYPES", "GROUP_SIZES", "MODES", "FrameLimits", "KeyRule", "Precision", "Quantization", "Recipe"]
__all__ += ["Rule", "VerificationLimits", "available", "for_config", "for_source", "load", "register"]

BITS = (0, 2, 3, 4, 5, 6, 8)  # 0: the weights are not quantized
GROUP_SIZES = (32, 64, 128)
DTYPES = ("bfloat16", "float16", "float32")
_HEAD = "language_model.lm_head"
_EMBEDDING = "language_model.model.embed_tokens"


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The format of a weight matrix: `bits` per weight, one scale (affine: and one bias) per `group_size` weights."""

    bits: int
    group_size: int
    mode: str = "affine"


# MLX's floating-point modes have one size each; None: bits and groups are free.
_FIXED = {
    "affine": None,
    "mxfp4": Precision(bits=4, group_size=32, mode="mxfp4"),
    "nvfp4": Precision(bits=4, group_size=16, mode="nvfp4"),
    "mxfp8": Precision(bits=8, group_size=32, mode="mxfp8"),
}
MODES = tuple(_FIXED)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A lower bound on the precision of the modules whose MLX path matches `match` (shell pattern)."""

    match: str
    min_bits: int = 8
    group_size: int | None = None  # None: the recipe's
    mode: str | None = None  # None: the recipe's, if it has that many bits, else affine

    def __post_init__(self) -> None:
        check_value("min_bits", self.min_bits, self.min_bits in BITS[1:], f"one of {BITS[1:]}")
        known = self.group_size is None or self.group_size in GROUP_SIZES
        check_value("group_size", self.group_size, known, f"one of {GROUP_SIZES}")
        check_value("mode", self.mode, self.mode is None or self.mode in MODES, f"one of {MODES}")
        fixed = _FIXED[self.mode or "affine"]
        if fixed is not None:
            expected = f"at most the {fixed.bits} bits of {self.mode}"
            check_value("min_bits", self.min_bits, self.min_bits <= fixed.bits, expected)

    def covers(self, module: str) -> bool:
        """Whether the rule applies to the module with this MLX path."""
        return fnmatchcase(module, self.match)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Bits (0: unquantized), weights per scale, MLX's mode, the dtype of unquantized tensors, and the exceptions."""

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"
    dtype: str = "bfloat16"
    keep: tuple[str, ...] = ("vision_tower.*",)
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        check_value("mode", self.mode, self.mode in MODES, f"one of {MODES}")
        fixed = _FIXED[self.mode]
        if fixed is None:
            check_value("bits", self.bits, self.bits in BITS, f"one of {BITS}")
            check_value("group_size", self.group_size, self.group_size in GROUP_SIZES, f"one of {GROUP_SIZES}")
        else:
            check_value("bits", self.bits, self.bits in (0, fixed.bits), f"{fixed.bits}, the bits of {self.mode}")
            check_value(
                "group_size", self.group_size, self.group_size == fixed.group_size, f"{self.mode}'s {fixed.group_size}"
            )
        check_value("dtype", self.dtype, self.dtype in DTYPES, f"one of {DTYPES}")

    def changed(
        self,
        *,
        bits: int | None = None,
        group_size: int | None = None,
        mode: str | None = None,
        dtype: str | None = None,
    ) -> "Quantization":
        """Copy with new values (None: the old value); a new mode brings its own bits and group size.

        Raises `RecipeError` for a value that cannot be used.
        """
        base = self
        if mode is not None and mode != self.mode:
            check_value("mode", mode, mode in MODES, f"one of {MODES}")
            usual = _FIXED[mode] or Quantization()
            base = dataclasses.replace(self, mode=mode, bits=usual.bits, group_size=usual.group_size)
        return dataclasses.replace(
            base,
            bits=base.bits if bits is None else bits,
            group_size=base.group_size if group_size is None else group_size,
            dtype=base.dtype if dtype is None else dtype,
        )

    def precision(self, module: str) -> Precision | None:
        """The precision of the weight of `module` (its MLX path, without `.weight`); None: unquantized, in `dtype`."""
        if self.bits == 0 or any(fnmatchcase(module, pattern) for pattern in self.keep):
            return None
        bits, group_size, mode = self.bits, self.group_size, self.mode
        for rule in self.rules:
            if rule.covers(module):
                bits = max(bits, rule.min_bits)
                group_size = rule.group_size or group_size
                mode = rule.mode or mode
        fixed = _FIXED[mode]
        if fixed is None:
            return Precision(bits=bits, group_size=group_size)
        if bits <= fixed.bits:
            return fixed
        return Precision(bits=bits, group_size=group_size if group_size in GROUP_SIZES else Quantization.group_size)


@dataclass(frozen=True, kw_only=True)
class KeyRule:
    """Replaces the beginning `prefix` of a tensor's name on disk by `becomes`."""

    prefix: str
    becomes: str = ""


@dataclass(frozen=True, kw_only=True)
class VerificationLimits:
    """The accepted differences of a converted model from its source, for at least `bits` bits (16: unquantized).

    `logits_error` is relative, `top1` (a lower limit) and `flipped_exits` are shares, `kl` is in nats per token,
    `confidence_drift` is the mean absolute difference; None: no limit.
    """

    bits: int
    logits_error: float | None = None
    top1: float | None = None
    kl: float | None = None
    confidence_drift: float | None = None
    flipped_exits: float | None = None

    def __post_init__(self) -> None:
        check_value("bits", self.bits, self.bits in (*BITS[1:], 16), f"one of {(*BITS[1:], 16)}")
        for key in ("logits_error", "top1", "kl", "confidence_drift", "flipped_exits"):
            value = getattr(self, key)
            check_value(key, value, value is None or value >= 0, "a number of at least 0")

    @property
    def limits_anything(self) -> bool:
        """Whether any figure has a limit."""
        return any(value is not None for name, value in dataclasses.asdict(self).items() if name != "bits")


# For weights that nobody has measured yet: error and KL of random weights with a margin; the others are judgement.
_USUAL_LIMITS = (
    VerificationLimits(bits=16, logits_error=0.02, kl=0.001, confidence_drift=0.005, flipped_exits=0.05),
    VerificationLimits(bits=8, logits_error=0.12, kl=0.006, confidence_drift=0.01, flipped_exits=0.05),
    VerificationLimits(bits=6, logits_error=0.15, kl=0.01, confidence_drift=0.02, flipped_exits=0.07),
    VerificationLimits(bits=5, logits_error=0.25, kl=0.03, confidence_drift=0.04, flipped_exits=0.09),
    VerificationLimits(bits=4, logits_error=0.45, kl=0.1, confidence_drift=0.08, flipped_exits=0.1),
    VerificationLimits(bits=3, logits_error=0.8, kl=0.4, confidence_drift=0.15, flipped_exits=0.2),
)


@dataclass(frozen=True, kw_only=True)
class FrameLimits:
    """The model's frame and token limits; for None, the checkpoint's processor files decide."""

    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    frame_min_tokens: int | None = None
    frame_max_tokens: int | None = None
    video_tokens: int | None = None
    image_min_tokens: int | None = None
    image_max_tokens: int | None = None

    def __post_init__(self) -> None:
        for key, value in dataclasses.asdict(self).items():
            check_value(key, value, value is None or value > 0, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated recipe; `threshold` is the confidence, in [0, 1], from which a direct answer is taken."""

    name: str
    family: str
    threshold: float
    description: str = ""
    source: str = ""
    revision: str = ""
    license: str = ""
    base_model: str = ""
    system_prompt: str = ""  # empty: VideoAuto-R1's own
    key_rules: tuple[KeyRule, ...] = ()
    quantization: Quantization = field(default_factory=Quantization)
    verification: tuple[VerificationLimits, ...] = _USUAL_LIMITS
    frame_limits: FrameLimits = field(default_factory=FrameLimits)

    def __post_init__(self) -> None:
        check_value("threshold", self.threshold, 0.0 <= self.threshold <= 1.0, "a number from 0 to 1")

    def with_quantization(self, **changes: Any) -> "Recipe":
        """Copy with other quantization; arguments and errors are those of `Quantization.changed`."""
        return dataclasses.replace(self, quantization=self.quantization.changed(**changes))

    def with_tied_head(self) -> "Recipe":
        """Copy for a checkpoint with a tied head: rules for the head also apply to the embedding."""
        quantization = self.quantization
        heads = [dataclasses.replace(rule, match=_EMBEDDING) for rule in quantization.rules if rule.covers(_HEAD)]
        return dataclasses.replace(
            self, quantization=dataclasses.replace(quantization, rules=(*quantization.rules, *heads))
        )

    def precision(self, module: str) -> Precision | None:
        """See `Quantization.precision`."""
        return self.quantization.precision(module)

    def limits_for(self, bits: float) -> VerificationLimits:
        """The limits for weights of `bits` bits (16: unquantized): of the tables up to `bits`, that with the most bits.

        If all tables have more bits, the one with the fewest is used; without tables, nothing is limited.
        """
        ordered = sorted(self.verification, key=lambda limits: limits.bits)
        fitting = [limits for limits in ordered if limits.bits <= bits] or ordered[:1]
        return fitting[-1] if fitting else VerificationLimits(bits=16)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without unset ones."""
        return without_unset(dataclasses.asdict(self))


def available() -> list[str]:
    """Names of the recipes that come with the library, and of those that were registered, sorted."""
    return sorted(_shipped())


def load(name_or_path: str | Path) -> Recipe:
    """Read a recipe by its name (see `available`) or from a TOML file.

    Raises `RecipeError` when no recipe has the name, the file cannot be read, or a key or value is wrong.
    """
    shipped = _shipped()
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    path = Path(name_or_path).expanduser()
    if path.suffix == ".toml":
        return _read(path)
    names = ", ".join(sorted(shipped))
    raise RecipeError(f"no recipe is called {str(name_or_path)!r}; expected one of {names}, or a .toml file")


def register(path: str | Path) -> Recipe:
    """Make the recipe of a TOML file outside the package known under the file's name, in this process.

    A family that is registered from outside needs one that is called as it is. Raises what `load` raises, and
    `RecipeError` for the name of another recipe.
    """
    recipe = _read(Path(path).expanduser())
    if _shipped().get(recipe.name, recipe) != recipe:
        raise RecipeError(f"{path}: a recipe called {recipe.name!r} exists already; give the file another name")
    _shipped()[recipe.name] = recipe
    return recipe


def for_config(config: Mapping[str, Any]) -> Recipe:
    """Return the recipe of the family of a `config.json`; raises `CheckpointError` for any other family."""
    model_type = str(config.get("model_type", ""))
    families = {name: recipe for name, recipe in _shipped().items() if name == recipe.family}
    if model_type not in families:
        expected = ", ".join(sorted(families))
        raise CheckpointError(
            f"config.json has model_type {model_type!r}, which no recipe covers; expected one of {expected}"
        )
    return families[model_type]


def for_source(source: str) -> Recipe | None:
    """Return the recipe that was written for the checkpoint with this Hub id; None: there is none."""
    for recipe in _shipped().values():
        if recipe.source and recipe.source.casefold() == source.casefold():
            return recipe
    return None


@functools.cache
def _shipped() -> dict[str, Recipe]:
    """Every recipe by name: half a dozen small files come with the library, `register` adds others."""
    recipes = [_read(path) for path in list_visible(_folder(), "*.toml")]
    return {recipe.name: recipe for recipe in recipes}


def _folder() -> Path:
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_recipes", package.parent / "convert"):  # a wheel, an editable install
        if folder.is_dir():
            return folder
    raise RecipeError(f"the recipes are missing from {package}: the installation is incomplete, install mlxvr again")


def _read(path: Path) -> Recipe:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} is not valid TOML: {error}") from error
    if "name" in table:
        raise RecipeError(f"{path.name}: the key 'name' is not allowed; the file's name is the recipe's name")
    recipe: Recipe = build(Recipe, {"name": path.stem, **table}, where=path.name)
    return recipe
