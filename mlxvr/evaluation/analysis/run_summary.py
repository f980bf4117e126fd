"""The figures of a run as plain data: `metrics.summarise` returns them, and reports are made from them."""

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
    """The figures of one mode over a set of rows; a figure that does not apply to the rows is None.

    Attributes:
        labelled: number of graded rows.
        score: mean score.
        accuracy: share of right answers (exact_match, math, and the answers of grounded questions).
        miou: mean temporal IoU (grounding, grounded questions).
        recall: share of rows with an IoU of at least 0.3, 0.5, 0.7, by "0.3", "0.5", "0.7".
        grounded_accuracy: NExT-GQA's Acc@GQA: the answer is right and at least half of the interval is in the segment.
        pair_accuracy: share of pairs with every row right.
        tokens, seconds: generated tokens, and the seconds of generating them.
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
    """How well the confidence of first answers separates right from wrong (`mlxvr.evaluation.analysis.reliability`).

    Attributes:
        count: labelled rows that have a confidence.
        accuracy: share of their first answers that are right; an interval is right from an IoU of 0.5.
        bins: the reliability curve.
        ece, brier: expected calibration error and Brier score; 0 is best.
        auroc: 0.5 is chance, 1 is perfect separation; None when all are right or all are wrong. It has no interval
            where all resamples agree, such as where it is 1.
    """

    count: int
    accuracy: Estimate
    bins: list[Bin]
    ece: float
    brier: Estimate
    auroc: Estimate | None


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """The figures of a set of rows: the whole run, a task or a category.

    Attributes:
        count: rows without an error.
        clips: independent clusters of rows (rows that share a clip or a pair are in one cluster).
        direct, think, auto: the modes; `think` is None for a live run.
        think_ratio: share of rows that reason in auto.
        gain: score of think minus score of direct, paired.
        auto_vs_think: score of auto minus score of think, paired; below 0 the early exit costs score.
        confidence: None when no labelled row has a confidence.
        fallbacks: rows whose first box declines to answer.
        missing_boxes: rows without a first box.
        problems: number of rows with each format problem, by the problem's name.
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
        threshold: confidence from which auto takes a first answer.
        live: whether the run stopped early itself.
        count: rows, failed ones included.
        errors: the reason of each row that failed, by id.
        shared: costs that all modes have: mean seconds of reading frames ("media_seconds") and of prefill
            ("prefill_seconds"), mean tokens of the prompt ("prompt_tokens", "video_tokens").
        overall: all rows that did not fail; None: there are none.
        per_task, per_category: the same by name, sorted; rows without a name are left out.
        bootstrap, seed: number and seed of the resamples for the intervals.
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
