"""What the page's template is given: the figures of a run, tables of them as text, and the parts that the page has.

The words of the page are in the template. It reads figures from the dataclasses of `mlxvr.evaluation.analysis` and
writes them with `FILTERS`. What takes more than that, such as a table whose columns depend on the rows, is put together
here.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import Estimate
from mlxvr.evaluation.analysis.calibration import Calibration, ThresholdOutcome
from mlxvr.evaluation.analysis.compare import Change, Comparison
from mlxvr.evaluation.analysis.run_summary import Distribution, Figures, GroupSummary
from mlxvr.evaluation.graded_rows import GradedRow
from mlxvr.evaluation.report.charts import Chart
from mlxvr.evaluation.report.content import Content, score_name

__all__ = ["FILTERS", "Cell", "make_view"]


@dataclass(frozen=True)
class Cell:
    """A figure as text.

    Attributes:
        text, small: the figure, and what stands beside it in small print, mostly its interval.
        kind: better or worse, where the figure is coloured; code, where it is a name in a file.
        show: the gallery's filters that a click sets; None: no link.
    """

    text: str
    small: str = ""
    kind: str = ""
    show: Mapping[str, str] | None = None


Table = tuple[Sequence[str], Sequence[Sequence[Cell]]]  # names of columns, rows


def make_view(content: Content, charts: Mapping[str, Chart]) -> dict[str, Any]:
    """What the template shows, by name; `sections` are the parts that the run has figures for, in the page's order."""
    summary, calibration, against = content.summary, content.calibration, content.against
    group = summary.overall
    parts = {
        "against": against is not None,
        "modes": group is not None,
        "cost": bool(content.curve),
        "confidence": group is not None and group.confidence is not None,
        "tasks": bool(summary.per_task),
        "categories": bool(summary.per_category),
        "calibration": calibration is not None,
        "format": summary.count > 0,
        "gallery": bool(content.records),
        "made": True,
    }
    distances = [abs(row.threshold - summary.threshold) for row in content.curve]
    asked = [str(content.settings[name]) for name in ("model", "data", "task") if content.settings.get(name)]
    return {
        **{name: getattr(content, name) for name in ("title", "summary", "curve", "calibration", "clips")},
        "subtitle": [value for value in asked if value not in content.title],
        "mode": content.settings.get("mode"),
        "nearest": distances.index(min(distances)) if distances else None,
        "group": group,
        "before": None if against is None else against.title,
        "comparison": None if against is None else against.comparison,
        "sections": [name for name, is_there in parts.items() if is_there],
        "charts": charts,
        "tables": _tables(content),
        "wrong_exits": sum(
            record["error"] is None and not record["reasoned"] and record["right"]["auto"] is False
            for record in content.records
        ),
        "clips_left_out": content.clips_left_out,
        "made": list(_flat(content.settings)),
        "data": _embedded(content),
    }


def _tables(content: Content) -> dict[str, Table]:
    """The tables that the run has figures for, by name."""
    summary, calibration, against = content.summary, content.calibration, content.against
    tables: dict[str, Table] = {}
    if summary.overall is not None:
        tables |= {"modes": _modes(content.rows, summary.overall), "format": _departures(summary.overall)}
    if summary.per_task:
        tables["tasks"] = _breakdown(summary.per_task, "Task", "task")
    if summary.per_category:
        tables["categories"] = _breakdown(summary.per_category, "Category", "category")
    if calibration is not None:
        tables |= {"outcomes": _outcomes(calibration), "thresholds": _task_thresholds(calibration)}
        if fit := calibration.temperature:
            measures = [("raw", fit.ece, fit.brier), ("scaled", fit.ece_scaled, fit.brier_scaled)]
            rows = [[Cell(name), *(Cell(formatting.plain(value, fit.count)) for value in values)]
                    for name, *values in measures]  # fmt: skip
            tables["temperature"] = (["Confidence", "ECE", "Brier"], rows)
    if against is not None:
        means = [_means(rows, against.comparison) for rows in (against.rows, content.rows)]
        names = (against.title, content.title)
        tables |= {"scores": _scores(against.comparison, names), "costs": _costs(against.comparison, names, means)}
    return {name: table for name, table in tables.items() if table[1]}


def _share(estimate: Estimate | None, rows: int) -> Cell:
    """A share of so many rows with its interval."""
    return Cell(formatting.share(estimate, rows), formatting.interval(estimate, rows))


def _difference(estimate: Estimate | None, rows: int, *, is_cost: bool = False) -> Cell:
    """Points with their interval, coloured as better or worse where it leaves out zero, unless they are a cost."""
    interval, kind = formatting.points_interval(estimate, rows), ""
    if estimate is not None and estimate.low is not None and estimate.high is not None and interval and not is_cost:
        kind = "better" if estimate.low > 0 else "worse" if estimate.high < 0 else ""
    return Cell(formatting.points(estimate, rows), interval, kind)


