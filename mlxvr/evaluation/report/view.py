"""What the page's template is fed: plain data, with every figure as text. The words of the page are in the template.

A `Cell` is a figure as the page shows it. Each function gives the data of one part of the page, or None (or nothing)
where the run has no figures for it, so that the template leaves the part out.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import Estimate
from mlxvr.evaluation.analysis.calibration import Calibration, ThresholdOutcome
from mlxvr.evaluation.analysis.compare import Change, Comparison
from mlxvr.evaluation.analysis.run_summary import Distribution, Figures, GroupSummary, Summary
from mlxvr.evaluation.graded_rows import GradedRow
from mlxvr.evaluation.report.charts import MOST_BARS, Chart
from mlxvr.evaluation.report.content import Content, score_name

__all__ = ["Cell", "make_view"]

_FEW_CLIPS = 50


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
    """All that the template shows, by name; `sections` lists those parts that have figures, in the page's order."""
    summary, group = content.summary, content.summary.overall
    parts = {
        "against": _comparison(content),
        "modes": None if group is None else _modes(content.rows, group),
        "cost": _cost(content) if group is not None and content.curve else None,
        "confidence": None if group is None or group.confidence is None else _confidence(group),
        "tasks": _breakdown(summary.per_task, "Task", "task"),
        "categories": _breakdown(summary.per_category, "Category", "category"),
        "calibration": None if content.calibration is None else _calibration(content.calibration, summary.threshold),
        "format": _format(summary) if summary.count else None,
        "gallery": _gallery(content) if content.records else None,
        "made": _made(content),
    }
    return {
        "title": content.title,
        "subtitle": _subtitle(content),
        "mode": content.settings.get("mode"),
        "before": None if content.against is None else content.against.title,
        "lead": _lead(summary),
        "verdict": None if group is None else _verdict(group),
        "tiles": None if group is None else _tiles(summary, group),
        "cautions": _cautions(content),
        "sections": [name for name, part in parts.items() if part is not None],
        "charts": charts,
        "data": _embedded(content),
        **parts,
    }


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


def _noun(group: GroupSummary) -> str:
    return {"Accuracy": "accuracy", "mIoU": "mIoU", "Score": "score"}[score_name(group)]


def _subtitle(content: Content) -> list[str]:
    """What was asked of what, as far as the title does not say it."""
    values = [str(content.settings[name]) for name in ("model", "data", "task") if content.settings.get(name)]
    return [value for value in values if value not in content.title]


def _lead(summary: Summary) -> dict[str, Any]:
    """The figures of the operating point that the first sentence tells."""
    group = summary.overall
    lead: dict[str, Any] = {"rows": summary.count, "has_figures": group is not None}
    if group is None:
        return lead
    auto, think, change = group.auto, group.think, group.auto_vs_think
    lead |= {
        "threshold": formatting.confidence(summary.threshold),
        "questions": group.count,
        "clips": group.clips,
        "think_ratio": formatting.share(group.think_ratio, group.count),
        "noun": _noun(group),
        "score": None if auto.score is None else _share(auto.score, auto.labelled),
        "tokens": formatting.tokens(auto.tokens.mean),
        "think_tokens": None,
        "change": None,
    }
    if think is not None:
        saved = 1 - auto.tokens.mean / think.tokens.mean if think.tokens.mean else 0.0
        lead |= {"think_tokens": formatting.tokens(think.tokens.mean), "saved": formatting.share(saved, 1)}
        if change is not None:
            lead["change"] = {
                "sign": (change.value > 0) - (change.value < 0),
                "size": formatting.points(change, auto.labelled).lstrip("+−"),
                "interval": formatting.points_interval(change, auto.labelled),
                "has_interval": change.low is not None,
            }
    return lead


def _verdict(group: GroupSummary) -> dict[str, Any] | None:
    """What the interval of auto against think allows to say."""
    change, rows = group.auto_vs_think, group.auto.labelled
    if change is None or change.low is None or change.high is None or change.low == change.high:
        return None
    low, high = (
        formatting.points(Estimate(value=end, low=change.low, high=change.high), rows)
        for end in (change.low, change.high)
    )
    kind = "bad" if change.high < 0 else "good" if change.low > 0 else ""
    return {"kind": kind, "noun": _noun(group), "low": low, "high": high}


