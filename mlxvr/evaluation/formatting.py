"""Figures as text, with no more digits than the number of rows supports, and with their interval where they have one.

A percentage has no decimals if its 95% interval is five points wide or more, if it is of fewer than 100 rows, or if it
has no interval and is of fewer than 1,000 rows. Otherwise it has one. An interval of zero width is left out, because it
would read as certainty.
"""

import math

from mlxvr.evaluation.analysis.bootstrap import Estimate

__all__ = [
    "confidence",
    "count",
    "decimals",
    "interval",
    "plain",
    "points",
    "points_interval",
    "seconds",
    "share",
    "tokens",
]

_WIDE = 0.05  # width of an interval: the percentage has no decimals from here on
_VERY_MANY = 1000  # rows: a percentage without an interval has a decimal from here on
_MANY = 100  # rows: with fewer, one row is more than one point


def share(value: Estimate | float | None, rows: int = _MANY) -> str:
    """A share as a percentage: `84%`, `84.3%`; a dash for None."""
    if value is None:
        return "–"
    number = value.value if isinstance(value, Estimate) else value
    return f"{100 * number:.{decimals(value, rows)}f}%"


def interval(estimate: Estimate | None, rows: int = _MANY) -> str:
    """The interval of a share of so many rows without percent signs: `76 to 91`; empty where there is none to give."""
    if estimate is None or not _has_interval(estimate):
        return ""
    digits = decimals(estimate, rows)
    return f"{100 * estimate.low:.{digits}f} to {100 * estimate.high:.{digits}f}"  # type: ignore[operator]


def points(estimate: Estimate | None, rows: int = _MANY) -> str:
    """A difference of shares in points, with its sign: `+1.2`, `−4`; a dash for None."""
    return "–" if estimate is None else _signed(100 * estimate.value, decimals(estimate, rows))


def points_interval(estimate: Estimate | None, rows: int = _MANY) -> str:
    """The interval of a difference of shares: `−2.1 to +0.5`; empty where there is none to give."""
    if estimate is None or not _has_interval(estimate):
        return ""
    digits = decimals(estimate, rows)
    return f"{_signed(100 * estimate.low, digits)} to {_signed(100 * estimate.high, digits)}"  # type: ignore[operator]


def tokens(value: float | None) -> str:
    """Mean tokens: whole from 20 on, one decimal below."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 20 else f"{value:.1f}"


def seconds(value: float | None) -> str:
    """Seconds to two digits: `0.35 s`, `4.5 s`, `12 s`."""
    if value is None:
        return "–"
    if value == 0:
        return "0 s"
    return f"{value:,.0f} s" if value >= 10 else f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f} s"


def confidence(value: float | None) -> str:
    """A confidence or threshold: three decimals, more where it is that close to 1 (`0.99997`)."""
    if value is None:
        return "none"
    if value > 1:
        return "above 1"
    if value in (0, 1):
        return f"{value:.0f}"
    digits = min(9, max(3, 1 - math.floor(math.log10(1 - value))))
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")


def plain(estimate: Estimate | float | None, rows: int = _MANY) -> str:
    """A measure such as ECE or AUROC: two decimals, three from 1,000 rows on."""
    if estimate is None:
        return "–"
    number = estimate.value if isinstance(estimate, Estimate) else estimate
    return f"{number:.{3 if rows >= 1000 else 2}f}"


def count(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: `1 clip`, `3,000 clips`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _has_interval(estimate: Estimate) -> bool:
    return estimate.low is not None and estimate.high is not None and estimate.high > estimate.low


def decimals(value: Estimate | float, rows: int) -> int:
    """How many decimals a percentage of so many rows gets."""
    if isinstance(value, Estimate) and _has_interval(value):
        return 0 if rows < _MANY or value.high - value.low >= _WIDE - 1e-9 else 1  # type: ignore[operator]
    return 0 if rows < _VERY_MANY else 1


def _signed(number: float, digits: int) -> str:
    text = f"{abs(number):.{digits}f}"
    if not text.strip("0."):
        return text
    return f"{'+' if number > 0 else '−'}{text}"
