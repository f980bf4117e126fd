"""Read the columns of a record; a missing or wrong value raises an error of one line."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from mlxvr.data.jsonl import show_value
from mlxvr.data.option_letters import strip_letters
from mlxvr.data.tables import as_list, segments
from mlxvr.errors import DataError

__all__ = ["Fields", "LeftOut", "RecordReader", "Source", "interval", "media_path", "options", "text"]

Fields = dict[str, Any]


class LeftOut(Exception):
    """A record is valid but does not belong to the training mix."""


@dataclass(frozen=True)
class Source:
    """The origin of a record.

    Attributes:
        stem: the name of its file, without the suffix.
        holds: returns whether the file of a media path, as a record writes it, exists.
    """

    stem: str
    holds: Callable[[str], bool]


RecordReader = Callable[[Mapping[str, Any], Source], Fields]


def text(record: Mapping[str, Any], key: str) -> str:
    """Return the value of a column that must hold a text."""
    value = record.get(key)
    if value is None:
        raise DataError(f"the field {key!r} is missing: every record of this format has one")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key} is {show_value(value)}: expected a text")
    return value


def options(value: Any) -> list[str]:
    """Return choices without their letters, given as a list or as a mapping of letters to texts, or as text of either.

    Empty choices at the end are dropped: a table may have more columns than the question has choices.
    """
    if isinstance(value, str):
        value = _evaluated(value)
    if isinstance(value, Mapping):
        return _by_letter(value)
    choices = as_list(value)
    if not choices or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"the options are {show_value(value)}: expected a list of texts")
    while choices and not choices[-1].strip():
        choices.pop()
    return [choice.strip() for choice in strip_letters(choices)]


def interval(record: Mapping[str, Any], key: str) -> list[list[float]]:
    """Return the intervals of a column, one or several, in seconds, with their ends in order."""
    if record.get(key) is None:
        raise DataError(f"the field {key!r} is missing: every record of this format has one")
    intervals = segments(as_list(record[key]))
    if not intervals:
        raise DataError(f"{key} is {show_value(record[key])}: nothing can overlap it; expected [start, end] in seconds")
    return intervals


def media_path(value: Any, key: str) -> str:
    """Return the path of the single picture or video of a record.

    Raises `LeftOut` for several: every question of the mix has one.
    """
    paths = list(value) if isinstance(value, list | tuple) else [value]
    if len(paths) > 1:
        raise LeftOut(f"{len(paths)} files in {key!r}: the mix has one for each question")
    if not paths or paths[0] is None:
        raise DataError(f"the field {key!r} is missing: every record of this format has one")
    if not isinstance(paths[0], str) or not paths[0].strip():
        raise DataError(f"{key} is {show_value(paths[0])}: expected a path; write the table's images to files first")
    return paths[0].removeprefix("./")


def _by_letter(value: Mapping[str, Any]) -> list[str]:
    choices = {letter: str(choice).strip() for letter, choice in value.items() if choice is not None}
    if not choices or sorted(choices) != list(ascii_uppercase[: len(choices)]):
        raise DataError(f"the options have the letters {', '.join(map(str, value)) or 'none'}: expected A, B, C ..")
    return [choices[letter] for letter in sorted(choices)]


def _evaluated(value: str) -> Any:
    """Return the list or mapping that a table stores as Python text; the text itself if it is neither."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value
