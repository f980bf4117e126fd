"""What a verb is told: a frozen dataclass whose fields are its flags and the keys of its TOML file at once.

A field that can be told carries its group and its help in its metadata (`flag`), so that a name, a type and a default
are written once. `mlxvr.cli.parser` makes the flags; here are the files. A file's keys are the fields' names, and its
paths are relative to where the verb runs, like those of flags. Flags win over a file, a file over the defaults.

    learning_rate = 1e-5
    reward = ["agreement", "coherence"]
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mlxvr.errors import ConfigError
from mlxvr.storage.atomic import replace_file

__all__ = ["Setting", "flag", "read_settings", "settings_of", "write_settings"]


def flag(group: str, help_text: str, **options: Any) -> Mapping[str, Any]:
    """The metadata of a field that is a flag.

    Args:
        group: under which title of the help it stands.
        help_text: what it says there, with `%%` for a percent sign.
        options: go to argparse, such as `metavar`.
    """
    return {"group": group, "help": help_text, **options}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field that can be told.

    Attributes:
        name: of the field.
        kind: bool, int, float, str, Path, or tuple for several texts.
        default: `dataclasses.MISSING` when it has to be told.
        options: its metadata: "group", "help" and what goes to argparse.
    """

    name: str
    kind: type
    default: Any
    options: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """How the command line spells it."""
        return f"--{self.name.replace('_', '-')}"

    def from_text(self, text: str) -> Any:
        """The value of what was written behind the flag; raises `ValueError`."""
        if self.kind is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        return self.kind(text)

    def from_toml(self, value: Any) -> Any:
        """The value of a TOML key; raises `ValueError` when it is of another type."""
        if self.kind is tuple and isinstance(value, list) and all(isinstance(one, str) for one in value):
            return tuple(value)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if self.kind in (tuple, Path) and isinstance(value, str):
            return self.from_text(value)
        if type(value) is not self.kind:
            raise ValueError(f"expected {_KINDS[self.kind]}")
        return value


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path as text",
    tuple: "a list of texts",
}


def settings_of(config: type) -> dict[str, Setting]:
    """The fields of a dataclass, in their order."""
    types = get_type_hints(config)
    return {
        field.name: Setting(
            name=field.name, kind=_kind(types[field.name]), default=field.default, options=dict(field.metadata)
        )
        for field in dataclasses.fields(config)
    }


def read_settings(path: Path, config: type) -> dict[str, Any]:
    """Read the values that a TOML file gives to fields of a dataclass.

    Raises `ConfigError` when it cannot be read, has a key that is no field, or a value of the wrong type.
    """
    try:
        found = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give a TOML file of settings") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML ({error}): write one `name = value` a line") from error
    known, values = settings_of(config), {}
    for key, value in found.items():
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, 1)
            hint = f"is {near[0]} meant?" if near else f"use some of {', '.join(known)}"
            raise ConfigError(f"{path} has the unknown key {key!r}: {hint}")
        try:
            values[key] = known[key].from_toml(value)
        except ValueError as error:
            raise ConfigError(f"{path} says {key} = {value!r}: {error}") from None
    return values


def write_settings(path: Path, config: Any, *, title: str) -> None:
    """Write the values of a dataclass as a TOML file that `read_settings` reads, in one step.

    Paths are made absolute, fields that are None left out.

    Args:
        path: of the file.
        config: the dataclass.
        title: its first line, a comment.

    Raises `ConfigError` when it cannot be written.
    """
    values = {name: getattr(config, name) for name in settings_of(type(config))}
    lines = [f"# {title}", *(f"{name} = {_toml(value)}" for name, value in values.items() if value is not None)]
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    replace_file(path, lambda file: file.write(content))


def _toml(value: Any) -> str:
    if isinstance(value, Path):
        value = str(value.absolute())
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _kind(hint: Any) -> type:
    """What a flag's text is made into: `T` of `T | None`, the text of `str | Path`."""
    if get_origin(hint) is tuple:
        return tuple
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return str if str in kinds else Path if Path in kinds else kinds[0]
