"""Intervals of time as answers give them, and how far two of them overlap.

Two numbers with `,`, a dash, `to` or `and` between, in brackets or not. Swapped ends are put in order.

The training reward reads exactly as the public one does, quirks included, so that a run earns what it would have earned
there: without brackets no interval stands straight before a full stop (`2.0 to 4.0.`), and the digits of clock times
are numbers like others (`1:23 - 1:45` is 1 to 23). Evaluation, and truths that are given as text, are read as they are
meant: a full stop ends a sentence, seconds may have their unit (`[3.0s, 4.0s]`, `3 sec to 4 sec`), and neither clock
times nor minutes are intervals of seconds. Without brackets `3 s, 4` names no interval: the 4 may be of anything.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from mlxvr.errors import DataError

__all__ = ["Interval", "best_iou", "find_interval", "find_named_interval", "is_point", "segments_of", "temporal_iou"]

Interval = tuple[float, float]  # seconds, in order

_NUMBER = r"(?:\d+(?:\.\d+)?)"
_EPSILON = 1e-9
_BETWEEN = r"\s*(?:,|-|\u2013|\u2014|\bto\b|\band\b)\s*"
_TWO_NUMBERS = rf"""(?<![\d.])(?:
        \[\s*({_NUMBER}){_BETWEEN}({_NUMBER})\s*\]
      | \(\s*({_NUMBER}){_BETWEEN}({_NUMBER})\s*\)
      | ({_NUMBER}){_BETWEEN}({_NUMBER})
    )"""
_STRICT = re.compile(rf"{_TWO_NUMBERS}(?![\d.])", re.VERBOSE | re.IGNORECASE)  # the public reward
_UNIT = r"(?:\s*(?:s|secs?|seconds?)\b\.?)"
_MEANT = re.compile(
    rf"""(?<!\d:)(?<![\d.])(?:
        \[\s*({_NUMBER}){_UNIT}?{_BETWEEN}({_NUMBER}){_UNIT}?\s*\]
      | \(\s*({_NUMBER}){_UNIT}?{_BETWEEN}({_NUMBER}){_UNIT}?\s*\)
      | ({_NUMBER}){_UNIT}{_BETWEEN}({_NUMBER}){_UNIT}
      | ({_NUMBER}){_UNIT}\s*(?:-|\u2013|\u2014|\bto\b)\s*({_NUMBER})
      | ({_NUMBER}){_BETWEEN}({_NUMBER})
    )(?!\.?\d|:\d)(?!\s*(?:m|mins?|minutes?|h|hours?)\b)""",
    re.VERBOSE | re.IGNORECASE,
)
_NAMED_INTERVAL = re.compile(
    rf"\bstarts?(?:_time|\s+time)?\W+(?:at\s+)?({_NUMBER}).*?\bends?(?:_time|\s+time)?\W+(?:at\s+)?({_NUMBER})",
    re.IGNORECASE | re.DOTALL,
)


def find_interval(text: str) -> Interval | None:
    """The first interval in a text, as the reward reads it; None: there is none."""
    found = _STRICT.search(text)
    return _ends(found) if found else None


def find_named_interval(text: str) -> Interval | None:
    """The first interval that is spelt out (`start: 3.0, end: 5.5`), else the first of any form, as it is meant."""
    found = _NAMED_INTERVAL.search(text) or _MEANT.search(text)
    return _ends(found) if found else None


def is_point(interval: Interval) -> bool:
    """Whether an interval has no length."""
    return abs(interval[1] - interval[0]) <= _EPSILON


def temporal_iou(one: Interval, other: Interval) -> float:
    """Intersection over union of two intervals; 0 where `one` is a point, as in the public evaluator."""
    (start, end), (first, last) = sorted(one), sorted(other)
    if is_point((start, end)):
        return 0.0
    whole = max(end, last) - min(start, first)  # where they do not touch, nothing is shared
    return max(0.0, min(end, last) - max(start, first)) / whole if math.isfinite(whole) else 0.0


def best_iou(interval: Interval | None, segments: Sequence[Interval]) -> float:
    """IoU with the segment that fits best; 0 without an interval."""
    return 0.0 if interval is None else max(temporal_iou(interval, segment) for segment in segments)


def segments_of(answer: Any) -> list[Interval]:
    """The ground-truth segments of an answer: [start, end], a list of such, or a text that holds them.

    Raises `DataError` when there is none.
    """
    found: list[Interval] = []
    if isinstance(answer, str):
        found = [_ends(interval) for interval in _MEANT.finditer(answer)]
    elif isinstance(answer, Sequence) and answer:
        pairs = [answer] if not isinstance(answer[0], Sequence) or isinstance(answer[0], str) else answer
        try:
            ends = [[float(end) for end in pair] for pair in pairs]
        except (TypeError, ValueError, OverflowError):
            ends = []
        if all(len(pair) == 2 and all(map(math.isfinite, pair)) for pair in ends):
            found = [(min(pair), max(pair)) for pair in ends]
    if not found:
        raise DataError(f"answer {answer!r} holds no segment; expected [start, end] in seconds, or a list of such")
    return found


def _ends(found: re.Match[str]) -> Interval:
    start, end = (float(group) for group in found.groups() if group is not None)
    return min(start, end), max(start, end)