def _link(text: str, rows: int = 1, **filters: str) -> Cell:
    """A link that sets the gallery's filters; the text alone where they would show no rows."""
    return Cell(text, show=filters if rows else None)


def _modes(rows: Sequence[GradedRow], group: GroupSummary) -> Table:
    """The three modes side by side."""
    sizes = _sizes(rows)
    modes = [("direct", "first answer", group.direct), ("auto", "early exit", group.auto)]
    if group.think is not None:
        modes.insert(1, ("think", "always reasons", group.think))
    scores = _score_columns(group.direct, sizes)
    body = [
        [
            Cell(name, note),
            *(_share(score(figures), rows_of_score) for _, score, rows_of_score in scores),
            _spread(figures.tokens, formatting.tokens),
            _spread(figures.seconds, formatting.seconds),
        ]
        for name, note, figures in modes
    ]
    return ["Mode", *(title for title, _, _ in scores), "Tokens", "Seconds"], body


def _spread(cost: Distribution, written: Callable[[float], str]) -> Cell:
    percentiles = " · ".join(written(value).removesuffix(" s") for value in (cost.p50, cost.p90, cost.p95))
    return Cell(written(cost.mean), percentiles)


def _sizes(rows: Sequence[GradedRow]) -> dict[str, int]:
    """How many rows, or pairs, each figure is over."""
    usable = [row for row in rows if row.sample.error is None]
    grades = [row.direct for row in usable if row.direct is not None]
    pairs: dict[str, list[bool]] = {}
    for row in usable:
        pairs.setdefault(row.sample.pair, []).append(row.direct is not None)
    return {
        "score": len(grades),
        "accuracy": sum(grade.accuracy is not None for grade in grades),
        "iou": sum(grade.iou is not None for grade in grades),
        "both": sum(grade.accuracy is not None and grade.iou is not None for grade in grades),
        "pairs": sum(name != "" and len(members) > 1 and all(members) for name, members in pairs.items()),
    }


def _score_columns(
    figures: Figures, sizes: Mapping[str, int]
) -> list[tuple[str, Callable[[Figures], Estimate | None], int]]:
    """The scores that a mode has: title, how to get them from a mode, and over how many rows they are."""
    columns: list[tuple[str, Callable[[Figures], Estimate | None], int]] = []
    if figures.accuracy is not None and figures.miou is not None:
        columns.append(("Score", lambda mode: mode.score, sizes["score"]))
    if figures.accuracy is not None:
        columns.append((f"Accuracy (n {sizes['accuracy']:,})", lambda mode: mode.accuracy, sizes["accuracy"]))
    if figures.miou is not None:
        columns.append((f"mIoU (n {sizes['iou']:,})", lambda mode: mode.miou, sizes["iou"]))
        for least in figures.recall:
            columns.append((f"R@{least}", lambda mode, least=least: mode.recall.get(least), sizes["iou"]))  # type: ignore[misc]
    if figures.grounded_accuracy is not None:
        columns.append(("Acc@GQA", lambda mode: mode.grounded_accuracy, sizes["both"]))
    if figures.pair_accuracy is not None:
        columns.append((f"Pairs (n {sizes['pairs']:,})", lambda mode: mode.pair_accuracy, sizes["pairs"]))
    return columns


def _breakdown(groups: Mapping[str, GroupSummary], title: str, key: str) -> Table:
    """The figures by task or category; `key` is the gallery's filter of that name."""
    has_think = all(group.think is not None for group in groups.values())
    has_labels = any(group.auto.labelled for group in groups.values())
    columns = [title, "Rows", "Clips"]
    columns += ["Direct", *(["Think"] if has_think else []), "Auto"] if has_labels else []
    columns += ["Gain of thinking", "Auto − think"] if has_labels and has_think else []
    columns += ["Think ratio", "Tokens", *(["of think’s"] if has_think else [])]
    body = []
    for name, group in groups.items():
        rows, think = group.auto.labelled, group.think if has_think else None
        cells = [_link(name, group.count, **{key: name}), Cell(f"{group.count:,}"), Cell(f"{group.clips:,}")]
        if has_labels:
            modes = [group.direct, *([think] if think is not None else []), group.auto]
            cells += [_share(figures.score, rows) for figures in modes]
        if has_labels and think is not None:
            cells += [_difference(group.gain, rows), _difference(group.auto_vs_think, rows)]
        cells += [_share(group.think_ratio, group.count), Cell(formatting.tokens(group.auto.tokens.mean))]
        if think is not None:
            always = think.tokens.mean
            cells.append(Cell(formatting.share(group.auto.tokens.mean / always, 1) if always else "–"))
        body.append(cells)
    return columns, body


