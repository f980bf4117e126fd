"""The charts of a report: their marks against coordinates worked by hand."""

import numpy as np
import pytest

from mlxvr.evaluation.analysis.bootstrap import Estimate
from mlxvr.evaluation.analysis.reliability import reliability
from mlxvr.evaluation.analysis.sweep import SweepRow
from mlxvr.evaluation.report import charts
from mlxvr.evaluation.report.charts import Circle, Line, Polyline, Rect, Text


def marks_of(chart, shape, kind=""):
    """The marks of a shape whose kind begins with these words."""
    return [mark for mark in chart.marks if isinstance(mark, shape) and mark.kind.startswith(kind)]


def test_axis_and_ticks():
    axis = charts.Axis(0, 200, 48, 446)
    assert [axis.at(value) for value in (0, 100, 200)] == [48, 247, 446]
    assert charts.Axis(1, 1, 0, 10).at(1) == 5
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert charts.ticks(0.57, 0.93) == [0.6, 0.7, 0.8, 0.9]
    assert charts.ticks(-3, 15) == [0, 5, 10, 15]
    assert charts.ticks(2, 2) == [2]


def test_nines_and_histogram():
    assert [charts.nines(value) for value in (0, 0.9, 0.99, 1, 1 - 1e-9)] == pytest.approx([0, 1, 2, 4, 4])
    assert charts.histogram([0.0, 0.5, 0.95, 0.95, 1.0], 4) == [2, 2, 0, 1]


def sweep_row(threshold, score, tokens, think_ratio=0.0):
    return SweepRow(
        threshold=threshold,
        score=score,
        accuracy=score,
        miou=None,
        think_ratio=think_ratio,
        mean_tokens=tokens,
        mean_seconds=0,
    )


def test_cost_chart():
    """x: 0 to 104 over 48 to 446; y: 0.48 to 0.72, which is 0.02 beyond both, over 252 to 14."""
    point = charts.Point("auto", 50, Estimate(value=0.6, low=0.5, high=0.7))
    run = charts.Curve("run", [sweep_row(0, 0.5, 0), sweep_row(1, 0.7, 100)], [point])
    chart = charts.cost_chart([run], "Accuracy", "heading")
    (line,) = marks_of(chart, Polyline)
    (dot,) = marks_of(chart, Circle, "dot run0 auto")
    (whisker,) = marks_of(chart, Line, "whisker run0")
    assert line.points == [pytest.approx((48, 232.1667), abs=1e-3), pytest.approx((430.6923, 33.8333), abs=1e-3)]
    assert (dot.x, dot.y) == pytest.approx((239.3462, 133), abs=1e-3)
    assert dot.title == "auto: 60% at 50 tokens"
    assert (whisker.x1, whisker.y1, whisker.x2, whisker.y2) == pytest.approx(
        (dot.x, 232.1667, dot.x, 33.8333), abs=1e-3
    )
    assert (chart.heading, chart.legend) == ("heading", [])
    (label,) = marks_of(chart, Text, "label")
    assert (label.content, label.anchor, label.x - dot.x, label.y - dot.y) == ("auto", "start", 11, -9)
    think = charts.Point("think", 100, Estimate(value=0.7))  # near the right end: its name is on its left
    (label,) = marks_of(charts.cost_chart([charts.Curve("run", run.rows, [think])], "Accuracy"), Text, "label")
    assert (label.anchor, label.x) == ("end", pytest.approx(430.6923 - 11, abs=1e-3))
    twice = charts.cost_chart([run, charts.Curve("before", run.rows, run.points)], "Accuracy")
    assert twice.legend == [("run0", "run"), ("run1", "before")]
    assert charts.cost_chart([charts.Curve("run", [sweep_row(0, None, 5)])], "Accuracy") is None


def test_ratio_chart():
    """A step at a threshold of 0.9, one nine of four: x = 48 + 398 / 4; half of the rows: y in the middle."""
    chart = charts.ratio_chart([charts.Curve("run", [sweep_row(0, 1, 0), sweep_row(0.9, 1, 0, 0.5)])], 0.99)
    (line,) = marks_of(chart, Polyline)
    assert line.points == [pytest.approx(corner) for corner in ((48, 252), (147.5, 252), (147.5, 133))]
    (threshold,) = marks_of(chart, Line, "threshold")
    assert (threshold.x1, threshold.x2) == pytest.approx((247, 247))
    assert [text.content for text in marks_of(chart, Text, "label")] == ["threshold 0.99"]
    assert charts.ratio_chart([charts.Curve("run", [])], 0.9) is None


def test_reliability_chart():
    """Bins 0.1 and 0.9 of 48 to 446, a unit inwards; accuracies 0 and 2/3 of 252 to 32."""
    chart = charts.reliability_chart(reliability(np.array([0.15, 0.95, 0.95, 0.95]), np.array([0, 1, 1, 0], bool)))
    low, high = marks_of(chart, Rect, "column")
    assert (low.x, low.y, low.width, low.height) == pytest.approx((88.8, 252, 37.8, 0))
    assert (high.x, high.y, high.width, high.height) == pytest.approx((407.2, 105.3333, 37.8, 146.6667), abs=1e-3)
    assert [text.content for text in marks_of(chart, Text, "count")] == ["1", "3"]
    assert marks_of(chart, Circle)[1].title == "confidence 0.9 to 1: 3 answers, mean confidence 0.950, right 67%"


def test_histogram_chart():
    chart = charts.histogram_chart([0.95, 0.95, 1.0], [0.0], 0.9)
    scale = 238 / (3 + 0.12 * 3)  # two up, one down, 6% of three beyond both
    zero = 252 - scale * (1 + 0.18)
    width = 398 / 16
    expected = [
        ("wrong", 48 + 1, zero, scale),
        ("right", 48 + 5 * width + 1, zero - 2 * scale, 2 * scale),  # 0.95 is 1.30 nines, bin 5
        ("right", 48 + 15 * width + 1, zero - scale, scale),
    ]
    for bar, (kind, *box) in zip(marks_of(chart, Rect), expected, strict=True):
        assert bar.kind == kind
        assert [bar.x, bar.y, bar.height] == pytest.approx(box)
    assert marks_of(chart, Rect)[1].title == "confidence 0.9438 to 0.9684: 2 right"
    assert marks_of(chart, Line, "threshold")[0].x1 == 48 + 398 / 4
    assert chart.legend == [("right", "right (3)"), ("wrong", "wrong (1)")]


def test_bars_chart():
    bars = [("a" * 30, Estimate(value=0.5, low=0.2, high=0.8), 40), ("b", Estimate(value=0), 4)]
    chart = charts.bars_chart(bars, "share")
    first, second = marks_of(chart, Rect, "bar")
    assert (first.x, first.width, second.width, second.y - first.y) == (150, 125, 0, 26)
    assert first.title == f"{'a' * 30}: 50% of 40 rows"
    names = [text for text in marks_of(chart, Text, "tick") if text.anchor == "end"]
    assert [text.content for text in names] == ["a" * 19 + "…", "b"]
    assert [text.in_files for text in names] == ["a" * 28 + " (40)", "b (4)"]
    (whisker,) = marks_of(chart, Line, "whisker")
    assert (whisker.x1, whisker.x2) == pytest.approx((200, 350))