def _tiles(summary: Summary, group: GroupSummary) -> list[dict[str, str]]:
    """The operating point's figures, large."""
    auto, think, rows = group.auto, group.think, group.auto.labelled

    def modes(written: Callable[[Figures], str]) -> str:
        return ", ".join(
            f"{name} {written(mode)}" for name, mode in (("direct", group.direct), ("think", think)) if mode is not None
        )

    tiles = []
    if auto.score is not None:
        note = modes(lambda mode: formatting.share(mode.score, rows))
        tiles.append((f"Auto {_noun(group)}", formatting.share(auto.score, rows), note))
    ratio = _share(group.think_ratio, group.count)
    tiles.append(("Think ratio", ratio.text, f"interval {ratio.small}" if ratio.small else ""))
    note = modes(lambda mode: formatting.tokens(mode.tokens.mean))
    tiles.append(("Tokens a question", formatting.tokens(auto.tokens.mean), note))
    shared = summary.shared["media_seconds"] + summary.shared["prefill_seconds"]
    if auto.seconds.mean or shared:
        note = f"{formatting.seconds(auto.seconds.mean)} to generate, {formatting.seconds(shared)} to read the clip"
        note += f"; think {formatting.seconds(shared + think.seconds.mean)}" if think is not None else ""
        tiles.append(("Time a question", formatting.seconds(shared + auto.seconds.mean), note))
    if group.confidence is not None and group.confidence.auroc is not None:
        area = formatting.plain(group.confidence.auroc, group.confidence.count)
        tiles.append(("Confidence AUROC", area, "0.5 says nothing, 1 tells right from wrong"))
    return [{"name": name, "value": value, "note": note} for name, value, note in tiles]


def _cautions(content: Content) -> dict[str, Any]:
    """What a reader should know before trusting the figures: how many rows or clips each caution is about."""
    summary, group = content.summary, content.summary.overall
    cautions: dict[str, Any] = {"rows": summary.count, "failed": len(summary.errors), "has_figures": group is not None}
    if group is None:
        return cautions
    labelled, ratio = group.auto.labelled, None if summary.live else group.think_ratio.value
    return cautions | {
        "questions": group.count,
        "clips": group.clips,
        "few_clips": group.clips < _FEW_CLIPS,
        "unlabelled": group.count - labelled if labelled else 0,
        "missing_boxes": group.missing_boxes,
        "always_reasons": ratio == 1,
        "never_reasons": ratio == 0,
        "wrong_exits": sum(
            record["error"] is None and not record["reasoned"] and record["right"]["auto"] is False
            for record in content.records
        ),
    }


def _modes(rows: Sequence[GradedRow], group: GroupSummary) -> dict[str, Any]:
    """The three modes side by side, and their differences: (0 or 1 for which, points with their interval)."""
    sizes = _sizes(rows)
    modes = [("direct", "first answer", group.direct), ("auto", "early exit", group.auto)]
    if group.think is not None:
        modes.insert(1, ("think", "always reasons", group.think))
    columns = ["Mode", *_score_columns(group.direct, sizes), "Tokens", "Seconds"]
    body = [
        [
            Cell(name, note),
            *_score_cells(figures, group.direct, sizes),
            _spread(figures.tokens, formatting.tokens),
            _spread(figures.seconds, formatting.seconds),
        ]
        for name, note, figures in modes
    ]
    labelled = group.auto.labelled
    gain, versus = (
        None if estimate is None else _difference(estimate, labelled) for estimate in (group.gain, group.auto_vs_think)
    )
    return {"table": (columns, body), "gain": gain, "auto_vs_think": versus}


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


def _score_columns(figures: Figures, sizes: Mapping[str, int]) -> list[str]:
    columns = ["Score"] if figures.accuracy is not None and figures.miou is not None else []
    if figures.accuracy is not None:
        columns.append(f"Accuracy (n {sizes['accuracy']:,})")
    if figures.miou is not None:
        columns += [f"mIoU (n {sizes['iou']:,})", *(f"R@{least}" for least in figures.recall)]
    if figures.grounded_accuracy is not None:
        columns.append("Acc@GQA")
    if figures.pair_accuracy is not None:
        columns.append(f"Pairs (n {sizes['pairs']:,})")
    return columns


