"""The parts of a page about a decision: the calibrated threshold, and this run against another."""

from collections.abc import Sequence
from html import escape

from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.calibration import Calibration, ThresholdOutcome
from mlxvr.evaluation.analysis.compare import Change, Comparison
from mlxvr.evaluation.graded_rows import Judged
from mlxvr.evaluation.report.content import Content
from mlxvr.evaluation.report.markup import difference_cell, gallery_link, share_cell, table

__all__ = ["calibration_section", "comparison_section"]

_GOALS = {
    "no_loss": "no loss of score against always thinking, within {margin}",
    "ratio": "at most {budget:.0%} of the rows reason",
    "tokens": "at most {budget:g} mean tokens",
    "accuracy": "the best score",
}


def calibration_section(content: Content) -> str:
    """The threshold that was chosen, and what it is worth on rows that did not choose it."""
    found = content.calibration
    if found is None:
        return ""
    points = None if found.margin is None else f"{100 * found.margin:g}"
    margin = f"{points} {'point' if points == '1' else 'points'}"
    goal = _GOALS[found.goal].format(margin=margin, budget=found.budget)
    spread = sorted({formatting.confidence(one) for one in found.fold_thresholds})
    said = [
        f"Goal: {goal}. All rows choose <b>{formatting.confidence(found.threshold)}</b>; "
        f"the {found.folds} folds chose {_between(spread)}."
    ]
    if found.threshold > 1:
        said.append("No direct answer may stand: only always thinking meets the goal.")
    if found.caution:
        said.append(f"{found.caution}.")
    if found.threshold != content.summary.threshold:
        said.append(
            f"The other figures of this page are those of threshold {formatting.confidence(content.summary.threshold)}."
        )
    outcomes = table(
        ["", *("Auto", "Think", "Direct", "Auto − think", "Think ratio", "Tokens", "Always thinking")],
        [_outcome("held-out folds", found.held_out), _outcome("the rows that chose it", found.in_sample)],
    )
    note = "The held-out row is the honest one: each fold is decided by the threshold of the others."
    parts = [f"<p>{' '.join(said)}</p>{outcomes}<p class=note>{note}</p>"]
    parts.append(_task_thresholds(found))
    if found.temperature is not None:
        fit = found.temperature
        before, after = ((formatting.plain(one, fit.count) for one in pair) for pair in
                         ((fit.ece, fit.brier), (fit.ece_scaled, fit.brier_scaled)))  # fmt: skip
        parts.append(f"<h3>Temperature scaling</h3><p>T = {fit.temperature:.3g}, over {fit.count:,} answers, held out. "
                     "It changes what a confidence reads as, not which answers stand.</p>")  # fmt: skip
        parts.append(table(["Confidence", "ECE", "Brier"], [["raw", *before], ["scaled", *after]]))
    return "".join(parts)


def _task_thresholds(found: Calibration) -> str:
    if not found.per_task:
        return ""
    body = [
        [
            escape(name),
            formatting.confidence(task.threshold),
            f"{task.count:,}",
            difference_cell(task.held_out.difference, task.held_out.count),
            share_cell(task.held_out.think_ratio, task.held_out.count),
            formatting.tokens(task.held_out.tokens.value),
        ]
        for name, task in found.per_task.items()
        if task.held_out is not None
    ]
    others = len(found.per_task) - len(body)
    listed = (
        table(["Task", "Threshold", "Rows", "Auto − think, held out", "Think ratio", "Tokens"], body) if body else ""
    )
    said = f"{formatting.count(others, 'task')} with too few rows take the common threshold." if others else ""
    return f"<h3>Thresholds of tasks</h3>{listed}<p class=note>{said}</p>"


def _between(spread: Sequence[str]) -> str:
    return spread[0] if len(spread) == 1 else f"from {spread[0]} to {spread[-1]}"


def _outcome(name: str, found: ThresholdOutcome) -> list[str]:
    rows = found.count
    return [
        name,
        share_cell(found.auto, rows),
        share_cell(found.think, rows),
        share_cell(found.direct, rows),
        difference_cell(found.difference, rows),
        share_cell(found.think_ratio, rows),
        formatting.tokens(found.tokens.value),
        formatting.tokens(found.always_tokens),
    ]


