"""TOML tables as frozen dataclasses: every key must be known, every value must have the declared type.

The dataclass is the only place that defines keys, types and defaults. Its `__post_init__` validates values (see
`check_value`); a mistake is one `RecipeError` line with the file and the dotted key.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from mlxvr.errors import RecipeError

__all__ = ["build", "check_value", "without_unset"]


def build(cls: Any, table: Mapping[str, Any], *, where: str, prefix: str = "") -> Any:
    """Build the dataclass `cls` from a table read from `where`; `prefix` is the dotted path of the table.

    Raises `RecipeError` for an unknown or missing key and a value of the wrong type or range.
    """
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
            raise RecipeError(f"{where}: the key {prefix + key!r} is missing; expected a value for it")
    values = {key: _convert(hints[key], value, where=where, key=prefix + key) for key, value in table.items()}
    try:
        return cls(**values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {prefix}{error}") from error


def check_value(key: str, value: object, holds: bool, expected: str) -> None:
    """Raise `RecipeError` unless `holds`."""
    if not holds:
        raise RecipeError(f"{key} = {value!r}; expected {expected}")


def without_unset(value: Any) -> Any:
    """Return plain JSON values of nested dicts and sequences, without None and empty values."""
    if isinstance(value, dict):
        return {key: without_unset(item) for key, item in value.items() if item not in (None, "", (), {})}
    if isinstance(value, list | tuple):
        return [without_unset(item) for item in value]
    return value


def _convert(hint: Any, value: Any, *, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where=where, prefix=f"{key}.")
    arguments = get_args(hint)
    if Ellipsis in arguments:  # tuple[T, ...]
        if not isinstance(value, list):
            raise RecipeError(f"{where}: {key} = {value!r} has the wrong type; expected a list")
        return tuple(_convert(arguments[0], item, where=where, key=key) for item in value)
    accepted = tuple(kind for kind in (arguments or (hint,)) if isinstance(kind, type) and kind is not type(None))
    if float in accepted and type(value) is int:  # 1 may stand for 1.0
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, accepted):
        names = " or ".join(kind.__name__ for kind in accepted)
        raise RecipeError(f"{where}: {key} = {value!r} has the wrong type; expected {names}")
    return value