def _score_cells(figures: Figures, pattern: Figures, sizes: Mapping[str, int]) -> list[Cell]:
    """The cells of `_score_columns(pattern)`."""
    cells = []
    if pattern.accuracy is not None and pattern.miou is not None:
        cells.append(_share(figures.score, sizes["score"]))
    if pattern.accuracy is not None:
        cells.append(_share(figures.accuracy, sizes["accuracy"]))
    if pattern.miou is not None:
        overlaps = [figures.miou, *(figures.recall.get(least) for least in pattern.recall)]
        cells += [_share(estimate, sizes["iou"]) for estimate in overlaps]
    if pattern.grounded_accuracy is not None:
        cells.append(_share(figures.grounded_accuracy, sizes["both"]))
    if pattern.pair_accuracy is not None:
        cells.append(_share(figures.pair_accuracy, sizes["pairs"]))
    return cells


def _cost(content: Content) -> dict[str, Any]:
    """The slider along the curve: its last place, and the place nearest to the run's threshold."""
    distances = [abs(row.threshold - content.summary.threshold) for row in content.curve]
    return {
        "score_name": score_name(content.summary.overall),
        "some_always_reason": content.curve[0].think_ratio != 0,
        "last": len(content.curve) - 1,
        "place": distances.index(min(distances)),
    }


def _confidence(group: GroupSummary) -> dict[str, Any]:
    """How well the confidence tells right from wrong."""
    assert group.confidence is not None
    measures = group.confidence
    area, rows = measures.auroc, measures.count
    has_interval = area is not None and area.low is not None and area.high is not None
    return {
        "auroc": None if area is None else formatting.plain(area, rows),
        "auroc_interval": [formatting.plain(end, rows) for end in (area.low, area.high)]
        if area is not None and has_interval
        else None,
        "ece": formatting.plain(measures.ece, rows),
        "brier": formatting.plain(measures.brier, rows),
        "answers": rows,
        "right": formatting.share(measures.accuracy, rows),
    }


def _breakdown(groups: Mapping[str, GroupSummary], title: str, key: str) -> dict[str, Any] | None:
    """The figures by task or category; `key` is the gallery's filter of that name."""
    if not groups:
        return None
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
    nouns = sorted({_noun(group) for group in groups.values() if group.auto.labelled})
    return {"table": (columns, body), "nouns": nouns, "left_out": max(0, len(groups) - MOST_BARS)}


def _format(summary: Summary) -> dict[str, Any]:
    """Rows that failed, and departures from the format."""
    group, table = summary.overall, None
    if group is not None:
        departures = [
            (Cell("first answer declines (“Let's analyze …”)"), group.fallbacks, "fallback"),
            (Cell("no first answer box"), group.missing_boxes, "no_box"),
            *((Cell(name, kind="code"), number, f"problem:{name}") for name, number in group.problems.items()),
        ]
        body = [
            [cell, Cell(f"{number:,}"), _link("show", format=value) if number else Cell("")]
            for cell, number, value in departures
        ]
        table = (["Departure", f"Rows of {group.count:,}", ""], body)
    return {"table": table, "errors": summary.errors}


def _calibration(calibration: Calibration, threshold: float) -> dict[str, Any]:
    """The threshold that was chosen, and what it is worth on rows that did not choose it."""
    outcomes = [("held-out folds", calibration.held_out), ("the rows that chose it", calibration.in_sample)]
    columns = ["", "Auto", "Think", "Direct", "Auto − think", "Think ratio", "Tokens", "Always thinking"]
    return {
        "goal": calibration.goal,
        "margin": None if calibration.margin is None else f"{100 * calibration.margin:g}",
        "budget": None if calibration.budget is None else f"{calibration.budget:g}",
        "budget_share": None if calibration.budget is None else f"{calibration.budget:.0%}",
        "threshold": formatting.confidence(calibration.threshold),
        "is_above_all": calibration.threshold > 1,
        "folds": calibration.folds,
        "fold_thresholds": sorted({formatting.confidence(value) for value in calibration.fold_thresholds}),
        "caution": calibration.caution,
        "page_threshold": None if calibration.threshold == threshold else formatting.confidence(threshold),
        "outcomes": (columns, [_outcome(name, outcome) for name, outcome in outcomes]),
        "tasks": _task_thresholds(calibration) if calibration.per_task else None,
        "temperature": _temperature(calibration),
    }


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


