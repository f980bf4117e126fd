"""A report's charts as files, PNG and SVG, for slides and papers; needs matplotlib (extra `plot`).

The charts in the page are drawn by `charts` and need nothing. Here the same figures go through matplotlib; `plotting`
says how all plots look and writes the files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvr.cli.plotting import BLUE, GRAY, ORANGE, RED, VIOLET, have_matplotlib, write_plot
from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import wilson
from mlxvr.evaluation.graded_rows import Judged
from mlxvr.evaluation.report.charts import histogram, nines
from mlxvr.evaluation.report.content import Content, score_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["have_matplotlib", "write_plots"]

_TICKS = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)


def write_plots(content: Content, folder: Path) -> list[Path]:
    """Write `cost`, `reliability`, `confidence` and `think_ratio`, as far as there are figures, as PNG and SVG.

    Each file is replaced in one step. Returns the files.
    """
    written = []
    for name, draw in _plots(content).items():
        paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
        write_plot(lambda figure, draw=draw: draw(figure.add_subplot()), *paths)  # type: ignore[misc]
        written += paths
    return written


def _plots(content: Content) -> dict[str, Callable[["Axes"], None]]:
    group = content.summary.overall
    if group is None:
        return {}
    plots: dict[str, Callable[[Any], None]] = {}
    if content.curve and group.auto.score is not None:
        plots["cost"] = lambda axes: _cost(axes, content)
    if group.confidence is not None:
        plots["reliability"] = lambda axes: _reliability(axes, content)
        plots["confidence"] = lambda axes: _confidence(axes, content)
    if content.summary.per_task:
        plots["think_ratio"] = lambda axes: _think_ratio(axes, content)
    return plots


def _cost(axes: "Axes", content: Content) -> None:
    runs = [(content.title, content.summary.overall, content.curve, BLUE, "-")]
    if content.against is not None and content.against.curve:
        runs.append((content.against.title, content.against.summary.overall, content.against.curve, VIOLET, "--"))
    for title, group, curve, color, style in runs:
        rows = [row for row in curve if row.score is not None]
        axes.plot(
            [row.mean_tokens for row in rows], [100 * (row.score or 0) for row in rows], style, color=color, label=title
        )
        assert group is not None
        for name, mode in (("direct", group.direct), ("think", group.think), ("auto", group.auto)):
            if mode is None or mode.score is None:
                continue
            x, y, marker = (
                mode.tokens.mean,
                100 * mode.score.value,
                RED if name == "auto" and color == BLUE else color,
            )
            if mode.score.low is not None and mode.score.high is not None:
                axes.vlines(x, 100 * mode.score.low, 100 * mode.score.high, color=marker, alpha=0.5)
            axes.plot([x], [y], "o", color=marker)
            if group is content.summary.overall:
                place = {"direct": (8, -12), "think": (-8, -14), "auto": (8, -14)}[name]
                side = "right" if name == "think" else "left"
                axes.annotate(name, (x, y), xytext=place, textcoords="offset points", ha=side)
    axes.set_xlim(left=0)
    axes.set_xlabel("mean generated tokens per question")
    axes.set_ylabel(f"{score_name(content.summary.overall)} (%)")
    axes.set_title(_at(content), fontsize=10)
    if len(runs) > 1:
        axes.legend(loc="lower right")


def _reliability(axes: "Axes", content: Content) -> None:
    assert content.summary.overall is not None
    assert content.summary.overall.confidence is not None
    axes.plot([0, 1], [0, 1], ":", color=GRAY)
    for one in content.summary.overall.confidence.bins:
        if one.accuracy is None or one.confidence is None:
            continue
        low, high = wilson(one.accuracy * one.count, one.count)
        axes.vlines(one.confidence, low, high, color=BLUE, alpha=0.5)
        axes.plot([one.confidence], [one.accuracy], "o", color=BLUE)
        axes.annotate(f"{one.count:,}", (one.confidence, high), xytext=(0, 3), textcoords="offset points", ha="center")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.08)
    axes.set_xlabel("confidence of the first answer")
    axes.set_ylabel("how often it is right")


def _confidence(axes: "Axes", content: Content) -> None:
    for label, color, is_right in (("right", BLUE, True), ("wrong", ORANGE, False)):
        found = _confidences(content.rows, is_right)
        counts = histogram(found)
        width = nines(1) / len(counts)
        heights = [count if is_right else -count for count in counts]
        places = [width * place for place in range(len(counts))]
        axes.bar(places, heights, 0.94 * width, align="edge", color=color, label=f"{label} ({len(found):,})")
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.locator_params(axis="y", integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,g}")
    label = f"threshold {formatting.confidence(content.summary.threshold)}"
    axes.axvline(nines(min(1.0, content.summary.threshold)), color=RED, linestyle="--", linewidth=1, label=label)
    axes.set_xticks([nines(value) for value in _TICKS], [f"{value:g}" for value in _TICKS])
    axes.set_xlabel("confidence (axis stretched towards 1)")
    axes.set_ylabel("first answers")
    axes.legend()


def _confidences(rows: Any, is_right: bool) -> list[float]:
    def counts(row: Judged) -> bool:
        return row.sample.error is None and row.direct is not None and row.direct.is_right is is_right

    return [row.sample.confidence for row in rows if row.sample.confidence is not None and counts(row)]


def _think_ratio(axes: "Axes", content: Content) -> None:
    tasks = sorted(content.summary.per_task.items(), key=lambda item: item[1].think_ratio.value)[-30:]
    for place, (_, group) in enumerate(tasks):
        ratio = group.think_ratio
        axes.barh(place, 100 * ratio.value, color=BLUE, alpha=0.6)
        if ratio.low is not None and ratio.high is not None:
            axes.hlines(place, 100 * ratio.low, 100 * ratio.high, color="#333333", linewidth=1)
    axes.set_yticks(range(len(tasks)), [f"{name[:28]} ({group.count:,})" for name, group in tasks])
    axes.set_xlim(0, 100)
    axes.set_xlabel("rows that reason (%)")


def _at(content: Content) -> str:
    return f"{content.title}, threshold {formatting.confidence(content.summary.threshold)}"
