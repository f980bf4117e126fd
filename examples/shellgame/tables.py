"""Tables of several evaluations side by side: `python -m shellgame.tables bf16=out16 "4 bits=out4" --out results.json`.

Each argument is a name and the output folder of a `mlxvr eval` run over the same clips; the first is what the others
are held against. Printed as Markdown: the modes with their cost and the quality of the confidence, auto at other
thresholds, and what choosing the threshold brings on clips that did not choose it.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mlxvr.evaluation.analysis.bootstrap import Estimate
from mlxvr.evaluation.analysis.calibration import Calibration
from mlxvr.evaluation.analysis.compare import compare
from mlxvr.evaluation.analysis.metrics import summarise
from mlxvr.evaluation.analysis.sweep import sweep
from mlxvr.evaluation.analysis.threshold_search import CalibrationPlan, calibrate
from mlxvr.evaluation.samples import Sample, read_samples

TAUS = (0.0, 0.3, 0.34, 0.35, 0.36, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.999, 1.0)
GOALS = (("no_loss", None), ("accuracy", None), ("ratio", 0.25), ("tokens", 30.0))

Runs = Mapping[str, Sequence[Sample]]


def modes_table(runs: Runs, threshold: float) -> str:
    """Accuracy of the three modes, what auto costs, and how far the run is from the first one."""
    header = (
        "", "direct", "think", "auto", "think ratio", "tokens think", "tokens auto",
        "AUROC", "ECE", "drift of confidence", "exits flipped",
    )  # fmt: skip
    first, rows = next(iter(runs.values())), []
    for name, samples in runs.items():
        group = summarise(samples, threshold=threshold).overall
        assert group is not None, "a run has rows"
        assert group.think is not None, "a run in think mode has second answers"
        change = compare(first, samples, threshold=threshold)
        flips = len(change.began_to_think) + len(change.stopped_thinking)
        apart = samples is not first and change.confidence_drift is not None
        rows.append(
            (
                name,
                *(_interval(figures.score) for figures in (group.direct, group.think, group.auto)),
                _interval(group.think_ratio),
                f"{group.think.tokens.mean:.1f}",
                f"{group.auto.tokens.mean:.1f}",
                _interval(group.confidence.auroc),
                f"{group.confidence.ece:.3f}",
                f"{change.confidence_drift.value:.4f}" if apart and change.confidence_drift else "",
                f"{flips} of {change.count}" if apart else "",
            )
        )
    return _markdown(header, rows)


def sweep_table(runs: Runs, thresholds: Sequence[float]) -> str:
    """Auto's score, think ratio and mean tokens at each threshold, one column a run."""
    columns = [sweep(samples, thresholds) for samples in runs.values()]
    rows = [
        (f"{threshold:g}", *(f"{at.score:.3f} / {at.think_ratio:.3f} / {at.mean_tokens:.1f}" for at in across))
        for threshold, across in zip(thresholds, zip(*columns, strict=True), strict=True)
    ]
    return _markdown(("threshold", *runs), rows)


def calibration_table(runs: Runs) -> tuple[str, dict[str, dict]]:
    """What each goal chooses, and what that brings on held-out clips; the choices, too."""
    rows, chosen = [], {}
    for name, samples in runs.items():
        for goal, budget in GOALS:
            found = calibrate(samples, CalibrationPlan(goal, budget=budget))  # type: ignore[arg-type]
            label = goal if budget is None else f"{goal}={budget:g}"
            chosen[f"{name}, {label}"] = {"threshold": found.threshold, "held_out": asdict(found.held_out)}
            rows.append((name, label, f"{found.threshold:.4f}", *_held_out(found)))
    header = ("", "goal", "threshold", "auto", "against think", "think ratio", "tokens (always thinking)")
    return _markdown(header, rows), chosen


def _held_out(found: Calibration) -> tuple[str, ...]:
    held = found.held_out
    cost = f"{held.tokens.value:.1f} ({held.always_tokens:.1f})"
    return _interval(held.auto), _interval(held.difference, "+.3f"), _interval(held.think_ratio), cost


def _interval(estimate: Estimate | None, form: str = ".3f") -> str:
    if estimate is None:
        return "-"
    ends = "" if estimate.low is None else f" [{estimate.low:{form}}, {estimate.high:{form}}]"
    return f"{estimate.value:{form}}{ends}"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR", help="a run's name and its output folder")
    parser.add_argument("--threshold", type=float, default=0.97)
    parser.add_argument("--out", type=Path, default=None, help="where to write the figures as JSON")
    options = parser.parse_args(argv)
    runs = {}
    for run in options.runs:
        name, _, folder = run.rpartition("=")
        runs[name] = read_samples(Path(folder) / "samples.jsonl")
    calibrated, chosen = calibration_table(runs)
    print(modes_table(runs, options.threshold), sweep_table(runs, TAUS), calibrated, sep="\n\n")
    if options.out is not None:
        figures = {
            "threshold": options.threshold,
            "runs": {
                name: {
                    "overall": asdict(summarise(samples, threshold=options.threshold))["overall"],
                    "sweep": [asdict(row) for row in sweep(samples, TAUS)],
                }
                for name, samples in runs.items()
            },
            "calibrations": chosen,
        }
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
