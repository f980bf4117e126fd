"""What direct answers, thinking always and the early exit are worth, and what each costs.

Every figure comes from one generation per row: direct takes the first box, think the end of the whole pass, auto the
one or the other by the confidence (`decide`). Rows that failed are counted and left out; rows without a label count
towards cost and think ratio only. Samples are sorted by id before anything is summed, so their order changes no digit.

The score of a row is one number in [0, 1] (`Grade.score`): accuracy, IoU, or the mean of both for grounded QA. A
mode's `score` is its mean over all rows; `accuracy` is over rows that have an answer to be right, `miou` and `recall`
over rows that have an interval. A pair (rows that share `pair`) is right when all its rows are; a pair of which only
one row is left is left out.

A live run (`reasoned` False somewhere) has only what it did: its auto figures are those of the threshold that it ran
with, and there is no think.

Seconds are those of generating. Reading frames and prefill are the same in every mode and stand beside them, as
`shared`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mlxvr.answering.transcript import is_fallback
from mlxvr.errors import ConfigError
from mlxvr.evaluation.bootstrap import Bootstrap, Estimate, clusters_of
from mlxvr.evaluation.reliability import Bin, auroc, brier, expected_calibration_error, reliability
from mlxvr.evaluation.samples import Sample, decide, ordered
from mlxvr.grading.lenient import Grade, grade_parts

__all__ = [
    "Confidence",
    "Distribution",
    "Figures",
    "Group",
    "Summary",
    "SweepRow",
    "direct_grade",
    "mode_grade",
    "summarise",
    "sweep",
    "usable",
]

_RECALLS = (0.3, 0.5, 0.7)
_GROUNDED_IOP = 0.5  # NExT-GQA: grounded when at least half of the predicted interval lies in the segment


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
    """How well the confidence of first answers tells right from wrong (`mlxvr.evaluation.reliability`).

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
class Group:
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
        shared: mean seconds of reading frames ("decode_seconds") and of prefill ("prefill_seconds"), mean tokens of the
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
    overall: Group | None
    per_task: dict[str, Group] = field(default_factory=dict)
    per_category: dict[str, Group] = field(default_factory=dict)
    bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, nested."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """Auto at one threshold; `score`, `accuracy` and `miou` as in `Figures`, None without labels."""

    tau: float
    score: float | None
    accuracy: float | None
    miou: float | None
    think_ratio: float
    mean_tokens: float
    mean_seconds: float


def summarise(samples: Iterable[Sample], *, threshold: float, bootstrap: int = 1000, seed: int = 0) -> Summary:
    """Work out the figures of a run.

    Args:
        samples: in any order.
        threshold: of auto; for a live run the one that it ran with.
        bootstrap: resamples behind the 95% intervals; 0: none.
        seed: of the resamples.

    Raises `DataError` when an id is there twice or a ground truth cannot be graded (see `grade`).
    """
    every = ordered(samples)
    kept = usable(every)
    live = _is_live(kept)
    table = _Table.of(kept, threshold, live)

    def groups(names: Sequence[str]) -> dict[str, Group]:
        return {
            name: _group(table.only([own == name for own in names]), bootstrap, seed)
            for name in sorted(set(names))
            if name
        }

    return Summary(
        threshold=threshold,
        live=live,
        count=len(every),
        errors={sample.id: sample.error for sample in every if sample.error is not None},
        shared=_shared(kept),
        overall=_group(table, bootstrap, seed) if kept else None,
        per_task=groups([sample.task for sample in kept]),
        per_category=groups([sample.category for sample in kept]),
        bootstrap=bootstrap,
        seed=seed,
    )


def sweep(samples: Iterable[Sample], thresholds: Iterable[float]) -> list[SweepRow]:
    """Auto at each of the thresholds, in their order.

    Raises `ConfigError` for a live run or when every row failed, and `DataError` as `summarise`.
    """
    kept = usable(ordered(samples))
    if not kept:
        raise ConfigError("there is no sample without an error; nothing can be swept")
    if _is_live(kept):
        raise ConfigError("a live run stopped at its own threshold and cannot tell of others: generate without --live")
    direct, think = [direct_grade(sample) for sample in kept], [mode_grade(sample, sample.final) for sample in kept]
    rows = []
    for tau in thresholds:
        decisions = [decide(sample, tau) for sample in kept]
        grades = [after if made.reasoned else first for made, first, after in zip(decisions, direct, think)]
        rows.append(
            SweepRow(
                tau=tau,
                score=_mean_of(grades, lambda one: one.score),
                accuracy=_mean_of(grades, lambda one: one.accuracy),
                miou=_mean_of(grades, lambda one: one.iou),
                think_ratio=sum(made.reasoned for made in decisions) / len(kept),
                mean_tokens=sum(made.tokens for made in decisions) / len(kept),
                mean_seconds=math.fsum(made.seconds for made in decisions) / len(kept),
            )
        )
    return rows


def usable(samples: Iterable[Sample]) -> list[Sample]:
    """The samples of rows that did not fail."""
    return [sample for sample in samples if sample.error is None]


def direct_grade(sample: Sample) -> Grade | None:
    """The grade of the first answer; a missing one is wrong. None: the row has no label."""
    return mode_grade(sample, sample.first)


def mode_grade(sample: Sample, text: str | None) -> Grade | None:
    """The grade of a text as the answer to a sample's question; None: the row has no label."""
    return grade_parts(sample.kind, text, sample.answer, sample.options) if sample.is_labelled else None


