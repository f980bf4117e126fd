"""Choice of the early exit's threshold from samples, with its figures on held-out rows.

Goals
- `no_loss`: think as little as possible while auto is not worse than always thinking by more than a margin. The lower
  end of the 95% interval of the paired difference of scores must be above -margin. Thresholds are tried downward from
  the one that never exits, and the search ends at the first that fails: among so many, one would pass by luck, and
  tests in a fixed sequence need no correction (Angelopoulos et al., arXiv 2110.01052, section 4). The interval is the
  bootstrap's, which cannot see a loss that no clip shows: where direct answers are wrong once in 33 times and the
  margin is 0.01, sets of 40, 100 and 300 clips chose a threshold that loses more in 67%, 45% and 22% of 60 trials.
  `Calibration.caution` warns wherever the clips are too few for the margin.
- `ratio`, `tokens`: think as much as a budget allows: a share of rows that reason, or mean generated tokens. Labels are
  not needed.
- `accuracy`: the best score; among equal thresholds, the one that thinks least.

Only thresholds that change a decision are tried: 0 (every direct answer is taken), the midpoints between neighbouring
confidences, and one threshold above all confidences (no direct answer is taken).

In-sample figures, on the rows that chose the threshold, are optimistically biased. Rows are therefore also dealt into
folds, whole clips and pairs at a time; each fold is decided by the threshold that the other folds chose, and these
decisions together give the held-out figures. The threshold itself is chosen on all rows. Folds and resamples depend on
ids and seed, not on the order of the samples.

Temperature scaling is reported beside the raw confidence, also on held-out rows. It is increasing, so the decisions at
the mapped threshold are the same. Thresholds here are always for the raw confidence, which the reasoner compares.
"""

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import get_args

import numpy as np

from mlxvr.errors import ConfigError, DataError
from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import Bootstrap, Clustered, clusters_of, not_none
from mlxvr.evaluation.analysis.calibration import Calibration, Goal, TaskThreshold, TemperatureFit, ThresholdOutcome
from mlxvr.evaluation.analysis.grades import direct_grade, is_live, mode_grade, usable
from mlxvr.evaluation.analysis.reliability import brier, expected_calibration_error, fit_temperature, reliability, scale
from mlxvr.evaluation.samples import Sample, ordered

__all__ = ["CalibrationPlan", "calibrate", "check_enough"]

_BUDGETS = ("ratio", "tokens")
_LEAST_ROWS = 20


@dataclass(frozen=True)
class CalibrationPlan:
    """What a threshold is chosen for, and how; refuses values that cannot be used when it is built.

    Attributes:
        goal: see the module.
        margin: for `no_loss`: tolerated loss of the mean score, in [0, 1].
        budget: for `ratio` a share in [0, 1], for `tokens` mean tokens.
        folds: number of folds, at least 2.
        per_task: also choose a threshold for each task that has at least `least_per_task` rows.
        temperature: also fit temperature scaling.
        bootstrap: number of resamples for the intervals, and for the choice by `no_loss`.
        seed: of folds and resamples.
    """

    goal: Goal
    _: KW_ONLY
    margin: float = 0.01
    budget: float | None = None
    folds: int = 5
    per_task: bool = False
    least_per_task: int = 100
    temperature: bool = False
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.goal not in get_args(Goal):
            raise ConfigError(f"goal {self.goal!r} is unknown: use one of {', '.join(get_args(Goal))}")
        if not 0 <= self.margin <= 1:
            raise ConfigError(f"margin {self.margin} is outside [0, 1]: it is a share of the score, such as 0.01")
        if (self.budget is None) == (self.goal in _BUDGETS):
            needs = "needs a budget" if self.budget is None else "takes no budget; use ratio or tokens"
            raise ConfigError(f"goal {self.goal} {needs}")
        if self.budget is not None and not 0 <= self.budget <= (1 if self.goal == "ratio" else math.inf):
            raise ConfigError(f"budget {self.budget} cannot be used: a ratio is from 0 to 1, tokens are not below 0")
        if self.folds < 2:
            raise ConfigError(f"folds {self.folds} holds no rows out: use at least 2, for example 5")
        if self.goal == "no_loss" and self.bootstrap < 100:
            raise ConfigError(f"bootstrap {self.bootstrap} is too few for an interval: use at least 100, better 1000")

    @property
    def needs_labels(self) -> bool:
        """Whether scores are compared, so that rows need a right answer."""
        return self.goal not in _BUDGETS


