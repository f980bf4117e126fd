"""Recipes: what is known about a checkpoint before it is converted, as data.

A recipe is a TOML file in `convert/` (in a wheel: `mlxvr/_recipes`), one per public checkpoint or family,
and its name is the file's. It says where the weights come from, what stays in high precision, how the rest is
quantized, the confidence at which a direct answer is trusted and the frame budgets that the model works with.
The dataclasses below are the only place where keys, types and defaults are written down; `convert/README.md`
explains them, and a test holds the two together.

Nothing here touches the network or imports mlx.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mlxvr.errors import CheckpointError, RecipeError

__all__ = ["BITS", "DTYPES", "GROUP_SIZES", "Budgets", "Precision", "Quantization", "Recipe", "Rule"]
__all__ += ["available", "for_config", "for_source", "load"]

BITS = (0, 2, 3, 4, 6, 8)  # 0: the weights are not quantized
GROUP_SIZES = (32, 64, 128)
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How one weight matrix is stored: `bits` per weight, one scale and one bias per `group_size` of them."""

    bits: int
    group_size: int


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A floor under the precision of the modules whose MLX path matches `match` (shell pattern)."""

    match: str
    min_bits: int = 8
    group_size: int | None = None  # None: the recipe's

    def __post_init__(self) -> None:
        _check("min_bits", self.min_bits, self.min_bits in BITS[1:], f"one of {BITS[1:]}")
        known = self.group_size is None or self.group_size in GROUP_SIZES
        _check("group_size", self.group_size, known, f"one of {GROUP_SIZES}")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Bits (0: none), weights per scale, the dtype of all that is not quantized, and the exceptions."""

    bits: int = 4
    group_size: int = 64
    dtype: str = "bfloat16"
    keep: tuple[str, ...] = ("vision_tower.*",)
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        _check("bits", self.bits, self.bits in BITS, f"one of {BITS}")
        _check("group_size", self.group_size, self.group_size in GROUP_SIZES, f"one of {GROUP_SIZES}")
        _check("dtype", self.dtype, self.dtype in DTYPES, f"one of {DTYPES}")


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Frame and token budgets of the model; None leaves the checkpoint's processor files in charge."""

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
            _check(key, value, value is None or value > 0, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated recipe. `threshold` is the confidence, in [0, 1], from which a direct answer stands."""

    name: str
    family: str
    threshold: float
    description: str = ""
    source: str = ""
    revision: str = ""
    license: str = ""
    base_model: str = ""
    quantization: Quantization = field(default_factory=Quantization)
    budgets: Budgets = field(default_factory=Budgets)

    def __post_init__(self) -> None:
        _check("threshold", self.threshold, 0.0 <= self.threshold <= 1.0, "a number from 0 to 1")

    def with_quantization(
        self, *, bits: int | None = None, group_size: int | None = None, dtype: str | None = None
    ) -> "Recipe":
        """Copy with the given values in place of the recipe's (None: keep); `RecipeError` for a bad value."""
        ours = self.quantization
        changed = dataclasses.replace(
            ours,
            bits=ours.bits if bits is None else bits,
            group_size=ours.group_size if group_size is None else group_size,
            dtype=ours.dtype if dtype is None else dtype,
        )
        return dataclasses.replace(self, quantization=changed)

    def precision(self, module: str) -> Precision | None:
        """How the weight of `module` (its MLX path, without `.weight`) is stored; None: kept in `dtype`."""
        rules = self.quantization
        if rules.bits == 0 or any(fnmatchcase(module, pattern) for pattern in rules.keep):
            return None
        bits, group_size = rules.bits, rules.group_size
        for rule in rules.rules:
            if fnmatchcase(module, rule.match):
                bits, group_size = max(bits, rule.min_bits), rule.group_size or group_size
        return Precision(bits=bits, group_size=group_size)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without what is unset."""
        return _without_unset(dataclasses.asdict(self))


def available() -> list[str]:
    """Names of the recipes that come with the library, sorted."""
    return sorted(_shipped())


def load(name_or_path: str | Path) -> Recipe:
    """Read a recipe by its name (`available()`) or from a TOML file.

    Raises `RecipeError` when there is none of that name, the file cannot be read, or a key or value is wrong.
    """
    shipped = _shipped()
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    path = Path(name_or_path).expanduser()
    if path.suffix == ".toml":
        return _read(path)
    names = ", ".join(sorted(shipped))
    raise RecipeError(f"no recipe is called {str(name_or_path)!r}; expected one of {names}, or a .toml file")


def for_config(config: Mapping[str, Any]) -> Recipe:
    """Return the recipe of the family that a `config.json` belongs to (`CheckpointError`: none of ours)."""
    model_type = str(config.get("model_type", ""))
    families = {name: recipe for name, recipe in _shipped().items() if name == recipe.family}
    if model_type not in families:
        expected = ", ".join(sorted(families))
        raise CheckpointError(
            f"config.json has model_type {model_type!r}, which no recipe covers; expected one of {expected}"
        )
    return families[model_type]


def for_source(source: str) -> Recipe | None:
    """Return the recipe that was written for the checkpoint of this Hub id, if there is one."""
    for recipe in _shipped().values():
        if recipe.source and recipe.source.casefold() == source.casefold():
            return recipe
    return None


@functools.cache
def _shipped() -> dict[str, Recipe]:
    """Read every recipe that comes with the library, by name: half a dozen small files."""
    recipes = [_read(path) for path in sorted(_folder().glob("*.toml"))]
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
        raise RecipeError(f"{path.name}: the key 'name' is not allowed; a recipe is called as its file is")
    recipe: Recipe = _build(Recipe, {"name": path.stem, **table}, where=path.name, prefix="")
    return recipe


def _build(cls: Any, table: Mapping[str, Any], *, where: str, prefix: str) -> Any:
    """Build a dataclass from a TOML table: every key known, every value of the declared type."""
    hints = get_type_hints(cls)
    for key in table:
        if key not in hints:
            raise RecipeError(f"{where}: unknown key {prefix + key!r}; expected one of {', '.join(sorted(hints))}")
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for key in required:
        if key not in table:
            raise RecipeError(f"{where}: the key {prefix + key!r} is missing; every recipe needs it")
    values = {key: _convert(hints[key], value, where=where, key=prefix + key) for key, value in table.items()}
    try:
        return cls(**values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {prefix}{error}") from error


def _convert(hint: Any, value: Any, *, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _build(hint, value, where=where, prefix=f"{key}.")
    arguments = get_args(hint)
    if Ellipsis in arguments:  # tuple[T, ...]
        if not isinstance(value, list):
            raise RecipeError(f"{where}: {key} = {value!r} has the wrong type; expected a list")
        return tuple(_convert(arguments[0], item, where=where, key=key) for item in value)
    accepted = tuple(kind for kind in (arguments or (hint,)) if isinstance(kind, type) and kind is not type(None))
    if float in accepted and type(value) is int:  # 1 is a fine way to write 1.0
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, accepted):
        names = " or ".join(kind.__name__ for kind in accepted)
        raise RecipeError(f"{where}: {key} = {value!r} has the wrong type; expected {names}")
    return value


def _check(key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise RecipeError(f"{key} = {value!r}; expected {expected}")


def _without_unset(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_unset(item) for key, item in value.items() if item not in (None, "", (), {})}
    if isinstance(value, list | tuple):
        return [_without_unset(item) for item in value]
    return value
