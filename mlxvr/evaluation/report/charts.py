"""Charts as inline SVG, drawn from numbers by ourselves, so that a report needs no library and no network.

Colours come from the page's style sheet by class, so that they follow dark mode; what a screen reader needs stands in
`<title>`. Sizes are in units of the view box, which a page scales to its column.

Confidences crowd next to 1, where thresholds lie. Their axis therefore counts nines, -log10(1 - confidence): 0.9, 0.99
and 0.999 are equally far apart, and everything from 0.9999 on is at the end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import Estimate, wilson
from mlxvr.evaluation.analysis.reliability import Bin
from mlxvr.evaluation.analysis.sweep import SweepRow

__all__ = [
    "Axis",
    "Curve",
    "Point",
    "bars_chart",
    "cost_chart",
    "histogram",
    "histogram_chart",
    "nines",
    "ratio_chart",
    "reliability_chart",
    "ticks",
]

WIDTH, HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 446, 14, 252
_MOST_NINES = 4.0
_NINES_BINS = 16
_CONFIDENCE_TICKS = ((0.0, "0"), (0.5, "0.5"), (0.9, "0.9"), (0.99, "0.99"), (0.999, "0.999"), (1.0, "1"))


@dataclass(frozen=True)
class Axis:
    """A linear map from values to view box units."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value lies."""
        span = self.high - self.low
        return self.start + (value - self.low) / span * (self.end - self.start) if span else (self.start + self.end) / 2


@dataclass(frozen=True)
class Point:
    """A marked place on the cost chart: a mode, its mean tokens and its score."""

    name: str
    tokens: float
    score: Estimate


@dataclass(frozen=True)
class Curve:
    """One run on the cost chart."""

    name: str
    rows: Sequence[SweepRow]
    points: Sequence[Point] = field(default_factory=tuple)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values that divide [low, high] into about `wanted` parts: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def nines(confidence: float) -> float:
    """A confidence on the stretched axis, from 0 to 4."""
    return _MOST_NINES if confidence >= 1 else min(_MOST_NINES, -math.log10(1 - confidence))


def histogram(confidences: Sequence[float], bins: int = _NINES_BINS) -> list[int]:
    """How many confidences lie in each of `bins` equal parts of the stretched axis, the last with its end."""
    counts = [0] * bins
    for one in confidences:
        counts[min(bins - 1, int(nines(one) / _MOST_NINES * bins))] += 1
    return counts


def cost_chart(curves: Sequence[Curve], score_name: str) -> str:
    """Score against mean generated tokens over all thresholds, the modes marked with their intervals."""
    tokens = [row.mean_tokens for one in curves for row in one.rows]
    tokens += [point.tokens for one in curves for point in one.points]
    scores = [row.score for one in curves for row in one.rows if row.score is not None]
    for one in curves:
        for point in one.points:
            scores += [end for end in (point.score.value, point.score.low, point.score.high) if end is not None]
    if not tokens or not scores:
        return ""
    pad = max(0.02, 0.08 * (max(scores) - min(scores)))
    across = Axis(0, max(tokens) * 1.04 or 1, _LEFT, _RIGHT)
    up = Axis(max(0.0, min(scores) - pad), min(1.0, max(scores) + pad), _BOTTOM, _TOP)
    parts = _frame(across, up, "mean generated tokens per question", score_name, as_percent=True)
    for number, one in enumerate(curves):
        line = [(across.at(row.mean_tokens), up.at(row.score)) for row in one.rows if row.score is not None]
        parts.append(_path(line, f"line run{number}", one.name))
    if curves[0].rows:
        parts.append('<circle id="probe" class="probe" r="6" cx="-20" cy="-20"/>')
    for number, one in reversed(list(enumerate(curves))):
        for point in one.points:
            parts += _mark(point, across.at(point.tokens), up, f"run{number}", is_main=number == 0)
    limits = f'data-x="{across.low} {across.high} {across.start} {across.end}" '
    limits += f'data-y="{up.low} {up.high} {up.start} {up.end}"'
    return _svg(parts, f"{score_name} against mean generated tokens", limits, "cost-chart")