def calibrate(samples: Iterable[Sample], plan: CalibrationPlan) -> Calibration:
    """Choose the threshold that meets a goal best.

    Args:
        samples: of think mode, in any order; rows that failed are left out, and for `no_loss` and `accuracy` also rows
            without a label.
        plan: the goal, and how the threshold is chosen.

    Raises:
        ConfigError: the budget cannot be met, or the samples are of a live run.
        DataError: too few rows or clips, or no labels for a goal that needs them.
    """
    eligible = _eligible(samples, plan)
    threshold, thresholds, held_out, in_sample = _fit(eligible, plan)
    tasks: dict[str, TaskThreshold] = {}
    for name in sorted({sample.task for sample in eligible} - {""}) if plan.per_task else ():
        own = [sample for sample in eligible if sample.task == name]
        tasks[name] = TaskThreshold(threshold=threshold, count=len(own), held_out=None)
        if len(own) >= plan.least_per_task:
            with contextlib.suppress(ConfigError, DataError):  # too few clips, or the budget cannot be met
                chosen, _, outcome, _ = _fit(own, plan)
                tasks[name] = TaskThreshold(threshold=chosen, count=len(own), held_out=outcome)
    return Calibration(
        threshold=threshold,
        goal=plan.goal,
        margin=plan.margin if plan.goal == "no_loss" else None,
        budget=plan.budget,
        fold_thresholds=tuple(thresholds),
        held_out=held_out,
        in_sample=in_sample,
        per_task=tasks,
        temperature=_fit_temperature(eligible, plan) if plan.temperature else None,
        folds=plan.folds,
        bootstrap=plan.bootstrap,
        seed=plan.seed,
    )


@dataclass(frozen=True, eq=False)
class _Columns:
    """Rows as columns of length n; scores are 0 where there is no label."""

    confidence: np.ndarray  # float; nan where there is none
    labelled: np.ndarray  # bool
    direct: np.ndarray
    think: np.ndarray
    right: np.ndarray  # bool: the first answer is right
    first_tokens: np.ndarray
    total_tokens: np.ndarray
    clusters: np.ndarray

    @classmethod
    def of(cls, samples: list[Sample]) -> "_Columns":
        direct = [direct_grade(sample) for sample in samples]
        think = [mode_grade(sample, sample.final) for sample in samples]
        return cls(
            confidence=np.array([math.nan if s.confidence is None else s.confidence for s in samples]),
            labelled=np.array([sample.is_labelled for sample in samples], dtype=bool),
            direct=np.array([grade.score if grade else 0.0 for grade in direct]),
            think=np.array([grade.score if grade else 0.0 for grade in think]),
            right=np.array([grade is not None and grade.is_right for grade in direct], dtype=bool),
            first_tokens=np.array([sample.first_tokens for sample in samples], dtype=np.float64),
            total_tokens=np.array([sample.total_tokens for sample in samples], dtype=np.float64),
            clusters=clusters_of(samples),
        )

    def only(self, chosen: np.ndarray) -> "_Columns":
        columns = {name: column[chosen] for name, column in vars(self).items()}
        columns["clusters"] = np.unique(columns["clusters"], return_inverse=True)[1]
        return _Columns(**columns)

    def __len__(self) -> int:
        return len(self.confidence)


def _eligible(samples: Iterable[Sample], plan: CalibrationPlan) -> list[Sample]:
    finished = usable(ordered(samples))
    if is_live(finished):
        raise ConfigError("a live run stopped at its own threshold and shows no other: generate without --live")
    if not plan.needs_labels:
        return finished
    labelled = [sample for sample in finished if sample.is_labelled]
    if finished and not labelled:
        raise DataError(f"goal {plan.goal} needs rows with an answer, and none has one: use goal ratio or tokens")
    return labelled


def _fit(samples: list[Sample], plan: CalibrationPlan) -> tuple[float, list[float], ThresholdOutcome, ThresholdOutcome]:
    """The threshold from all rows, the folds' thresholds, and the outcomes on held-out rows and in-sample."""
    check_enough(samples, plan.folds)
    rows = _Columns.of(samples)
    folds = _folds(rows.clusters, plan)
    threshold = _choose(rows, plan)
    if threshold is None:
        raise ConfigError(_out_of_reach(rows, plan))
    chosen = [_choose(rows.only(folds != fold), plan) or 0.0 for fold in range(plan.folds)]
    held_out = _outcome(rows, np.array(chosen)[folds], plan)
    return threshold, chosen, held_out, _outcome(rows, np.full(len(rows), threshold), plan)


def check_enough(rows: Sequence[Clustered], folds: int) -> None:
    """Raise `DataError` when rows, generated or not asked yet, are too few to choose a threshold."""
    if len(rows) < _LEAST_ROWS:
        count = formatting.count(len(rows), "row")
        raise DataError(f"too few rows to choose a threshold: {count}; at least {_LEAST_ROWS} are needed")
    clips = int(clusters_of(rows).max()) + 1
    if clips < folds:
        count = formatting.count(clips, "independent clip")
        raise DataError(f"too few clips for {folds} folds: {count}; use more clips, or fewer folds")


def _folds(clusters: np.ndarray, plan: CalibrationPlan) -> np.ndarray:
    """The fold of each row; a cluster is never split."""
    count = int(clusters.max()) + 1
    dealt = np.empty(count, dtype=np.int64)
    dealt[np.random.default_rng(plan.seed).permutation(count)] = np.arange(count) % plan.folds
    return dealt[clusters]


