"""Read intervals of time from answers, and measure how far two of them overlap.

An interval is two numbers with `,`, a dash, `to` or `and` between, in brackets or not. Swapped ends are put in order.

The training reward reads exactly as the public one does, quirks included, so that a run earns the same reward here as
there: an interval without brackets is not recognized directly before a full stop (`2.0 to 4.0.`), and the digits of
clock times are ordinary numbers (`1:23 - 1:45` is 1 to 23). Evaluation, and ground truths given as text, are read as
they are meant: a full stop ends a sentence, seconds may have their unit (`[3.0s, 4.0s]`, `3 sec to 4 sec`), and neither
clock times nor minutes are intervals of seconds. `3 s, 4` without brackets is no interval: the 4 may count anything.
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
    """Return the first interval in a text, as the reward reads it; None if there is none."""
    match = _STRICT.search(text)
    return _ends(match) if match else None


def find_named_interval(text: str) -> Interval | None:
    """Return the first interval with named ends (`start: 3.0, end: 5.5`), else the first of any form."""
    match = _NAMED_INTERVAL.search(text) or _MEANT.search(text)
    return _ends(match) if match else None


def is_point(interval: Interval) -> bool:
    """Return whether an interval has no length."""
    return abs(interval[1] - interval[0]) <= _EPSILON


def temporal_iou(predicted: Interval, true: Interval) -> float:
    """Intersection over union of two intervals; 0 if `predicted` is a point, as in the public evaluator."""
    (start, end), (true_start, true_end) = sorted(predicted), sorted(true)
    if is_point((start, end)):
        return 0.0
    union = max(end, true_end) - min(start, true_start)  # too long if they do not touch, but the IoU is 0 then
    return max(0.0, min(end, true_end) - max(start, true_start)) / union if math.isfinite(union) else 0.0


def best_iou(interval: Interval | None, segments: Sequence[Interval]) -> float:
    """Return the IoU with the segment that fits best; 0 without an interval."""
    return 0.0 if interval is None else max(temporal_iou(interval, segment) for segment in segments)


def segments_of(answer: Any) -> list[Interval]:
    """Return the segments of a ground truth, which is [start, end], a list of such, or a text that holds them.

    Raises `DataError` if there is none.
    """
    segments: list[Interval] = []
    if isinstance(answer, str):
        segments = [_ends(match) for match in _MEANT.finditer(answer)]
    elif isinstance(answer, Sequence) and answer:
        pairs = [answer] if not isinstance(answer[0], Sequence) or isinstance(answer[0], str) else answer
        try:
            ends = [[float(end) for end in pair] for pair in pairs]
        except (TypeError, ValueError, OverflowError):
            ends = []
        if all(len(pair) == 2 and all(map(math.isfinite, pair)) for pair in ends):
            segments = [(min(pair), max(pair)) for pair in ends]
    if not segments:
        raise DataError(f"answer {answer!r} holds no segment; expected [start, end] in seconds, or a list of such")
    return segments


def _ends(match: re.Match[str]) -> Interval:
    start, end = (float(group) for group in match.groups() if group is not None)
    return min(start, end), max(start, end)
