"""A report's charts as files, PNG and SVG, for slides and papers; needs matplotlib (extra `plot`).

They are the charts of the page (`charts`), mark by mark, with their heading and legend above them. The page's style
sheet has the colours of the screen; here are those of paper.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from mlxvr.cli.plotting import BLUE, GRAY, ORANGE, RED, VIOLET, have_matplotlib, write_plot
from mlxvr.evaluation.report import charts as drawn
from mlxvr.evaluation.report.charts import WIDTH, Chart, Mark, Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["have_matplotlib", "write_plots"]

_INCHES = 6.0  # across
_LINE = 18.0  # units of the view box: from one line of heading or legend to the next
_LETTER = 6.6  # likewise: about the width of a letter
_INK = "#1b1c1e"

# by the first of these words that is in a mark's kind
_COLORS = {
    "run1": VIOLET, "auto": RED, "threshold": RED, "whisker": _INK, "label": _INK, "grid": "#e6e8eb", "wrong": ORANGE,
    "right": BLUE, "column": BLUE, "bar": BLUE, "run0": BLUE,
}  # fmt: skip
_ALPHAS = {"column": 0.16, "bar": 0.55, "whisker": 0.45}
_WIDTHS = {"line": 2.0, "whisker": 1.5, "threshold": 1.5}
_DASHES = {"run1": (5, 4), "ideal": (3, 4), "threshold": (4, 3)}


def write_plots(charts: Mapping[str, Chart], folder: Path) -> list[Path]:
    """Write each chart under its name as PNG and SVG, each file in one step; return the files."""
    written = []
    for name, chart in charts.items():
        marks = [*_caption(chart), *chart.marks]
        texts = [mark for mark in marks if isinstance(mark, Text)]
        left = min([0.0, *(text.x - _LETTER * len(text.in_files) for text in texts if text.anchor == "end")])
        top = min(0.0, *(text.y - _LINE for text in texts))
        box = (left, WIDTH, chart.height, top)
        size = (_INCHES, _INCHES * (chart.height - top) / (WIDTH - left))
        paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
        write_plot(lambda figure, marks=marks, box=box: _paint(figure, marks, box), *paths, size=size)  # type: ignore[misc]
        written += paths
    return written


def _caption(chart: Chart) -> list[Mark]:
    """The heading and the legend, from the drawing upwards."""
    lines = [("", chart.heading)] if chart.heading else []
    lines += chart.legend
    marks: list[Mark] = []
    for index, (kind, label) in enumerate(lines):
        y = -_LINE * (len(lines) - 1 - index)
        marks.append(Text(48 if kind == "" else 64, y, shorten(label, 60, placeholder=" …"), "label", "start"))
        if kind:
            marks.append(drawn.Rect(48, y - 10, 11, 11, kind))
    return marks


def _paint(figure: "Figure", marks: Sequence[Mark], box: tuple[float, float, float, float]) -> None:
    """Put the marks on an empty figure; the box is (left, right, bottom, top) in their units."""
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(*box[:2])
    axes.set_ylim(*box[2:])
    points = 72 * _INCHES / (box[1] - box[0])  # of the printer to a unit
    for order, mark in enumerate(marks):
        if mark.kind != "probe":
            _put(axes, mark, points, order)


def _put(axes: "Axes", mark: Mark, points: float, order: int) -> None:
    from matplotlib.patches import Circle, Rectangle

    words = mark.kind.split()
    color = _first(_COLORS, words, GRAY)
    look: dict[str, Any] = {"zorder": order, "alpha": _first(_ALPHAS, words, None)}
    if isinstance(mark, drawn.Line | drawn.Polyline):
        corners = mark.points if isinstance(mark, drawn.Polyline) else [(mark.x1, mark.y1), (mark.x2, mark.y2)]
        dashes = _first(_DASHES, words, None)
        style = "solid" if dashes is None or "whisker" in words else (0, dashes)
        width = points * _first(_WIDTHS, words, 1.0)
        axes.plot(*zip(*corners), color=color, linewidth=width, linestyle=style, **look)
    elif isinstance(mark, drawn.Rect):
        axes.add_patch(Rectangle((mark.x, mark.y), mark.width, mark.height, color=color, linewidth=0, **look))
    elif isinstance(mark, drawn.Circle):
        face = "white" if "run1" in words else color
        edge = 2 * points if "run1" in words else 0
        axes.add_patch(Circle((mark.x, mark.y), mark.radius, facecolor=face, edgecolor=color, linewidth=edge, **look))
    else:
        is_label = "label" in words
        axes.text(
            mark.x,
            mark.y,
            mark.in_files or mark.content,
            color=color,
            fontsize=points * (11 if "count" in words else 12),
            fontweight="bold" if is_label else "normal",
            horizontalalignment={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
            verticalalignment="baseline",
            rotation=90 if mark.is_upright else 0,
            rotation_mode="anchor",
            parse_math=False,  # a title may hold dollars
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": points} if is_label else None,
            **look,
        )


def _first(table: Mapping[str, Any], words: Sequence[str], default: Any) -> Any:
    """The value of the first name in the table that is among the words."""
    return next((value for name, value in table.items() if name in words), default)
