"""The figures of an evaluation as the table that the command line prints."""

from typing import TYPE_CHECKING

from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import Estimate
from mlxvr.evaluation.analysis.compare import Comparison
from mlxvr.evaluation.analysis.run_summary import Figures, GroupSummary

if TYPE_CHECKING:
    from mlxvr.evaluation.analysis.calibration import Calibration
    from mlxvr.evaluation.finishing import EvalReport

__all__ = ["table"]

_SCORES = (("accuracy", "accuracy"), ("miou", "mIoU"), ("grounded_accuracy", "Acc@GQA"), ("pair_accuracy", "pairs"))


def table(report: "EvalReport") -> str:
    """Several lines: the modes side by side, measures of the confidence, tasks, then calibration and comparison."""
    summary, group = report.summary, report.summary.overall
    lines = [f"{report.settings['model']} on {report.settings['data']}, threshold {summary.threshold:g}"]
    if group is None:
        return lines[0]
    failed = f", {len(summary.errors)} failed" if summary.errors else ""
    size = f"{formatting.count(group.count, 'question')} about {formatting.count(group.clips, 'clip')}{failed}"
    lines += [
        f"{size}; in brackets 95% intervals over clips",
        "",
        *_modes(group),
    ]
    lines += ["", *_confidence(group)]
    for name, task in summary.per_task.items() if len(summary.per_task) > 1 else ():
        modes = [figures.score for figures in (task.direct, task.think, task.auto) if figures is not None]
        scores = " / ".join("-" if score is None else f"{score.value:.3f}" for score in modes)
        lines.append(
            f"{name:24} {scores}, thinks {task.think_ratio.value:.2f}, {formatting.count(task.count, 'question')}"
        )
    if report.calibration is not None:
        lines += ["", *_calibration(report.calibration)]
    if report.threshold_file is not None:
        lines.append(f"written to {report.threshold_file}")
    if report.comparison is not None:
        lines += ["", *_comparison(report.comparison)]
    return "\n".join([*lines, "", f"written to {report.page or report.output}"])


def _modes(group: GroupSummary) -> list[str]:
    modes = [("direct", group.direct, 0.0), ("think", group.think, 1.0), ("auto", group.auto, group.think_ratio.value)]
    shown = [(name, figures, ratio) for name, figures, ratio in modes if figures is not None]
    rows: list[tuple[str, list[str]]] = [
        (title, [_estimate(getattr(figures, name)) for _, figures, _ in shown])
        for name, title in _SCORES
        if getattr(group.auto, name) is not None
    ]
    rows += [
        (f"R@{least}", [_estimate(figures.recall.get(least)) for _, figures, _ in shown]) for least in group.auto.recall
    ]
    rows.append(("thinks", [f"{ratio:.2f}" for _, _, ratio in shown]))
    rows.append(("tokens (p50, p95)", [_cost(figures, "tokens", ".1f") for _, figures, _ in shown]))
    rows.append(("seconds (p50, p95)", [_cost(figures, "seconds", ".2f") for _, figures, _ in shown]))
    rows.insert(0, ("", [name for name, _, _ in shown]))
    widths = [max(len(cells[place]) for _, cells in rows) for place in range(len(shown))]
    return [
        f"{title:20}" + "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths)).rstrip()
        for title, cells in rows
    ]


def _confidence(group: GroupSummary) -> list[str]:
    lines = []
    if group.gain is not None:
        lines.append(f"gain from thinking  {_signed(group.gain)}")
    if group.auto_vs_think is not None:
        lines.append(f"auto against think  {_signed(group.auto_vs_think)}")
    if group.confidence is not None:
        measures = group.confidence
        lines.append(
            f"confidence          AUROC {_estimate(measures.auroc)}, ECE {measures.ece:.3f}, "
            f"Brier {measures.brier.value:.3f}"
        )
    lines.append(f"first answers       {group.fallbacks} declined, {group.missing_boxes} without a box")
    return lines


def _calibration(calibration: "Calibration") -> list[str]:
    outcome = calibration.held_out
    asked = "" if calibration.budget is None else f" {calibration.budget:g}"
    folds = ", ".join(f"{threshold:.3f}" for threshold in calibration.fold_thresholds)
    lines = [
        f"calibrated for {calibration.goal}{asked}: threshold {calibration.threshold:.4f} (folds {folds})",
        f"  held out: thinks {_estimate(outcome.think_ratio)}, {outcome.tokens.value:.1f} tokens "
        f"({outcome.always_tokens:.1f} always thinking)",
    ]
    if outcome.auto is not None and outcome.difference is not None:
        lines.append(
            f"  held out: score {_estimate(outcome.auto)}, against always thinking {_signed(outcome.difference)}"
        )
    lines += [f"  caution: {calibration.caution}"] if calibration.caution else []
    for name, task in calibration.per_task.items():
        own = "too few rows, the common one" if task.held_out is None else f"{task.count} rows"
        lines.append(f"  {name:22} {task.threshold:.4f} ({own})")
    if calibration.temperature is not None:
        fit = calibration.temperature
        lines.append(
            f"  temperature {fit.temperature:.3f}: ECE {fit.ece:.3f} -> {fit.ece_scaled:.3f}, "
            f"Brier {fit.brier:.3f} -> {fit.brier_scaled:.3f} (held out)"
        )
    return lines


def _comparison(comparison: Comparison) -> list[str]:
    before, after = comparison.thresholds
    lines = [
        f"against the other run: {formatting.count(comparison.count, 'row')} in both, "
        f"thresholds {before:g} -> {after:g}"
    ]
    for name, change in (("direct", comparison.direct), ("think", comparison.think), ("auto", comparison.auto)):
        if change is not None:
            lines.append(
                f"  {name:8} {change.first.value:.3f} -> {change.second.value:.3f}, {_signed(change.difference)}, "
                f"{len(change.became_right)} became right, {len(change.became_wrong)} wrong"
            )
    lines.append(
        f"  thinks {_signed(comparison.think_ratio)}, tokens {comparison.tokens.value:+.1f}, "
        f"{comparison.flipped:.1%} of the decisions flipped"
    )
    return lines


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.3f}" + (
        "" if estimate.low == estimate.high else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    )


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f}" + (
        "" if estimate.low == estimate.high else f" [{estimate.low:+.3f}, {estimate.high:+.3f}]"
    )


def _cost(figures: Figures, name: str, form: str) -> str:
    cost = getattr(figures, name)
    return f"{cost.mean:{form}} ({cost.p50:{form}}, {cost.p95:{form}})"