def comparison_section(content: Content) -> str:
    """This run against another, row by row."""
    if content.against is None:
        return ""
    found, before = content.against.comparison, content.against.title
    body = []
    for name, change in (("direct", found.direct), ("think", found.think), ("auto", found.auto)):
        if change is not None:
            body.append([name, *_change_cells(change)])
    scores = table(["Score", before, content.title, "Difference", "Became right", "Became wrong"], body) if body else ""
    before_costs, after_costs = _means(content.against.rows, found, 0), _means(content.rows, found, 1)
    costs = table(
        ["Auto", before, content.title, "Difference"],
        [
            ["think ratio", formatting.share(before_costs[0], found.count),
             formatting.share(after_costs[0], found.count),
             difference_cell(found.think_ratio, found.count, is_cost=True)],
            ["tokens a question", formatting.tokens(before_costs[1]), formatting.tokens(after_costs[1]),
             _tokens_cell(found)],
        ],
    )  # fmt: skip
    began, stopped = len(found.began_to_think), len(found.stopped_thinking)
    said = [f"{formatting.count(found.count, 'row')} in both runs, on {formatting.count(found.clips, 'clip')}."]
    if found.thresholds[0] != found.thresholds[1]:
        told = " and ".join(formatting.confidence(one) for one in found.thresholds)
        said.append(f"Thresholds: {told}.")
    changed = formatting.count(found.answers_changed, "first answer")
    said.append(
        f"<b>{formatting.share(found.flipped, found.count)}</b> of the decisions flipped: "
        f"{gallery_link(f'{began:,} began to think', rows=began, against='began_to_think')}, "
        f"{gallery_link(f'{stopped:,} stopped', rows=stopped, against='stopped_thinking')}. "
        f"{gallery_link(f'{changed} read otherwise', rows=found.answers_changed, against='answer_changed')}."
    )
    if found.confidence_drift is not None:
        said.append(f"Confidences moved by {formatting.confidence(round(found.confidence_drift.value, 6))} on average.")
    if found.only_first or found.only_second:
        said.append(
            f"Left out, since the other run lacks them or failed there: {len(found.only_first):,} of {escape(before)}, "
            f"{len(found.only_second):,} of this run."
        )
    sentence = _difference_sentence(found, before)
    note = "Differences are this run minus the other, paired row by row, with 95% intervals over clips."
    return f'{sentence}{scores}{costs}<p>{" ".join(said)}</p><p class="note">{note}</p>'


def _difference_sentence(found: Comparison, before: str) -> str:
    change = found.auto
    if change is None:
        return ""
    difference = change.difference
    told = formatting.points_interval(difference, change.labelled)
    size = formatting.points(difference, change.labelled)
    said = f"{size} {'point' if size in ('+1', '−1') else 'points'}" + (f" ({told})" if told else "")
    kind = ""
    verdict = "no difference can be shown on these rows"
    if difference.low is not None and difference.high is not None and told:
        if difference.low > 0:
            kind, verdict = " good", "this run is better"
        elif difference.high < 0:
            kind, verdict = " bad", "this run is worse"
    elif difference.value == 0:
        verdict = "the same score in both"
    return f'<p class="verdict{kind}">Auto scores {said} against {escape(before)}: {verdict}.</p>'


def _change_cells(change: Change) -> list[str]:
    rows = change.labelled
    return [
        share_cell(change.first, rows),
        share_cell(change.second, rows),
        difference_cell(change.difference, rows),
        f"{len(change.became_right):,}",
        f"{len(change.became_wrong):,}",
    ]


def _means(rows: Sequence[Judged], found: Comparison, run: int) -> tuple[float, float]:
    """Think ratio and mean tokens of auto over the rows that both runs have."""
    apart = {*found.only_first, *found.only_second}
    kept = [row for row in rows if row.sample.error is None and row.sample.id not in apart]
    spent = sum(row.sample.total_tokens if row.reasoned else row.sample.first_tokens for row in kept)
    return sum(row.reasoned for row in kept) / len(kept), spent / len(kept)


def _tokens_cell(found: Comparison) -> str:
    def signed(value: float) -> str:
        text = formatting.tokens(abs(value))
        return text if not text.strip("0.") else f"{'+' if value > 0 else '−'}{text}"

    change = found.tokens
    if change.low is None or change.high is None or change.low == change.high:
        return signed(change.value)
    return f"{signed(change.value)} <small>{signed(change.low)} to {signed(change.high)}</small>"
