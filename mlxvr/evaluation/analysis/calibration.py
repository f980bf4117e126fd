"""A threshold and the evidence for it, as plain data: `threshold_search.calibrate` returns it."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mlxvr.evaluation.analysis.bootstrap import Estimate

__all__ = ["Calibration", "Goal", "TaskThreshold", "TemperatureFit", "ThresholdOutcome"]

Goal = Literal["no_loss", "ratio", "tokens", "accuracy"]

_TAIL = 0.025  # beyond one end of a 95% interval


@dataclass(frozen=True, kw_only=True)
class ThresholdOutcome:
    """Score and cost of a set of rows under thresholds; scores are None without labels.

    Attributes:
        count, clips: rows, and independent clusters of them.
        think_ratio: share of rows that reason.
        tokens: mean generated tokens.
        always_tokens: the same if every row reasoned.
        auto, think, direct: mean scores (`Grade.score`).
        difference: auto minus think, paired.
    """

    count: int
    clips: int
    think_ratio: Estimate
    tokens: Estimate
    always_tokens: float
    auto: Estimate | None
    think: Estimate | None
    direct: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True, kw_only=True)
class TaskThreshold:
    """A task's threshold; `held_out` is None where the task has too few rows and gets the common threshold."""

    threshold: float
    count: int
    held_out: ThresholdOutcome | None


@dataclass(frozen=True, kw_only=True)
class TemperatureFit:
    """Temperature scaling: the temperature fitted to all rows, and ECE and Brier score of held-out rows with it."""

    temperature: float
    count: int
    ece: float
    ece_scaled: float
    brier: float
    brier_scaled: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold and the evidence for it.

    Attributes:
        threshold: chosen on all rows; just above 1 when some confidence is 1 and no direct answer may be taken.
        goal, margin, budget: of the `CalibrationPlan`; a margin or budget that the goal does not use is None.
        fold_thresholds: the threshold chosen on each fold's training rows; their spread shows how stable the choice is.
        held_out: every row decided by a threshold that was chosen without it.
        in_sample: every row decided by `threshold`; optimistically biased.
        per_task: by task, if asked for.
        temperature: if asked for.
        folds, bootstrap, seed: of the `CalibrationPlan`.
    """

    threshold: float
    goal: Goal
    margin: float | None
    budget: float | None
    fold_thresholds: tuple[float, ...]
    held_out: ThresholdOutcome
    in_sample: ThresholdOutcome
    per_task: dict[str, TaskThreshold] = field(default_factory=dict)
    temperature: TemperatureFit | None = None
    folds: int
    bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, nested, with the caution."""
        return asdict(self) | {"fold_thresholds": list(self.fold_thresholds), "caution": self.caution}

    @property
    def caution(self) -> str:
        """For `no_loss`, one sentence on the loss that so few clips cannot rule out; "" where it is within the margin.

        If a share p of clips loses its answer, n clips show no loss with probability (1 - p)^n. The p at which this is
        2.5% is the upper end of the exact 95% interval (Clopper and Pearson 1934) of a share that was never observed.
        """
        clips = self.in_sample.clips
        if self.margin is None or (unseen := 1 - _TAIL ** (1 / clips)) <= self.margin:
            return ""
        warning = f"{clips} clips without a loss cannot rule out a loss of {unseen:.3f}, more than {self.margin:g}"
        if self.margin == 0:
            return warning
        needed = math.ceil(math.log(_TAIL) / math.log1p(-self.margin))
        return f"{warning}: it takes {needed} clips to rule out more than that"
