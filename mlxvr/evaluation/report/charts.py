"""The charts of a report, each drawn once: as marks that the page shows as inline SVG and `plots` paints as files.

A mark has its place in units of the view box and a `kind`, which is its class in the page's style sheet: colours follow
dark mode there, and `plots` has a table of them for paper. A mark's title is what a tooltip and a screen reader say.

Confidences crowd next to 1, where thresholds lie. Their axis therefore counts nines, -log10(1 - confidence): 0.9, 0.99
and 0.999 are equally far apart, and everything from 0.9999 on is at the end.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import Estimate, wilson
from mlxvr.evaluation.analysis.reliability import Bin
from mlxvr.evaluation.analysis.run_summary import GroupSummary
from mlxvr.evaluation.analysis.sweep import SweepRow
from mlxvr.evaluation.graded_rows import GradedRow
from mlxvr.evaluation.report.content import Content, score_name

__all__ = [
    "MOST_BARS",
    "WIDTH",
    "Axis",
    "Chart",
    "Circle",
    "Curve",
    "Line",
    "Mark",
    "Point",
    "Polyline",
    "Rect",
    "Text",
    "bars_chart",
    "cost_chart",
    "draw_charts",
    "histogram",
    "histogram_chart",
    "nines",
    "ratio_chart",
    "reliability_chart",
    "ticks",
]

WIDTH, HEIGHT = 460, 300
MOST_BARS = 30
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
class Line:
    """A straight line."""

    shape: ClassVar[str] = "line"
    x1: float
    y1: float
    x2: float
    y2: float
    kind: str


@dataclass(frozen=True)
class Polyline:
    """A line through points."""

    shape: ClassVar[str] = "polyline"
    points: Sequence[tuple[float, float]]
    kind: str
    title: str


@dataclass(frozen=True)
class Rect:
    """A filled rectangle; `x` and `y` are its upper left corner."""

    shape: ClassVar[str] = "rect"
    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str = ""


@dataclass(frozen=True)
class Circle:
    """A dot."""

    shape: ClassVar[str] = "circle"
    x: float
    y: float
    radius: float
    kind: str
    title: str = ""


@dataclass(frozen=True)
class Text:
    """Words on their baseline; `anchor` is start, middle or end, `in_files` what they are where there is more room."""

    shape: ClassVar[str] = "text"
    x: float
    y: float
    content: str
    kind: str
    anchor: str = "middle"
    in_files: str = ""
    is_upright: bool = False  # reads upwards, around (x, y)


Mark = Line | Polyline | Rect | Circle | Text


@dataclass(frozen=True)
class Chart:
    """A drawing.

    Attributes:
        title: what it shows, for a screen reader.
        marks: from back to front.
        height: of the view box; its width is always `WIDTH`.
        heading, legend: what a file says above the drawing, where the page says it around it; (kind, label) pairs.
        axes: (across, up), for a script that places marks.
    """

    title: str
    marks: Sequence[Mark]
    height: float = HEIGHT
    heading: str = ""
    legend: Sequence[tuple[str, str]] = ()
    axes: tuple[Axis, Axis] | None = None


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
    points: Sequence[Point] = ()


def draw_charts(content: Content) -> dict[str, Chart]:
    """The charts that a report has figures for, by name: cost, thresholds, confidence, reliability, think_ratio."""
    group, threshold = content.summary.overall, content.summary.threshold
    if group is None:
        return {}
    charts: dict[str, Chart | None] = {}
    if content.curve:
        runs = [Curve(content.title, content.curve, _points(group))]
        against = content.against
        if against is not None and against.curve and against.summary.overall is not None:
            runs.append(Curve(against.title, against.curve, _points(against.summary.overall)))
        heading = f"{content.title}, threshold {formatting.confidence(threshold)}"
        charts["cost"] = cost_chart(runs, score_name(group), heading)
        charts["thresholds"] = ratio_chart(runs, threshold)
    if group.confidence is not None:
        right, wrong = (_confidences(content.rows, is_right) for is_right in (True, False))
        charts["confidence"] = histogram_chart(right, wrong, threshold)
        charts["reliability"] = reliability_chart(group.confidence.bins)
    if content.summary.per_task:
        bars = [(name, task.think_ratio, task.count) for name, task in content.summary.per_task.items()]
        bars.sort(key=lambda bar: (-bar[1].value, bar[0]))
        charts["think_ratio"] = bars_chart(bars[:MOST_BARS], "rows that reason")
    return {name: chart for name, chart in charts.items() if chart is not None}


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
    for confidence in confidences:
        counts[min(bins - 1, int(nines(confidence) / _MOST_NINES * bins))] += 1
    return counts


def cost_chart(runs: Sequence[Curve], score_name: str, heading: str = "") -> Chart | None:
    """Score against mean generated tokens over all thresholds, the modes marked with their intervals."""
    points = [point for run in runs for point in run.points]
    tokens = [row.mean_tokens for run in runs for row in run.rows] + [point.tokens for point in points]
    scores = [row.score for run in runs for row in run.rows if row.score is not None]
    for point in points:
        scores += [end for end in (point.score.value, point.score.low, point.score.high) if end is not None]
    if not tokens or not scores:
        return None
    pad = max(0.02, 0.08 * (max(scores) - min(scores)))
    across = Axis(0, max(tokens) * 1.04 or 1, _LEFT, _RIGHT)
    up = Axis(max(0.0, min(scores) - pad), min(1.0, max(scores) + pad), _BOTTOM, _TOP)
    marks = _frame(across, up, "mean generated tokens per question", score_name, written=_percent)
    for number, run in enumerate(runs):
        line = [(across.at(row.mean_tokens), up.at(row.score)) for row in run.rows if row.score is not None]
        marks.append(Polyline(line, f"line run{number}", run.name))
    if runs[0].rows:
        marks.append(Circle(-20, -20, 6, "probe"))  # out of sight until the page's script moves it
    for number, run in reversed(list(enumerate(runs))):
        for point in run.points:
            marks += _mode_marks(point, across.at(point.tokens), up, f"run{number}", is_main=number == 0)
    legend = [(f"run{number}", run.name) for number, run in enumerate(runs)] if len(runs) > 1 else []
    title = f"{score_name} against mean generated tokens"
    return Chart(title, marks, heading=heading, legend=legend, axes=(across, up))


def ratio_chart(runs: Sequence[Curve], threshold: float) -> Chart | None:
    """The think ratio at every threshold."""
    if not any(run.rows for run in runs):
        return None
    across, up = Axis(0, _MOST_NINES, _LEFT, _RIGHT), Axis(0, 1, _BOTTOM, _TOP)
    marks = _frame(across, up, "threshold (axis stretched towards 1)", "rows that reason", written=_percent, nine=True)
    for number, run in enumerate(runs):
        steps: list[tuple[float, float]] = []
        for row in run.rows:
            x, y = across.at(nines(min(row.threshold, 1.0))), up.at(row.think_ratio)
            steps += [(x, steps[-1][1])] if steps else []
            steps.append((x, y))
        marks.append(Polyline(steps, f"line run{number}", run.name))
    legend = [(f"run{number}", run.name) for number, run in enumerate(runs)] if len(runs) > 1 else []
    return Chart("think ratio at every threshold", [*marks, *_threshold_marks(across, threshold)], legend=legend)


def reliability_chart(bins: Sequence[Bin]) -> Chart:
    """How often first answers of a confidence are right, with Wilson intervals and counts."""
    across, up = Axis(0, 1, _LEFT, _RIGHT), Axis(0, 1, _BOTTOM, _TOP + 18)
    marks = _frame(across, up, "confidence of the first answer", "how often it is right", written=_percent)
    marks.append(Line(across.at(0), up.at(0), across.at(1), up.at(1), "ideal"))
    for part in bins:
        if part.count:
            marks.append(Text(across.at((part.low + part.high) / 2), _TOP + 6, f"{part.count:,}", "count"))
        if part.accuracy is None or part.confidence is None:
            continue
        low, high = wilson(part.accuracy * part.count, part.count)
        x, y = across.at(part.confidence), up.at(part.accuracy)
        left, right = across.at(part.low) + 1, across.at(part.high) - 1
        title = (
            f"confidence {part.low:g} to {part.high:g}: {formatting.count(part.count, 'answer')}, mean confidence "
            f"{part.confidence:.3f}, right {formatting.share(part.accuracy, part.count)}"
        )
        marks.append(Rect(left, y, right - left, up.start - y, "column"))
        marks.append(Line(x, up.at(low), x, up.at(high), "whisker"))
        marks.append(Circle(x, y, 4.5, "dot run0", title))
    return Chart("reliability of the confidence, with counts of answers above", marks)


def histogram_chart(right: Sequence[float], wrong: Sequence[float], threshold: float) -> Chart:
    """Confidences of right first answers upward, of wrong ones downward, over the stretched axis."""
    ups, downs = histogram(right), histogram(wrong)
    top, bottom = max(1, *ups), max(0, *downs)
    most = top + bottom
    across = Axis(0, _MOST_NINES, _LEFT, _RIGHT)
    up = Axis(-bottom - 0.06 * most, top + 0.06 * most, _BOTTOM, _TOP)
    marks = _frame(across, up, "confidence (axis stretched towards 1)", "first answers", written=_whole, nine=True)
    width = (_RIGHT - _LEFT) / len(ups)
    for place, (good, bad) in enumerate(zip(ups, downs)):
        x, zero = _LEFT + place * width + 1, up.at(0)
        low, high = (1 - 10 ** -(step * _MOST_NINES / len(ups)) for step in (place, place + 1))
        reach = f"confidence {low:.4g} to {high:.4g}" if place + 1 < len(ups) else f"confidence from {low:.4g} on"
        if good:
            marks.append(Rect(x, up.at(good), width - 2, zero - up.at(good), "right", f"{reach}: {good} right"))
        if bad:
            marks.append(Rect(x, zero, width - 2, up.at(-bad) - zero, "wrong", f"{reach}: {bad} wrong"))
    marks.append(Line(_LEFT, up.at(0), _RIGHT, up.at(0), "axis"))
    marks += _threshold_marks(across, threshold)
    legend = [("right", f"right ({len(right):,})"), ("wrong", f"wrong ({len(wrong):,})")]
    return Chart("confidences of right first answers (upward) and of wrong ones (downward)", marks, legend=legend)


def bars_chart(bars: Sequence[tuple[str, Estimate, int]], axis_name: str) -> Chart:
    """A horizontal bar with its interval for each of (name, share, rows)."""
    left, right, step = 150, 400, 26
    bottom = 10 + step * len(bars)
    across = Axis(0, 1, left, right)
    marks: list[Mark] = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        marks.append(Line(across.at(value), 6, across.at(value), bottom, "grid"))
        marks.append(Text(across.at(value), bottom + 17, f"{100 * value:.0f}%", "tick"))
    for index, (name, estimate, size) in enumerate(bars):
        middle = 10 + step * index + step / 2
        title = f"{name}: {formatting.share(estimate, size)} of {formatting.count(size, 'row')}"
        short = name if len(name) <= 20 else f"{name[:19]}…"
        marks.append(Text(left - 8, middle + 4, short, "tick", "end", in_files=f"{name[:28]} ({size:,})"))
        marks.append(Rect(left, middle - 8, across.at(estimate.value) - left, 16, "bar", title))
        if estimate.low is not None and estimate.high is not None:
            marks.append(Line(across.at(estimate.low), middle, across.at(estimate.high), middle, "whisker"))
        marks.append(Text(right + 8, middle + 4, formatting.share(estimate, size), "tick", "start"))
    marks.append(Text((left + right) / 2, bottom + 36, axis_name, "name"))
    return Chart(axis_name, marks, height=bottom + 44)


def _points(group: GroupSummary) -> list[Point]:
    modes = [("direct", group.direct), ("think", group.think), ("auto", group.auto)]
    return [
        Point(name, mode.tokens.mean, mode.score) for name, mode in modes if mode is not None and mode.score is not None
    ]


def _confidences(rows: Sequence[GradedRow], is_right: bool) -> list[float]:
    """The confidences of the first answers that are right, or wrong."""
    graded = [row for row in rows if row.direct is not None and row.direct.is_right is is_right]
    return [row.sample.confidence for row in graded if row.sample.confidence is not None]


def _percent(value: float) -> str:
    return f"{100 * value:g}%"


def _whole(value: float) -> str:
    return f"{abs(value):,g}" if value == int(value) else ""


def _frame(
    across: Axis, up: Axis, x_name: str, y_name: str, *, written: Callable[[float], str], nine: bool = False
) -> list[Mark]:
    """Grid, tick labels and axis names; `written` labels the axis up, `nine` stretches the axis across."""
    marks: list[Mark] = []
    for value in ticks(up.low, up.high):
        marks.append(Line(across.start, up.at(value), across.end, up.at(value), "grid"))
        if label := written(value):
            marks.append(Text(across.start - 7, up.at(value) + 4, label, "tick", "end"))
    if nine:
        places = [(nines(value), label) for value, label in _CONFIDENCE_TICKS]
    else:
        places = [(value, f"{value:,g}") for value in ticks(across.low, across.high)]
    for place, label in places:
        marks.append(Line(across.at(place), up.start, across.at(place), up.start + 4, "axis"))
        marks.append(Text(across.at(place), up.start + 18, label, "tick"))
    marks.append(Line(across.start, up.start, across.end, up.start, "axis"))
    marks.append(Text((across.start + across.end) / 2, up.start + 38, x_name, "name"))
    marks.append(Text(11, (up.start + up.end) / 2, y_name, "name", is_upright=True))
    return marks


def _mode_marks(point: Point, x: float, up: Axis, run: str, *, is_main: bool) -> list[Mark]:
    """A mode's dot with its interval, and for the run itself its name."""
    y, is_auto = up.at(point.score.value), point.name == "auto"
    title = f"{point.name}: {formatting.share(point.score)} at {formatting.tokens(point.tokens)} tokens"
    marks: list[Mark] = []
    if point.score.low is not None and point.score.high is not None:
        marks.append(Line(x, up.at(point.score.low), x, up.at(point.score.high), f"whisker {run}"))
    marks.append(Circle(x, y, 7 if is_auto else 5, f"dot {run} {point.name}", title))
    if is_main:
        marks.append(_label(x, 11, y - 9 if is_auto else y + 17, point.name, at_end=x > 0.8 * _RIGHT))
    return marks


def _threshold_marks(across: Axis, threshold: float) -> list[Mark]:
    x = across.at(nines(min(threshold, 1.0)))
    label = f"threshold {formatting.confidence(threshold)}"
    return [
        Line(x, _TOP, x, _BOTTOM, "threshold"),
        _label(x, 6, _TOP + 10, label, at_end=x > (_LEFT + _RIGHT) / 2),
    ]


def _label(x: float, distance: float, y: float, content: str, *, at_end: bool) -> Text:
    """Words beside a place, on its left where it is near the right end."""
    return Text(x - distance if at_end else x + distance, y, content, "label", "end" if at_end else "start")
