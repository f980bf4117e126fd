"""Scores and costs of the three modes: direct answers, always thinking, and the early exit.

Every figure comes from one generation per row: direct takes the first box, think takes the end of the whole pass, and
auto takes one of the two by the confidence (`decide`). Rows that failed are counted and left out; rows without a label
count towards cost and think ratio only. Samples are sorted by id before they are summed, so their order changes no
digit.

The score of a row is one number in [0, 1] (`Grade.score`): accuracy, IoU, or the mean of both for grounded QA. A
mode's `score` is its mean over all rows; `accuracy` is its mean over rows whose answer is right or wrong, `miou` and
`recall` over rows whose answer is an interval. A pair (rows that share `pair`) is right when all its rows are; a pair
with only one row left is left out.

A live run (`reasoned` is False in some row) generated no more than it needed: its auto figures are those of the
threshold that it ran with, and it has no think figures.

Seconds are those of generation. Reading frames and prefill cost the same in every mode and are reported apart, as
`shared`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxvr.answering.transcript import is_fallback
from mlxvr.evaluation.analysis.bootstrap import Bootstrap, Estimate, clusters_of, not_none
from mlxvr.evaluation.analysis.grades import direct_grade, is_live, mode_grade, usable
from mlxvr.evaluation.analysis.reliability import auroc, brier, expected_calibration_error, reliability
from mlxvr.evaluation.analysis.run_summary import Confidence, Distribution, Figures, GroupSummary, Summary
from mlxvr.evaluation.samples import Sample, decide, ordered
from mlxvr.grading.lenient import Grade

__all__ = ["summarise"]

_RECALLS = (0.3, 0.5, 0.7)
_GROUNDED_IOP = 0.5  # NExT-GQA: grounded when at least half of the predicted interval lies in the segment


def summarise(samples: Iterable[Sample], *, threshold: float, bootstrap: int = 1000, seed: int = 0) -> Summary:
    """Compute the figures of a run.

    Args:
        samples: in any order.
        threshold: auto's; of a live run, the one that it ran with.
        bootstrap: number of resamples for the 95% intervals; 0: no intervals.
        seed: of the resamples.

    Raises `DataError` when an id occurs twice or a ground truth cannot be graded (see `grade`).
    """
    every = ordered(samples)
    finished = usable(every)
    live = is_live(finished)
    table = _ModeColumns.of(finished, threshold, live)

    def groups(names: Sequence[str]) -> dict[str, GroupSummary]:
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
        shared=_shared(finished),
        overall=_group(table, bootstrap, seed) if finished else None,
        per_task=groups([sample.task for sample in finished]),
        per_category=groups([sample.category for sample in finished]),
        bootstrap=bootstrap,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _ModeColumns:
    """Samples, their grades per mode and the decisions of auto, as columns of one length."""

    samples: list[Sample]
    direct: list[Grade | None]
    think: list[Grade | None] | None
    reasoned: np.ndarray  # bool (n,)

    @classmethod
    def of(cls, samples: list[Sample], threshold: float, live: bool) -> "_ModeColumns":
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

    def only(self, chosen: list[bool]) -> "_ModeColumns":
        def pick(column: list[Any]) -> list[Any]:
            return [value for value, is_chosen in zip(column, chosen) if is_chosen]

        return _ModeColumns(
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
        return [
            think if reasoned else direct for reasoned, direct, think in zip(self.reasoned, self.direct, self.think)
        ]


def _group(table: _ModeColumns, bootstrap: int, seed: int) -> GroupSummary:
    samples, reasoned = table.samples, table.reasoned
    clusters = clusters_of(samples)
    resamples = Bootstrap(clusters, count=bootstrap, seed=seed)
    first_tokens = _column(samples, lambda sample: sample.first_tokens)
    total_tokens = _column(samples, lambda sample: sample.total_tokens)
    first_seconds = _column(samples, lambda sample: sample.first_seconds)
    total_seconds = _column(samples, lambda sample: sample.total_seconds)

    def figures(grades: list[Grade | None], reasoned: np.ndarray) -> Figures:
        tokens = np.where(reasoned, total_tokens, first_tokens)
        return _figures(samples, grades, tokens, np.where(reasoned, total_seconds, first_seconds), resamples)

    auto = table.auto
    return GroupSummary(
        count=len(samples),
        clips=int(clusters.max()) + 1,
        direct=figures(table.direct, np.zeros(len(samples), dtype=bool)),
        think=None if table.think is None else figures(table.think, np.ones(len(samples), dtype=bool)),
        auto=figures(auto, reasoned),
        think_ratio=not_none(resamples.share(reasoned.astype(np.float64))),
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
        values = [None if grade is None else part(grade) for grade in grades]
        return resamples.share(*_masked(values))

    recalls = {f"{least}": mean(lambda grade, least=least: _at_least(grade.iou, least)) for least in _RECALLS}  # type: ignore[misc]
    return Figures(
        labelled=sum(grade is not None for grade in grades),
        score=mean(lambda grade: grade.score),
        accuracy=mean(lambda grade: grade.accuracy),
        miou=mean(lambda grade: grade.iou),
        recall={name: figure for name, figure in recalls.items() if figure is not None},
        grounded_accuracy=mean(_grounded),
        pair_accuracy=resamples.share(*_masked(_pairs(samples, grades))),
        tokens=_distribution(tokens),
        seconds=_distribution(seconds),
    )


def _pairs(samples: list[Sample], grades: list[Grade | None]) -> list[float | None]:
    """Whether all rows of a pair are right, at the pair's first row; None at other rows and for unlabelled pairs."""
    rows: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.pair:
            rows.setdefault(sample.pair, []).append(index)
    result: list[float | None] = [None] * len(samples)
    for members in rows.values():
        own = [grades[index] for index in members]
        if len(own) > 1 and all(grade is not None for grade in own):
            result[members[0]] = float(all(grade.is_right for grade in own if grade is not None))
    return result