@dataclass(frozen=True, eq=False)
class _Table:
    """Samples, their grades per mode and the decisions of auto, as columns of one length."""

    samples: list[Sample]
    direct: list[Grade | None]
    think: list[Grade | None] | None
    reasoned: np.ndarray  # bool (n,)

    @classmethod
    def of(cls, samples: list[Sample], threshold: float, live: bool) -> "_Table":
        if live:
            reasoned = [sample.reasoned for sample in samples]
        else:
            reasoned = [decide(sample, threshold).reasoned for sample in samples]
        return cls(
            samples,
            [direct_grade(sample) for sample in samples],
            None if live else [mode_grade(sample, sample.final) for sample in samples],
            np.array(reasoned, dtype=bool),
        )

    def only(self, chosen: list[bool]) -> "_Table":
        def pick(column: list[Any]) -> list[Any]:
            return [value for value, is_chosen in zip(column, chosen) if is_chosen]

        return _Table(
            pick(self.samples),
            pick(self.direct),
            None if self.think is None else pick(self.think),
            self.reasoned[np.array(chosen, dtype=bool)],
        )

    @property
    def auto(self) -> list[Grade | None]:
        if self.think is None:
            texts = [sample.final if sample.reasoned else sample.first for sample in self.samples]
            return [mode_grade(sample, text) for sample, text in zip(self.samples, texts)]
        return [after if on else first for on, first, after in zip(self.reasoned, self.direct, self.think)]


def _group(table: _Table, bootstrap: int, seed: int) -> Group:
    samples, reasoned = table.samples, table.reasoned
    clusters = clusters_of(samples)
    resamples = Bootstrap(clusters, count=bootstrap, seed=seed)
    first_tokens = _column(samples, lambda sample: sample.first_tokens)
    total_tokens = _column(samples, lambda sample: sample.total_tokens)
    first_seconds = _column(samples, lambda sample: sample.first_seconds)
    total_seconds = _column(samples, lambda sample: sample.total_seconds)

    def figures(grades: list[Grade | None], went_on: np.ndarray) -> Figures:
        tokens = np.where(went_on, total_tokens, first_tokens)
        return _figures(samples, grades, tokens, np.where(went_on, total_seconds, first_seconds), resamples)

    auto = table.auto
    return Group(
        count=len(samples),
        clips=int(clusters.max()) + 1,
        direct=figures(table.direct, np.zeros(len(samples), dtype=bool)),
        think=None if table.think is None else figures(table.think, np.ones(len(samples), dtype=bool)),
        auto=figures(auto, reasoned),
        think_ratio=_sure(resamples.share(reasoned.astype(np.float64))),
        gain=None if table.think is None else _difference(table.think, table.direct, resamples),
        auto_vs_think=None if table.think is None else _difference(auto, table.think, resamples),
        confidence=_confidence(samples, table.direct, resamples),
        fallbacks=sum(sample.first is not None and is_fallback(sample.first) for sample in samples),
        missing_boxes=sum(sample.first is None for sample in samples),
        problems=_problems(samples),
    )