def _departures(group: GroupSummary) -> Table:
    """Departures from the format."""
    departures = [
        (Cell("first answer declines (“Let's analyze …”)"), group.fallbacks, "fallback"),
        (Cell("no first answer box"), group.missing_boxes, "no_box"),
        *((Cell(name, kind="code"), number, f"problem:{name}") for name, number in group.problems.items()),
    ]
    body = [
        [cell, Cell(f"{number:,}"), _link("show", format=value) if number else Cell("")]
        for cell, number, value in departures
    ]
    return ["Departure", f"Rows of {group.count:,}", ""], body


def _outcomes(calibration: Calibration) -> Table:
    """What the chosen threshold is worth on rows that did not choose it, and on those that did."""
    columns = ["", "Auto", "Think", "Direct", "Auto − think", "Think ratio", "Tokens", "Always thinking"]
    outcomes = (("held-out folds", calibration.held_out), ("the rows that chose it", calibration.in_sample))
    return columns, [_outcome(name, outcome) for name, outcome in outcomes]


def _outcome(name: str, outcome: ThresholdOutcome) -> list[Cell]:
    rows = outcome.count
    return [
        Cell(name),
        *(_share(score, rows) for score in (outcome.auto, outcome.think, outcome.direct)),
        _difference(outcome.difference, rows),
        _share(outcome.think_ratio, rows),
        Cell(formatting.tokens(outcome.tokens.value)),
        Cell(formatting.tokens(outcome.always_tokens)),
    ]


def _task_thresholds(calibration: Calibration) -> Table:
    """The tasks with a threshold of their own."""
    body = [
        [
            Cell(name),
            Cell(formatting.confidence(task.threshold)),
            Cell(f"{task.count:,}"),
            _difference(task.held_out.difference, task.held_out.count),
            _share(task.held_out.think_ratio, task.held_out.count),
            Cell(formatting.tokens(task.held_out.tokens.value)),
        ]
        for name, task in calibration.per_task.items()
        if task.held_out is not None
    ]
    return ["Task", "Threshold", "Rows", "Auto − think, held out", "Think ratio", "Tokens"], body


def _scores(comparison: Comparison, names: tuple[str, str]) -> Table:
    """The modes in both runs."""
    changes = (("direct", comparison.direct), ("think", comparison.think), ("auto", comparison.auto))
    body = [[Cell(name), *_change_cells(change)] for name, change in changes if change is not None]
    return ["Score", *names, "Difference", "Became right", "Became wrong"], body


def _costs(comparison: Comparison, names: tuple[str, str], means: Sequence[tuple[float, float]]) -> Table:
    """Auto's cost in both runs; `means` are those of `_means`."""
    rows = comparison.count
    ratios = [Cell(formatting.share(ratio, rows)) for ratio, _ in means]
    tokens = [Cell(formatting.tokens(mean)) for _, mean in means]
    body = [
        [Cell("think ratio"), *ratios, _difference(comparison.think_ratio, rows, is_cost=True)],
        [Cell("tokens a question"), *tokens, _tokens_difference(comparison.tokens)],
    ]
    return ["Auto", *names, "Difference"], body


def _change_cells(change: Change) -> list[Cell]:
    rows = change.labelled
    return [
        _share(change.first, rows),
        _share(change.second, rows),
        _difference(change.difference, rows),
        Cell(f"{len(change.became_right):,}"),
        Cell(f"{len(change.became_wrong):,}"),
    ]


def _means(rows: Sequence[GradedRow], comparison: Comparison) -> tuple[float, float]:
    """Think ratio and mean tokens of auto over the rows that both runs have."""
    apart = {*comparison.only_first, *comparison.only_second}
    shared = [row for row in rows if row.sample.error is None and row.sample.id not in apart]
    spent = sum(row.sample.total_tokens if row.reasoned else row.sample.first_tokens for row in shared)
    return sum(row.reasoned for row in shared) / len(shared), spent / len(shared)


def _tokens_difference(change: Estimate) -> Cell:
    def signed(value: float) -> str:
        text = formatting.tokens(abs(value))
        return text if not text.strip("0.") else f"{'+' if value > 0 else '−'}{text}"

    has_interval = change.low is not None and change.high is not None and change.low != change.high
    small = f"{signed(change.low or 0.0)} to {signed(change.high or 0.0)}" if has_interval else ""
    return Cell(signed(change.value), small)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


def _embedded(content: Content) -> dict[str, Any]:
    """What the page's script reads: the figures, the gallery's rows and clips."""
    group = content.summary.overall
    score, rows = (None, 0) if group is None else (group.auto.score, group.auto.labelled or group.count)
    return {
        **content.figures,
        "digits": formatting.decimals(score or 0.0, rows),
        "score_name": score_name(group),
        "rows": list(content.records),
        "clips": list(content.clips),
        "against": None if content.against is None else {"title": content.against.title},
    }


def _noun(group: GroupSummary) -> str:
    """What the score of these rows is called within a sentence."""
    return {"Accuracy": "accuracy", "mIoU": "mIoU", "Score": "score"}[score_name(group)]


FILTERS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(formatting, name) for name in formatting.__all__},
    "difference": _difference,
    "link": _link,
    "noun": _noun,
}