def _grounded(grade: Grade) -> float | None:
    if grade.accuracy is None or grade.iop is None:
        return None
    return float(grade.accuracy == 1 and grade.iop >= _GROUNDED_IOP)


def _at_least(iou: float | None, least: float) -> float | None:
    return None if iou is None else float(iou >= least)


def _difference(grades: list[Grade | None], baseline: list[Grade | None], resamples: Bootstrap) -> Estimate | None:
    """Mean score of `grades` minus that of `baseline`, paired by row."""
    pairs = zip(grades, baseline)
    values = [None if grade is None or base is None else grade.score - base.score for grade, base in pairs]
    return resamples.mean(*_masked(values))


def _confidence(samples: list[Sample], grades: list[Grade | None], resamples: Bootstrap) -> Confidence | None:
    among = np.array([s.confidence is not None and g is not None for s, g in zip(samples, grades)], dtype=bool)
    if not among.any():
        return None
    confidence = np.array([sample.confidence or 0.0 for sample in samples])
    right = np.array([grade is not None and grade.is_right for grade in grades], dtype=bool)
    bins = reliability(confidence[among], right[among])
    area = float(auroc(confidence[among], right[among])[0])
    draws = auroc(confidence[among], right[among], resamples.row_weights[:, among])
    spread = resamples.interval(area, draws[np.isfinite(draws)])
    return Confidence(
        count=int(among.sum()),
        accuracy=not_none(resamples.share(right.astype(np.float64), among)),
        bins=bins,
        ece=expected_calibration_error(bins) or 0.0,
        brier=not_none(resamples.share(brier(confidence, right), among)),
        auroc=None if math.isnan(area) else spread if spread.low != spread.high else Estimate(value=area),
    )


def _problems(samples: list[Sample]) -> dict[str, int]:
    names = sorted({problem for sample in samples for problem in sample.problems})
    return {name: sum(name in sample.problems for sample in samples) for name in names}


def _shared(samples: list[Sample]) -> dict[str, float]:
    names = ("media_seconds", "prefill_seconds", "prompt_tokens", "video_tokens")
    return {name: math.fsum(getattr(sample, name) for sample in samples) / max(1, len(samples)) for name in names}


def _column(samples: list[Sample], value: Callable[[Sample], float]) -> np.ndarray:
    return np.array([value(sample) for sample in samples], dtype=np.float64)


def _masked(values: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """The values with 0 for None, and where they are not None."""
    among = np.array([value is not None for value in values], dtype=bool)
    return np.array([value or 0.0 for value in values], dtype=np.float64), among


def _distribution(values: np.ndarray) -> Distribution:
    p50, p90, p95 = (float(value) for value in np.percentile(values, (50, 90, 95)))
    return Distribution(mean=float(values.mean()), p50=p50, p90=p90, p95=p95)
