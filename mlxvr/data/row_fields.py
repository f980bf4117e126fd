"""Check the fields of a row, and bring its answer into one form.

Errors name the field and no line: `mlxvr.data.rows` puts the line in front.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal, TypeAlias, get_args

from mlxvr.data.jsonl import show_value
from mlxvr.errors import DataError

__all__ = ["GradingKind", "GroundTruth", "RowFields"]

GradingKind = Literal["exact_match", "math", "iou", "gqa"]
GroundTruth: TypeAlias = str | list[Any]

_ALIASES = {"qa": "exact_match", "grounding": "iou", "grounded_qa": "gqa"}
_LETTER = re.compile(r"\(?([A-Z])(?:\)|[.:)]\s.*|[.:]|$)", re.DOTALL)


@dataclass(frozen=True)
class RowFields:
    """The fields of one row; its methods raise `DataError` with what they found and what to write instead."""

    record: Mapping[str, Any]

    def identity(self) -> str:
        """Return the id as text; it may be written as a whole number."""
        value = self.record.get("id")
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return str(value) if is_number else self.text("id", required=True)

    def text(self, key: str, *, required: bool = False) -> str:
        """Return a text field; "" if it is missing and not required."""
        value = self.record.get(key)
        if value is None and not required:
            return ""
        if key not in self.record:
            raise DataError(f"the field {key!r} is missing: every row needs one")
        if not isinstance(value, str):
            raise DataError(f"{key} is {show_value(value)}: expected a text")
        if required and not value.strip():
            raise DataError(f"{key} is empty: expected a text")
        return value

    def kind(self) -> GradingKind:
        """Return the kind under its name here; "exact_match" if the row names none."""
        value = self.record.get("kind")
        value = "exact_match" if value is None else value
        value = _ALIASES.get(value, value) if isinstance(value, str) else value
        if value not in get_args(GradingKind):
            raise DataError(f"kind {show_value(value)} is unknown: use one of {', '.join(get_args(GradingKind))}")
        return value  # type: ignore[return-value]

    def options(self, kind: GradingKind) -> tuple[str, ...]:
        """Return the choices as they are written; () without any."""
        value = self.record.get("options")
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(
            isinstance(option, str) and option.strip() for option in value
        ):
            raise DataError(f"options are {show_value(value)}: expected a list of texts, none of them empty")
        if len(value) > len(ascii_uppercase):
            raise DataError(f"{len(value)} options are more than there are letters: give at most 26")
        if value and kind == "iou":
            raise DataError("a row of kind iou has no options: leave them out, or use the kind gqa")
        return tuple(value)

    def seconds(self, key: str, video: str) -> float | None:
        """Return a field of a row with a video as a number of at least 0; None if it is missing."""
        value = self.record.get(key)
        if value is None:
            return None
        if not _is_number(value) or value < 0:
            raise DataError(f"{key} is {show_value(value)}: expected a number that is at least 0")
        if not video:
            raise DataError(f"{key} is for videos, and the row has none: leave it out")
        return float(value)

    def answer(self, kind: GradingKind, options: tuple[str, ...], labelled: bool) -> GroundTruth | None:
        """Return the ground truth in the form of `Row.answer`; None if it is missing and not required."""
        value = self.record.get("answer")
        if value is None and not labelled:
            return None
        if value is None:
            raise DataError("the field 'answer' is missing: every row needs one")
        if kind == "iou":
            return _segments(value)
        if kind == "gqa":
            return _grounded_answer(value, options)
        return _text_answer(value, options)


def _text_answer(value: Any, options: tuple[str, ...]) -> str:
    text = str(value) if _is_number(value) else value
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"answer is {show_value(value)}: expected a text, such as 'B' or '42'")
    text = text.strip()
    letter = _choice(text, options) if options else text
    if not letter:
        last = ascii_uppercase[len(options) - 1]
        raise DataError(
            f"answer {show_value(value)} is none of the {len(options)} options: give a letter from A to {last}"
        )
    return letter


def _choice(text: str, options: tuple[str, ...]) -> str:
    """Return the letter of the option that an answer names by its letter, its text or both; "" if it names none."""
    match = _LETTER.match(text)
    letter = match.group(1) if match and match.group(1) in ascii_uppercase[: len(options)] else ""
    texts = [option.strip().casefold() for option in options]
    if text.casefold() in texts and text.strip("(.:)") != letter:
        return ascii_uppercase[texts.index(text.casefold())]
    return letter


def _segments(value: Any) -> list[list[float]]:
    """Return a list of [start, end] from one interval or several, given as lists or as JSON text."""
    segments = value
    if isinstance(value, str):
        try:
            segments = json.loads(value)
        except ValueError:
            segments = None
    if isinstance(segments, list | tuple) and len(segments) == 2 and all(_is_number(end) for end in segments):
        segments = [segments]
    if not isinstance(segments, list | tuple) or not segments or not all(_is_interval(segment) for segment in segments):
        raise DataError(
            f"answer is {show_value(value)}: expected [start, end] in seconds, start before end, or a list of such"
        )
    return [[float(start), float(end)] for start, end in segments]


def _grounded_answer(value: Any, options: tuple[str, ...]) -> list[Any]:
    """Return [answer, segments] from any of the accepted forms."""
    if isinstance(value, str) and value.count("<>") == 1:
        text, _, segments = (part.strip() for part in value.partition("<>"))
    elif isinstance(value, Mapping) and {"answer", "segments"} <= value.keys():
        text, segments = value["answer"], value["segments"]
    elif isinstance(value, list | tuple) and len(value) == 2:
        text, segments = value
    else:
        raise DataError(
            f"answer is {show_value(value)}: expected {{'answer': .., 'segments': [[start, end]]}} or "
            "'B <> [start, end]'"
        )
    return [_text_answer(text, options), _segments(segments)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_interval(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(_is_number(end) for end in value):
        return False
    return bool(0 <= value[0] < value[1])
