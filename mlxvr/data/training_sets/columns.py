"""Columns of a record: what is missing or of the wrong sort is said in one line."""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from mlxvr.data.rows import strip_letters
from mlxvr.data.tables import as_list, segments
from mlxvr.errors import DataError

__all__ = ["Fields", "LeftOut", "Reader", "Source", "interval", "media_path", "options", "text"]

Fields = dict[str, Any]


class LeftOut(Exception):
    """A record is sound but no part of the training mix."""


@dataclass(frozen=True)
class Source:
    """Where a record comes from.

    Attributes:
        stem: the name of its file, without the suffix.
        holds: whether a media path, as a record gives it, is there.
    """

    stem: str
    holds: Callable[[str], bool]


Reader = Callable[[Mapping[str, Any], Source], Fields]


def text(record: Mapping[str, Any], key: str) -> str:
    """A column that holds a text."""
    value = record.get(key)
    if value is None:
        raise DataError(f"the field {key!r} is missing: every record of this format has one")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key} is {_show(value)}: expected a text")
    return value


def options(value: Any) -> list[str]:
    """Choices, without letters: a list, or texts by their letters; written out or not.

    Empty ones at the end are those of a table that has more columns than the question has choices.
    """
    if isinstance(value, str):
        value = _written_out(value)
    if isinstance(value, Mapping):
        return _by_letter(value)
    found = as_list(value)
    if not found or not all(isinstance(one, str) for one in found):
        raise DataError(f"the options are {_show(value)}: expected a list of texts")
    while found and not found[-1].strip():
        found.pop()
    return [one.strip() for one in strip_letters(found)]


def interval(record: Mapping[str, Any], key: str) -> list[list[float]]:
    """Moments in seconds, one or several, their ends in order."""
    if record.get(key) is None:
        raise DataError(f"the field {key!r} is missing: every record of this format has one")
    found = segments(as_list(record[key]))
    if not found:
        raise DataError(f"{key} is {_show(record[key])}: nothing can overlap it; expected [start, end] in seconds")
    return found


def media_path(value: Any, key: str) -> str:
    """The path of the one picture or video of a record.

    Raises `LeftOut` for several: the mix shows one.
    """
    found = list(value) if isinstance(value, list | tuple) else [value]
    if len(found) > 1:
        raise LeftOut(f"{len(found)} files in {key!r}: the mix has one for each question")
    if not found or found[0] is None:
        raise DataError(f"the field {key!r} is missing: every record of this format has one")
    if not isinstance(found[0], str) or not found[0].strip():
        raise DataError(f"{key} is {_show(found[0])}: expected a path; write what the table holds to files first")
    return found[0].removeprefix("./")


def _by_letter(value: Mapping[str, Any]) -> list[str]:
    there = {key: str(one).strip() for key, one in value.items() if one is not None}
    if not there or sorted(there) != list(ascii_uppercase[: len(there)]):
        raise DataError(f"the options have the letters {', '.join(map(str, value)) or 'none'}: expected A, B, C ..")
    return [there[letter] for letter in sorted(there)]


def _written_out(value: str) -> Any:
    """What a table stores as text."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def _show(value: Any) -> str:
    told: Sequence[str] = repr(value)
    return f"{told[:57]}..." if len(told) > 60 else str(told)