def _task_thresholds(calibration: Calibration) -> dict[str, Any]:
    """The tasks with a threshold of their own, and how many take the common one."""
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
    columns = ["Task", "Threshold", "Rows", "Auto − think, held out", "Think ratio", "Tokens"]
    return {"table": (columns, body) if body else None, "too_few_rows": len(calibration.per_task) - len(body)}


def _temperature(calibration: Calibration) -> dict[str, Any] | None:
    fit = calibration.temperature
    if fit is None:
        return None
    measures = [("raw", fit.ece, fit.brier), ("scaled", fit.ece_scaled, fit.brier_scaled)]
    body = [[Cell(name), *(Cell(formatting.plain(value, fit.count)) for value in values)] for name, *values in measures]
    return {"value": f"{fit.temperature:.3g}", "answers": fit.count, "table": (["Confidence", "ECE", "Brier"], body)}


def _comparison(content: Content) -> dict[str, Any] | None:
    """This run against another, row by row."""
    if content.against is None:
        return None
    comparison, before = content.against.comparison, content.against.title
    changes = (("direct", comparison.direct), ("think", comparison.think), ("auto", comparison.auto))
    scores = [[Cell(name), *_change_cells(change)] for name, change in changes if change is not None]
    rows, began, stopped = comparison.count, len(comparison.began_to_think), len(comparison.stopped_thinking)
    means = [_means(run, comparison) for run in (content.against.rows, content.rows)]
    costs = [
        [
            Cell("think ratio"),
            *(Cell(formatting.share(ratio, rows)) for ratio, _ in means),
            _difference(comparison.think_ratio, rows, is_cost=True),
        ],
        [
            Cell("tokens a question"),
            *(Cell(formatting.tokens(tokens)) for _, tokens in means),
            _tokens_difference(comparison.tokens),
        ],
    ]
    drift, thresholds = comparison.confidence_drift, comparison.thresholds
    changed = f"{formatting.count(comparison.answers_changed, 'first answer')} read otherwise"
    columns = ["Score", before, content.title, "Difference", "Became right", "Became wrong"]
    return {
        "auto": None if comparison.auto is None else _auto_change(comparison.auto),
        "scores": (columns, scores) if scores else None,
        "costs": (["Auto", before, content.title, "Difference"], costs),
        "rows": rows,
        "clips": comparison.clips,
        "thresholds": [formatting.confidence(value) for value in thresholds]
        if thresholds[0] != thresholds[1]
        else None,
        "flipped": formatting.share(comparison.flipped, rows),
        "began": _link(f"{began:,} began to think", began, against="began_to_think"),
        "stopped": _link(f"{stopped:,} stopped", stopped, against="stopped_thinking"),
        "changed": _link(changed, comparison.answers_changed, against="answer_changed"),
        "drift": None if drift is None else formatting.confidence(round(drift.value, 6)),
        "only_before": len(comparison.only_first),
        "only_here": len(comparison.only_second),
    }


def _auto_change(change: Change) -> dict[str, str]:
    """How auto's score changed, and whether this run is better, worse, the same, or none of these can be shown."""
    difference = change.difference
    cell = _difference(difference, change.labelled)
    outcome = cell.kind or ("same" if difference.value == 0 and not cell.small else "")
    return {"points": cell.text, "interval": cell.small, "outcome": outcome}


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


def _gallery(content: Content) -> dict[str, int]:
    return {"left_out": content.clips_left_out, "shown": sum(bool(clip["frames"]) for clip in content.clips)}


def _made(content: Content) -> list[tuple[str, str]]:
    """What the run was made with: (name, value)."""
    summary = content.summary
    return [
        *_flat(content.settings),
        ("threshold", repr(summary.threshold)),
        ("rows", str(summary.count)),
        ("resamples behind intervals", str(summary.bootstrap)),
        ("seed", str(summary.seed)),
    ]


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
