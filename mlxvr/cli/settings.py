"""What a verb is set to: a frozen dataclass whose fields are its flags, its TOML keys and its arguments at once.

A field that is a flag carries its group and its help in its metadata (`flag`), so that a name, a type and a default
are written once. Dataclasses inherit such fields from those that other verbs use, too (`LoadOptions`,
`FrameLimitOptions`); `same_as` takes a single one over. `mlxvr.cli.parser` makes the flags; here one reader serves TOML
files and arguments that another program parsed. A file's keys are the fields' names, and its paths are relative to
where the verb runs, like those of flags. Flags win over a file, a file over the defaults.

    learning_rate = 1e-5
    reward = ["agreement", "coherence"]
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mlxvr.errors import ConfigError
from mlxvr.storage.atomic import replace_file

__all__ = [
    "Setting",
    "check_keywords",
    "flag",
    "part_of",
    "read_arguments",
    "read_settings",
    "same_as",
    "settings_of",
    "write_settings",
]

_Part = TypeVar("_Part")
_UNSET = frozenset({"", "none", "null"})  # what a text says that leaves an argument at its default


def flag(group: str, help_text: str, **options: Any) -> Mapping[str, Any]:
    """The metadata of a field that is a flag.

    Args:
        group: under which title of the help it stands.
        help_text: what it says there, with `%%` for a percent sign.
        options: go to argparse, such as `metavar`; `spelling` is the flag where it is not the field's name.
    """
    return {"group": group, "help": help_text, **options}


def same_as(config: type, name: str, group: str) -> Any:
    """A dataclass field with the default and the help of another dataclass's field, in a group of its own."""
    source = next(field for field in dataclasses.fields(config) if field.name == name)
    return dataclasses.field(default=source.default, metadata={**source.metadata, "group": group})


def part_of(config: Any, part: type[_Part]) -> _Part:
    """The fields that a dataclass inherited from `part`, as an object of `part` alone."""
    return part(**{field.name: getattr(config, field.name) for field in dataclasses.fields(part)})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field that can be set.

    Attributes:
        name: of the field.
        kind: bool, int, float, str, Path, or tuple for several texts.
        default: `dataclasses.MISSING` when it has to be set.
        options: its metadata: "group", "help" and what goes to argparse, "choices" among it.
    """

    name: str
    kind: type
    default: Any
    options: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """How the command line spells it."""
        return str(self.options.get("spelling", f"--{self.name.replace('_', '-')}"))

    def from_text(self, text: str) -> Any:
        """The value of what was written behind the flag; raises `ValueError`."""
        if self.kind is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        return self.kind(text)

    def from_toml(self, value: Any) -> Any:
        """The value of a TOML key; raises `ValueError` when it is of another type, or none of its choices."""
        if self.kind is tuple and isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if self.kind in (tuple, Path) and isinstance(value, str):
            return self.from_text(value)
        if type(value) is not self.kind:
            raise ValueError(f"expected {_KINDS[self.kind]}")
        return self._checked(value)

    def from_argument(self, value: Any) -> Any:
        """The value of an argument that another program made a text or a number of; raises `ValueError`.

        None, "None" and the empty text stand for the default, and 8.0 for the whole number 8.
        """
        if value is None or (isinstance(value, str) and value.strip().lower() in _UNSET):
            return self.default
        if self.kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if self.kind is str:
            return self._checked(str(value))
        return self.from_toml(value)

    def _checked(self, value: Any) -> Any:
        choices = self.options.get("choices")
        if choices is not None and value not in choices:
            raise ValueError(f"use one of {', '.join(map(str, choices))}")
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
            name=field.name,
            kind=_kind(types[field.name], field.metadata),
            default=field.default,
            options={**_choices(types[field.name]), **field.metadata},
        )
        for field in dataclasses.fields(config)
    }


def check_keywords(names: Mapping[str, object], keywords: type, *more: str) -> None:
    """Refuse names that are neither keywords of a `TypedDict` nor in `more`; `ConfigError` names the nearest one."""
    options = dict.fromkeys([*keywords.__annotations__, *more])
    for name in names:
        if name not in options:
            raise ConfigError(f"there is no option {name!r}: {_nearest(name, options)}")


def read_settings(path: Path, config: type) -> dict[str, Any]:
    """Read the values that a TOML file gives to fields of a dataclass.

    Raises `ConfigError` when it cannot be read, has a key that is no field, or a value of the wrong type.
    """
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give a TOML file of settings") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML ({error}): write one `name = value` a line") from error
    return _read(content, settings_of(config), Setting.from_toml, f"{path} has the unknown key", f"{path} says")


def read_arguments(
    arguments: Mapping[str, Any], config: type, *, subject: str, names: Mapping[str, str]
) -> dict[str, Any]:
    """Read the values that arguments by name, parsed by another program, give to fields of a dataclass.

    Args:
        arguments: values by name: texts, numbers, None.
        config: the dataclass.
        subject: what a message calls one of them, such as "model argument".
        names: fields by the name that the other program has for them.

    Raises `ConfigError` for a name that is no field and a value that cannot be used.
    """
    spellings = {field: name for name, field in names.items()}
    settings = {spellings.get(name, name): setting for name, setting in settings_of(config).items()}
    return _read(arguments, settings, Setting.from_argument, f"there is no {subject}", subject)


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


def _read(
    values: Mapping[str, Any],
    settings: Mapping[str, Setting],
    convert: Callable[[Setting, Any], Any],
    unknown: str,
    says: str,
) -> dict[str, Any]:
    """The one reader: names are those of `settings`, values are of their types; the result is by the fields' names."""
    result = {}
    for name, value in values.items():
        if name not in settings:
            raise ConfigError(f"{unknown} {name!r}: {_nearest(name, settings)}")
        try:
            result[settings[name].name] = convert(settings[name], value)
        except ValueError as error:
            raise ConfigError(f"{says} {name} = {value!r}: {error}") from None
    return result


def _nearest(name: str, names: Mapping[str, object]) -> str:
    """Advice on a name that does not exist."""
    near = difflib.get_close_matches(name.replace("-", "_"), names, 1)
    return f"did you mean {near[0]!r}?" if near else f"use some of {', '.join(names)}"


def _toml(value: Any) -> str:
    if isinstance(value, PathLike):
        value = str(Path(value).absolute())
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _kind(hint: Any, metadata: Mapping[str, Any]) -> type:
    """What a flag's text is made into: `T` of `T | None`, the text of `str | Path`, or what its `type` says."""
    if get_origin(hint) is tuple:
        return tuple
    if metadata.get("type") is Path:
        return Path
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if get_origin(hint) is Literal or get_origin(kinds[0]) is Literal:
        return str
    return str if str in kinds else Path if Path in kinds else kinds[0]


def _choices(hint: Any) -> dict[str, Any]:
    """The choices of a `Literal`, or of one that may be None."""
    literal = next((kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal), None)
    return {} if literal is None else {"choices": get_args(literal)}
