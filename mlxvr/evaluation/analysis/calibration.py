"""A threshold and the evidence for it, as plain data: what `threshold_search.calibrate` returns."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mlxvr.evaluation.analysis.bootstrap import Estimate

__all__ = ["Calibration", "Goal", "TaskThreshold", "TemperatureFit", "ThresholdOutcome"]

Goal = Literal["no_loss", "ratio", "tokens", "accuracy"]

_TAIL = 0.025  # beyond one end of a 95% interval


@dataclass(frozen=True, kw_only=True)
class ThresholdOutcome:
    """What thresholds do to a set of rows; scores are None without labels.

    Attributes:
        count, clips: rows, and independent clusters of them.
        think_ratio: share of rows that reason.
        tokens: mean generated tokens; `always_tokens` when every row reasons.
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
    """A task's threshold; `held_out` is None where it has too few rows and takes the common one."""

    threshold: float
    count: int
    held_out: ThresholdOutcome | None


@dataclass(frozen=True, kw_only=True)
class TemperatureFit:
    """Temperature scaling: the temperature of all rows, and what scaling does to held-out confidences."""

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
        threshold: from all rows; just above 1 when some confidence is 1 and no direct answer may stand.
        goal, margin, budget: what was asked for; the one that does not belong to the goal is None.
        fold_thresholds: what each fold's training rows chose: how firm the choice is.
        held_out: every row decided by a threshold that it had no part in.
        in_sample: every row decided by `threshold`; flatters it.
        per_task: by task, where it was asked for.
        temperature: where it was asked for.
        folds, bootstrap, seed: how it was done.
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
        """For `no_loss`, in one sentence: the loss that so few clips cannot rule out; "" where that is in the margin.

        If a share p of clips loses its answer, n clips show none of it with probability (1 - p)^n; the p at which that
        is 2.5% is the upper end of the exact 95% interval (Clopper and Pearson 1934) of a share that was never seen.
        """
        clips = self.in_sample.clips
        if self.margin is None or (unseen := 1 - _TAIL ** (1 / clips)) <= self.margin:
            return ""
        said = f"{clips} clips that show no loss leave room for one of {unseen:.3f}, more than {self.margin:g}"
        if self.margin == 0:
            return said
        needed = math.ceil(math.log(_TAIL) / math.log1p(-self.margin))
        return f"{said}: it takes {needed} clips to rule out more than that"