def _choose(rows: _Columns, plan: CalibrationPlan) -> float | None:
    """The best of the thresholds that change a decision; None: the budget cannot be met."""
    thresholds, levels = _thresholds(rows.confidence)

    def exits(values: np.ndarray) -> np.ndarray:
        """The sum of `values` over the rows that exit, at each threshold; (.., n) -> (.., thresholds)."""
        sums = np.zeros((*values.shape[:-1], len(thresholds)))
        has = levels >= 0
        order = np.argsort(levels[has], kind="stable")
        if len(order):
            starts = np.flatnonzero(np.diff(levels[has][order], prepend=-1))
            each = np.add.reduceat(values[..., has][..., order], starts, axis=-1)
            sums[..., :-1] = np.cumsum(each[..., ::-1], axis=-1)[..., ::-1]
        return sums

    if plan.goal == "ratio":
        cost = 1 - exits(np.ones(len(rows))) / len(rows)
    elif plan.goal == "tokens":
        cost = (rows.total_tokens.sum() + exits(rows.first_tokens - rows.total_tokens)) / len(rows)
    else:
        difference = rows.direct - rows.think
        if plan.goal == "accuracy":
            return float(thresholds[int(np.argmax(np.round(exits(difference), 9)))])
        weights = Bootstrap(rows.clusters, count=plan.bootstrap, seed=plan.seed).row_weights
        draws = exits(weights * difference) / weights.sum(axis=1, keepdims=True)
        fails = np.flatnonzero(np.percentile(draws, 2.5, axis=0) < -plan.margin - 1e-12)
        return float(thresholds[fails[-1] + 1 if len(fails) else 0])  # the last threshold never exits and never fails
    assert plan.budget is not None
    affordable = np.flatnonzero(cost <= plan.budget + 1e-9)
    return float(thresholds[affordable[-1]]) if len(affordable) else None


def _thresholds(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The thresholds that change a decision, rising, and by row the index of the last at which it exits, or -1."""
    levels = np.unique(confidence[~np.isnan(confidence)])
    middles = (levels[:-1] + levels[1:]) / 2
    middles = np.where(middles > levels[:-1], middles, levels[1:])
    top = 1.0 if not len(levels) or levels[-1] < 1 else math.nextafter(1.0, 2.0)
    thresholds = np.array([0.0, *middles, top] if len(levels) else [top])
    return thresholds, np.where(np.isnan(confidence), -1, np.searchsorted(levels, confidence))


def _outcome(rows: _Columns, thresholds: np.ndarray, plan: CalibrationPlan) -> ThresholdOutcome:
    """Score and cost of the rows, each at its own threshold."""
    exits = rows.confidence >= thresholds
    resamples = Bootstrap(rows.clusters, count=plan.bootstrap, seed=plan.seed)
    auto = np.where(exits, rows.direct, rows.think)
    return ThresholdOutcome(
        count=len(rows),
        clips=int(rows.clusters.max()) + 1,
        think_ratio=not_none(resamples.share(1.0 - exits)),
        tokens=not_none(resamples.mean(np.where(exits, rows.first_tokens, rows.total_tokens))),
        always_tokens=float(rows.total_tokens.mean()),
        auto=resamples.share(auto, rows.labelled),
        think=resamples.share(rows.think, rows.labelled),
        direct=resamples.share(rows.direct, rows.labelled),
        difference=resamples.mean(auto - rows.think, rows.labelled),
    )


def _out_of_reach(rows: _Columns, plan: CalibrationPlan) -> str:
    exits = ~np.isnan(rows.confidence)
    if plan.goal == "ratio":
        least = f"a ratio of {1 - exits.mean():.3f}"
    else:
        least = f"{np.where(exits, rows.first_tokens, rows.total_tokens).mean():.1f} tokens"
    return f"budget {plan.budget:g} cannot be met: rows without a direct answer always reason, so {least} is the least"


def _fit_temperature(samples: list[Sample], plan: CalibrationPlan) -> TemperatureFit:
    rows = _Columns.of(samples)
    folds = _folds(rows.clusters, plan)
    among = rows.labelled & ~np.isnan(rows.confidence)
    scaled = rows.confidence.copy()
    for fold in range(plan.folds):
        training, test = among & (folds != fold), among & (folds == fold)
        scaled[test] = scale(rows.confidence[test], fit_temperature(rows.confidence[training], rows.right[training]))
    confidence, scaled, right = rows.confidence[among], scaled[among], rows.right[among]
    return TemperatureFit(
        temperature=fit_temperature(confidence, right),
        count=len(right),
        ece=expected_calibration_error(reliability(confidence, right)) or 0.0,
        ece_scaled=expected_calibration_error(reliability(scaled, right)) or 0.0,
        brier=float(brier(confidence, right).mean()),
        brier_scaled=float(brier(scaled, right).mean()),
    )