def _figures(
    samples: list[Sample],
    grades: list[Grade | None],
    tokens: np.ndarray,
    seconds: np.ndarray,
    resamples: Bootstrap,
) -> Figures:
    def mean(part: Callable[[Grade], float | None]) -> Estimate | None:
        values = [None if one is None else part(one) for one in grades]
        return resamples.share(*_masked(values))

    recalls = {f"{least}": mean(lambda one, least=least: _at_least(one.iou, least)) for least in _RECALLS}  # type: ignore[misc]
    return Figures(
        labelled=sum(one is not None for one in grades),
        score=mean(lambda one: one.score),
        accuracy=mean(lambda one: one.accuracy),
        miou=mean(lambda one: one.iou),
        recall={name: figure for name, figure in recalls.items() if figure is not None},
        grounded_accuracy=mean(_grounded),
        pair_accuracy=resamples.share(*_masked(_pairs(samples, grades))),
        tokens=_distribution(tokens),
        seconds=_distribution(seconds),
    )


def _pairs(samples: list[Sample], grades: list[Grade | None]) -> list[float | None]:
    """For the first row of each pair whether all its rows are right, None for the others; no label, no pair."""
    rows: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.pair:
            rows.setdefault(sample.pair, []).append(index)
    result: list[float | None] = [None] * len(samples)
    for members in rows.values():
        own = [grades[index] for index in members]
        if len(own) > 1 and all(one is not None for one in own):
            result[members[0]] = float(all(one.is_right for one in own if one is not None))
    return result


def _grounded(one: Grade) -> float | None:
    if one.accuracy is None or one.iop is None:
        return None
    return float(one.accuracy == 1 and one.iop >= _GROUNDED_IOP)


def _at_least(iou: float | None, least: float) -> float | None:
    return None if iou is None else float(iou >= least)


def _difference(ones: list[Grade | None], others: list[Grade | None], resamples: Bootstrap) -> Estimate | None:
    """Mean score of the ones minus that of the others, row by row."""
    values = [None if one is None or other is None else one.score - other.score for one, other in zip(ones, others)]
    return resamples.mean(*_masked(values))


def _confidence(samples: list[Sample], grades: list[Grade | None], resamples: Bootstrap) -> Confidence | None:
    among = np.array([s.confidence is not None and g is not None for s, g in zip(samples, grades)], dtype=bool)
    if not among.any():
        return None
    everyone = np.array([sample.confidence or 0.0 for sample in samples])
    right = np.array([one is not None and one.is_right for one in grades], dtype=bool)
    bins = reliability(everyone[among], right[among])
    area = float(auroc(everyone[among], right[among])[0])
    draws = auroc(everyone[among], right[among], resamples.row_weights[:, among])
    spread = resamples.interval(area, draws[np.isfinite(draws)])
    return Confidence(
        count=int(among.sum()),
        accuracy=_sure(resamples.share(right.astype(np.float64), among)),
        bins=bins,
        ece=expected_calibration_error(bins) or 0.0,
        brier=_sure(resamples.share(brier(everyone, right), among)),
        auroc=None if math.isnan(area) else spread if spread.low != spread.high else Estimate(value=area),
    )


def _problems(samples: list[Sample]) -> dict[str, int]:
    names = sorted({problem for sample in samples for problem in sample.problems})
    return {name: sum(name in sample.problems for sample in samples) for name in names}


def _shared(samples: list[Sample]) -> dict[str, float]:
    names = ("decode_seconds", "prefill_seconds", "prompt_tokens", "video_tokens")
    return {name: math.fsum(getattr(sample, name) for sample in samples) / max(1, len(samples)) for name in names}


def _is_live(samples: list[Sample]) -> bool:
    return any(not sample.reasoned for sample in samples)


def _column(samples: list[Sample], value: Callable[[Sample], float]) -> np.ndarray:
    return np.array([value(sample) for sample in samples], dtype=np.float64)


def _masked(values: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """The values with 0 for None, and where they are not None."""
    among = np.array([value is not None for value in values], dtype=bool)
    return np.array([value or 0.0 for value in values], dtype=np.float64), among


def _mean_of(grades: Sequence[Grade | None], part: Callable[[Grade], float | None]) -> float | None:
    values = [value for one in grades if one is not None and (value := part(one)) is not None]
    return math.fsum(values) / len(values) if values else None


def _distribution(values: np.ndarray) -> Distribution:
    p50, p90, p95 = (float(value) for value in np.percentile(values, (50, 90, 95)))
    return Distribution(mean=float(values.mean()), p50=p50, p90=p90, p95=p95)


def _sure(estimate: Estimate | None) -> Estimate:
    """A figure that there must be, since there are rows."""
    assert estimate is not None
    return estimate