def ratio_chart(curves: Sequence[Curve], threshold: float) -> str:
    """The think ratio at every threshold."""
    if not any(one.rows for one in curves):
        return ""
    across, up = Axis(0, _MOST_NINES, _LEFT, _RIGHT), Axis(0, 1, _BOTTOM, _TOP)
    parts = _frame(across, up, "threshold (axis stretched towards 1)", "rows that reason", as_percent=True, nine=True)
    for number, one in enumerate(curves):
        line: list[tuple[float, float]] = []
        for row in one.rows:
            x, y = across.at(nines(min(row.threshold, 1.0))), up.at(row.think_ratio)
            line += [(x, line[-1][1])] if line else []
            line.append((x, y))
        parts.append(_path(line, f"line run{number}", one.name))
    parts += _threshold_mark(across, threshold)
    return _svg(parts, "think ratio at every threshold")


def reliability_chart(bins: Sequence[Bin]) -> str:
    """How often first answers of a confidence are right, with Wilson intervals and counts."""
    across, up = Axis(0, 1, _LEFT, _RIGHT), Axis(0, 1, _BOTTOM, _TOP + 18)
    parts = _frame(across, up, "confidence of the first answer", "how often it is right", as_percent=True)
    parts.append(_line(across.at(0), up.at(0), across.at(1), up.at(1), "ideal"))
    for one in bins:
        middle = across.at((one.low + one.high) / 2)
        if one.count:
            parts.append(_text(middle, _TOP + 6, f"{one.count:,}", "count", "middle"))
        if one.accuracy is None or one.confidence is None:
            continue
        low, high = wilson(one.accuracy * one.count, one.count)
        x = across.at(one.confidence)
        told = (
            f"confidence {one.low:g} to {one.high:g}: {formatting.count(one.count, 'answer')}, mean confidence "
            f"{one.confidence:.3f}, right {formatting.share(one.accuracy, one.count)}"
        )
        width = across.at(one.high) - across.at(one.low) - 2
        parts.append(
            _rect(across.at(one.low) + 1, up.at(one.accuracy), width, up.start - up.at(one.accuracy), "column")
        )
        parts.append(_line(x, up.at(low), x, up.at(high), "whisker"))
        parts.append(_circle(x, up.at(one.accuracy), 4.5, "dot run0", told))
    return _svg(parts, "reliability of the confidence, with counts of answers above")


def histogram_chart(right: Sequence[float], wrong: Sequence[float], threshold: float) -> str:
    """Confidences of right first answers upward, of wrong ones downward, over the stretched axis."""
    ups, downs = histogram(right), histogram(wrong)
    top, bottom = max(1, *ups), max(0, *downs)
    most = top + bottom
    across = Axis(0, _MOST_NINES, _LEFT, _RIGHT)
    up = Axis(-bottom - 0.06 * most, top + 0.06 * most, _BOTTOM, _TOP)
    parts = _frame(across, up, "confidence (axis stretched towards 1)", "first answers", nine=True, absolute=True)
    width = (_RIGHT - _LEFT) / len(ups)
    for place, (good, bad) in enumerate(zip(ups, downs)):
        x = _LEFT + place * width
        low, high = (1 - 10 ** -(step * _MOST_NINES / len(ups)) for step in (place, place + 1))
        reach = f"confidence {low:.4g} to {high:.4g}" if place + 1 < len(ups) else f"confidence from {low:.4g} on"
        if good:
            parts.append(
                _rect(x + 1, up.at(good), width - 2, up.at(0) - up.at(good), "right", f"{reach}: {good} right")
            )
        if bad:
            parts.append(_rect(x + 1, up.at(0), width - 2, up.at(-bad) - up.at(0), "wrong", f"{reach}: {bad} wrong"))
    parts.append(_line(_LEFT, up.at(0), _RIGHT, up.at(0), "axis"))
    parts += _threshold_mark(across, threshold)
    return _svg(parts, "confidences of right first answers (upward) and of wrong ones (downward)")


def bars_chart(rows: Sequence[tuple[str, Estimate, int]], axis_name: str) -> str:
    """A horizontal bar with its interval for each of (name, share, rows)."""
    left, right, step = 150, 400, 26
    bottom = 10 + step * len(rows)
    across = Axis(0, 1, left, right)
    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_line(across.at(value), 6, across.at(value), bottom, "grid"))
        parts.append(_text(across.at(value), bottom + 17, f"{100 * value:.0f}%", "tick", "middle"))
    for index, (name, estimate, size) in enumerate(rows):
        middle = 10 + step * index + step / 2
        told = f"{name}: {formatting.share(estimate, size)} of {formatting.count(size, 'row')}"
        short = name if len(name) <= 20 else f"{name[:19]}…"
        parts.append(_text(left - 8, middle + 4, short, "tick", "end"))
        parts.append(_rect(left, middle - 8, across.at(estimate.value) - left, 16, "bar", told))
        if estimate.low is not None and estimate.high is not None:
            parts.append(_line(across.at(estimate.low), middle, across.at(estimate.high), middle, "whisker"))
        parts.append(_text(right + 8, middle + 4, formatting.share(estimate, size), "tick", "start"))
    parts.append(_text((left + right) / 2, bottom + 36, axis_name, "name", "middle"))
    return _svg(parts, axis_name, height=bottom + 44)


