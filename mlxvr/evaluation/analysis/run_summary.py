"""The figures of a run, as plain data: what `metrics.summarise` returns and what reports are made of."""

from dataclasses import asdict, dataclass, field
from typing import Any

from mlxvr.evaluation.analysis.bootstrap import Estimate
from mlxvr.evaluation.analysis.reliability import Bin

__all__ = ["Confidence", "Distribution", "Figures", "GroupSummary", "Summary"]


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Mean and percentiles of a cost."""

    mean: float
    p50: float
    p90: float
    p95: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One mode over one set of rows; a figure that the rows do not have is None.

    Attributes:
        labelled: how many rows were graded.
        score: mean score.
        accuracy: share of right answers (exact_match, math, and the answers of grounded questions).
        miou: mean temporal IoU (grounding, grounded questions).
        recall: share of rows with an IoU of at least 0.3, 0.5, 0.7, by "0.3", "0.5", "0.7".
        grounded_accuracy: NExT-GQA's Acc@GQA: the answer is right and at least half of the interval is in the segment.
        pair_accuracy: share of pairs with every row right.
        tokens, seconds: generated, and in what time.
    """

    labelled: int
    score: Estimate | None
    accuracy: Estimate | None
    miou: Estimate | None
    recall: dict[str, Estimate]
    grounded_accuracy: Estimate | None
    pair_accuracy: Estimate | None
    tokens: Distribution
    seconds: Distribution


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """How well the confidence of first answers tells right from wrong (`mlxvr.evaluation.analysis.reliability`).

    Attributes:
        count: labelled rows that have a confidence.
        accuracy: how many of their first answers are right; an interval is right from an IoU of 0.5.
        bins: the reliability curve.
        ece, brier: expected calibration error and Brier score; 0 is best.
        auroc: 0.5 says nothing, 1 separates; None when all are right or all are wrong. It has no interval where all
            resamples agree, such as where it is 1.
    """

    count: int
    accuracy: Estimate
    bins: list[Bin]
    ece: float
    brier: Estimate
    auroc: Estimate | None


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """A set of rows: the whole, a task or a category.

    Attributes:
        count: rows without an error.
        clips: independent clusters of them (rows that share a clip or a pair are one).
        direct, think, auto: the modes; `think` is None for a live run.
        think_ratio: share of rows that reason in auto.
        gain: score of think minus score of direct, paired.
        auto_vs_think: score of auto minus score of think, paired; below 0 the early exit loses.
        confidence: None when no labelled row has one.
        fallbacks: rows whose first box declines to answer.
        missing_boxes: rows without a first box.
        problems: rows with each departure from the format, by its name.
    """

    count: int
    clips: int
    direct: Figures
    think: Figures | None
    auto: Figures
    think_ratio: Estimate
    gain: Estimate | None
    auto_vs_think: Estimate | None
    confidence: Confidence | None
    fallbacks: int
    missing_boxes: int
    problems: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a run at one threshold.

    Attributes:
        threshold: from which confidence a first answer stands in auto.
        live: whether the run stopped early itself.
        count: rows, those that failed included.
        errors: rows that failed, by id, with the reason.
        shared: mean seconds of reading frames ("media_seconds") and of prefill ("prefill_seconds"), mean tokens of the
            prompt ("prompt_tokens", "video_tokens"): what every mode pays.
        overall: all rows that did not fail; None: there are none.
        per_task, per_category: the same by name, sorted; rows without a name are in none.
        bootstrap, seed: resamples behind the intervals.
    """

    threshold: float
    live: bool
    count: int
    errors: dict[str, str]
    shared: dict[str, float]
    overall: GroupSummary | None
    per_task: dict[str, GroupSummary] = field(default_factory=dict)
    per_category: dict[str, GroupSummary] = field(default_factory=dict)
    bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, nested."""
        return asdict(self)
