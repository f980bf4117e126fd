"""Two runs over the same rows, side by side: before and after training, full precision and 4 bits.

Rows are paired by id, and every difference is taken row by row before it is averaged and resampled, so that the rows'
own difficulty cancels. Rows that are missing or failed in either run are counted and left out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlxvr.data.rows import Row
from mlxvr.errors import DataError
from mlxvr.evaluation.analysis.bootstrap import Bootstrap, Estimate, clusters_of, not_none
from mlxvr.evaluation.analysis.grades import mode_grade, usable
from mlxvr.evaluation.samples import Sample, decide, ordered
from mlxvr.grading.lenient import Grade

__all__ = ["Change", "Comparison", "check_comparable", "compare"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change of one mode from the first run to the second.

    Attributes:
        labelled: number of graded rows.
        first, second: mean score (`Grade.score`) of each run.
        difference: second minus first, paired.
        became_right, became_wrong: ids of the rows that changed (an interval is right from an IoU of 0.5).
    """

    labelled: int
    first: Estimate
    second: Estimate
    difference: Estimate
    became_right: tuple[str, ...]
    became_wrong: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What changed from the first run to the second.

    Attributes:
        thresholds: auto's, in each run.
        count, clips: rows in both runs, and independent clusters of them.
        only_first, only_second: ids of rows that are missing or failed in the other run.
        direct, think, auto: the modes; None without labels, `think` also when a run is live.
        think_ratio, tokens: auto's, second minus first.
        began_to_think, stopped_thinking: ids of the rows whose decision flipped.
        confidence_drift: mean absolute difference of a row's two confidences; None: no row has both.
        answers_changed: number of rows whose first boxes differ.
    """

    thresholds: tuple[float, float]
    count: int
    clips: int
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    direct: Change | None
    think: Change | None
    auto: Change | None
    think_ratio: Estimate
    tokens: Estimate
    began_to_think: tuple[str, ...]
    stopped_thinking: tuple[str, ...]
    confidence_drift: Estimate | None
    answers_changed: int

    @property
    def flipped(self) -> float:
        """The share of rows whose decision flipped."""
        return (len(self.began_to_think) + len(self.stopped_thinking)) / self.count

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, nested."""
        return asdict(self) | {"flipped": self.flipped}


def compare(
    a: Iterable[Sample],
    b: Iterable[Sample],
    *,
    threshold: float,
    second_threshold: float | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare a second run with a first.

    Args:
        a, b: samples of the first and of the second run, in any order.
        threshold: auto's in the first run.
        second_threshold: auto's in the second run; None: the same.
        bootstrap, seed: see `summarise`.

    Raises `DataError` when the runs share no row, when a row's question, kind or answer differs between the runs, or
    when an id occurs twice.
    """
    first_by_id, second_by_id = ({sample.id: sample for sample in usable(ordered(run))} for run in (a, b))
    ids = check_comparable(first_by_id, second_by_id)
    first, second = [first_by_id[name] for name in ids], [second_by_id[name] for name in ids]
    thresholds = (threshold, threshold if second_threshold is None else second_threshold)
    clusters = clusters_of(first)
    resamples = Bootstrap(clusters, count=bootstrap, seed=seed)
    reasoned_before, reasoned_after = _reasoned(first, thresholds[0]), _reasoned(second, thresholds[1])

    def change(texts: list[str | None], new_texts: list[str | None]) -> Change | None:
        old = [mode_grade(sample, text) for sample, text in zip(first, texts)]
        return _change(ids, old, [mode_grade(sample, text) for sample, text in zip(second, new_texts)], resamples)

    def auto(samples: list[Sample], reasoned: np.ndarray) -> list[str | None]:
        return [sample.final if reasons else sample.first for sample, reasons in zip(samples, reasoned)]

    live = not all(sample.reasoned for sample in (*first, *second))
    drifts = [
        abs(before.confidence - after.confidence)
        if before.confidence is not None and after.confidence is not None
        else None
        for before, after in zip(first, second)
    ]
    return Comparison(
        thresholds=thresholds,
        count=len(ids),
        clips=int(clusters.max()) + 1,
        only_first=tuple(sorted(first_by_id.keys() - second_by_id.keys())),
        only_second=tuple(sorted(second_by_id.keys() - first_by_id.keys())),
        direct=change([sample.first for sample in first], [sample.first for sample in second]),
        think=None if live else change([sample.final for sample in first], [sample.final for sample in second]),
        auto=change(auto(first, reasoned_before), auto(second, reasoned_after)),
        think_ratio=not_none(resamples.mean(reasoned_after.astype(np.float64) - reasoned_before)),
        tokens=not_none(resamples.mean(_tokens(second, reasoned_after) - _tokens(first, reasoned_before))),
        began_to_think=tuple(name for name, was, now in zip(ids, reasoned_before, reasoned_after) if now and not was),
        stopped_thinking=tuple(name for name, was, now in zip(ids, reasoned_before, reasoned_after) if was and not now),
        confidence_drift=resamples.mean(
            np.array([drift or 0.0 for drift in drifts]), np.array([drift is not None for drift in drifts], dtype=bool)
        ),
        answers_changed=sum(before.first != after.first for before, after in zip(first, second)),
    )


def check_comparable(first: Mapping[str, Sample | Row], second: Mapping[str, Sample | Row]) -> list[str]:
    """The ids that two runs share, in the order of the first; rows that have not been asked yet may replace samples.

    Raises `DataError` when the runs share no id, or an id belongs to different questions.
    """
    ids = [name for name in first if name in second]
    if not ids:
        raise DataError("the two runs have no row in common; compare runs over the same data")
    for name in ids:
        before, after = ((row.kind, row.question, row.options, row.answer) for row in (first[name], second[name]))
        if before != after:
            raise DataError(f"row {name!r} is another question in the second run; compare runs over the same data")
    return ids


def _change(ids: list[str], old: list[Grade | None], new: list[Grade | None], resamples: Bootstrap) -> Change | None:
    graded = [(name, was, now) for name, was, now in zip(ids, old, new) if was is not None and now is not None]
    if not graded:
        return None
    among = np.array([grade is not None for grade in old], dtype=bool)
    before, after = (np.array([grade.score if grade else 0.0 for grade in grades]) for grades in (old, new))
    return Change(
        labelled=len(graded),
        first=not_none(resamples.share(before, among)),
        second=not_none(resamples.share(after, among)),
        difference=not_none(resamples.mean(after - before, among)),
        became_right=tuple(name for name, was, now in graded if now.is_right and not was.is_right),
        became_wrong=tuple(name for name, was, now in graded if was.is_right and not now.is_right),
    )


def _reasoned(samples: list[Sample], threshold: float) -> np.ndarray:
    """Whether each row reasons at a threshold; in a live run, whether it did reason."""
    live = not all(sample.reasoned for sample in samples)
    return np.array([s.reasoned if live else decide(s, threshold).reasoned for s in samples], dtype=bool)


def _tokens(samples: list[Sample], reasoned: np.ndarray) -> np.ndarray:
    totals = np.array([sample.total_tokens for sample in samples], dtype=np.float64)
    return np.where(reasoned, totals, [sample.first_tokens for sample in samples])