def _frame(
    across: Axis, up: Axis, x_name: str, y_name: str, *, as_percent: bool = False, nine: bool = False,
    absolute: bool = False,
) -> list[str]:  # fmt: skip
    """Grid, tick labels and axis names."""
    parts = []
    for value in ticks(up.low, up.high):
        parts.append(_line(across.start, up.at(value), across.end, up.at(value), "grid"))
        said = f"{100 * value:g}%" if as_percent else f"{abs(value) if absolute else value:,g}"
        if as_percent or value == int(value):
            parts.append(_text(across.start - 7, up.at(value) + 4, said, "tick", "end"))
    if nine:
        places = [(nines(value), said) for value, said in _CONFIDENCE_TICKS]
    else:
        places = [(value, f"{value:,g}") for value in ticks(across.low, across.high)]
    for place, said in places:
        parts.append(_line(across.at(place), up.start, across.at(place), up.start + 4, "axis"))
        parts.append(_text(across.at(place), up.start + 18, said, "tick", "middle"))
    parts.append(_line(across.start, up.start, across.end, up.start, "axis"))
    parts.append(_text((across.start + across.end) / 2, up.start + 38, x_name, "name", "middle"))
    parts.append(
        f'<text class="name" text-anchor="middle" transform="translate(11 {_n((up.start + up.end) / 2)}) rotate(-90)">'
        f"{escape(y_name)}</text>"
    )
    return parts


def _mark(point: Point, x: float, up: Axis, kind: str, *, is_main: bool) -> list[str]:
    """A mode's dot with its interval, and for the run itself its name."""
    y = up.at(point.score.value)
    told = f"{point.name}: {formatting.share(point.score)} at {formatting.tokens(point.tokens)} tokens"
    parts = []
    if point.score.low is not None and point.score.high is not None:
        parts.append(_line(x, up.at(point.score.low), x, up.at(point.score.high), f"whisker {kind}"))
    parts.append(_circle(x, y, 7 if point.name == "auto" else 5, f"dot {kind} {point.name}", told))
    if is_main:
        at_end = x > 0.8 * _RIGHT
        below = point.name != "auto"
        parts.append(
            _text(
                x - 11 if at_end else x + 11,
                y + (17 if below else -9),
                point.name,
                "label",
                "end" if at_end else "start",
            )
        )
    return parts


def _threshold_mark(across: Axis, threshold: float) -> list[str]:
    x = across.at(nines(min(threshold, 1.0)))
    at_end = x > (_LEFT + _RIGHT) / 2
    said = f"threshold {formatting.confidence(threshold)}"
    return [
        _line(x, _TOP, x, _BOTTOM, "threshold"),
        _text(x - 6 if at_end else x + 6, _TOP + 10, said, "label", "end" if at_end else "start"),
    ]


def _svg(parts: Sequence[str], title: str, extra: str = "", name: str = "", height: float = HEIGHT) -> str:
    identity = f' id="{name}"' if name else ""
    head = f'<svg class="chart"{identity} viewBox="0 0 {WIDTH} {_n(height)}" role="img" {extra}>'
    return f"{head}<title>{escape(title)}</title>{''.join(parts)}</svg>"


def _path(points: Sequence[tuple[float, float]], kind: str, title: str) -> str:
    steps = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
    return f'<polyline class="{kind}" points="{steps}"><title>{escape(title)}</title></polyline>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    box = f'<rect class="{kind}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
    return f"{box}><title>{escape(title)}</title></rect>" if title else f"{box}/>"


def _circle(x: float, y: float, radius: float, kind: str, title: str) -> str:
    return f'<circle class="{kind}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"><title>{escape(title)}</title></circle>'


def _text(x: float, y: float, content: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(content)}</text>'


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
