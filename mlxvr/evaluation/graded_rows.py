"""The rows of a run with their grades, which a report's curve and gallery are made from.

`curve` gives the same figures as `sweep`. It computes them by running sums, so that thousands of rows at hundreds of
thresholds are fast.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mlxvr.evaluation.analysis.grades import direct_grade, mode_grade
from mlxvr.evaluation.analysis.sweep import SweepRow
from mlxvr.evaluation.samples import Sample, decide, ordered
from mlxvr.grading.lenient import Grade

__all__ = ["GradedRow", "curve", "grade_rows"]

_MOST_THRESHOLDS = 240


@dataclass(frozen=True)
class GradedRow:
    """A sample, the grades of its first and its final answer, and whether auto reasons.

    Grades are None without a label and for a row that failed; `think` is also None where a live run stopped early.
    """

    sample: Sample
    direct: Grade | None
    think: Grade | None
    reasoned: bool

    @property
    def auto(self) -> Grade | None:
        """The grade of what auto answers."""
        return self.think if self.reasoned else self.direct


def grade_rows(samples: Iterable[Sample], threshold: float) -> list[GradedRow]:
    """Grade every sample, sorted by id; the errors are those of `summarise`."""
    every = ordered(samples)
    live = any(not sample.reasoned for sample in every if sample.error is None)
    result = []
    for sample in every:
        if sample.error is not None:
            result.append(GradedRow(sample, None, None, sample.reasoned))
            continue
        direct = direct_grade(sample)
        think = direct if sample.final == sample.first else mode_grade(sample, sample.final)
        reasoned = sample.reasoned if live else decide(sample, threshold).reasoned
        result.append(GradedRow(sample, direct, think if sample.reasoned else None, reasoned))
    return result


def curve(rows: Sequence[GradedRow], threshold: float, most: int = _MOST_THRESHOLDS) -> list[SweepRow]:
    """Auto at the thresholds that change a decision, from 0 (auto takes every direct answer) to above all confidences.

    Args:
        rows: those that failed are left out.
        threshold: always among the thresholds.
        most: the number of thresholds; if there are more, they are sampled evenly by rank.

    Returns `sweep`'s figures, by rising threshold; [] for a live run or without rows.
    """
    usable = [row for row in rows if row.sample.error is None]
    if not usable or any(not row.sample.reasoned for row in usable):
        return []
    levels = np.array([-1.0 if row.sample.confidence is None else row.sample.confidence for row in usable])
    order = np.argsort(levels, kind="stable")
    levels = levels[order]
    thresholds = np.array(_thresholds(levels, threshold, most))
    exits = np.searchsorted(levels, thresholds)  # rows from here on keep their first answer

    def auto(first: list[float], final: list[float]) -> np.ndarray:
        """The sum over rows at each threshold, from the values of the two answers."""
        early, late = np.array(first)[order], np.array(final)[order]
        return np.append(0.0, np.cumsum(late))[exits] + np.append(np.cumsum(early[::-1])[::-1], 0.0)[exits]

    def mean(part: Callable[[Grade], float | None]) -> list[float | None]:
        pairs = [(part(row.direct), part(row.think)) if row.direct and row.think else (None, None) for row in usable]
        graded = sum(first is not None for first, _ in pairs)
        sums = auto([first or 0.0 for first, _ in pairs], [final or 0.0 for _, final in pairs])
        return [float(total) / graded for total in sums] if graded else [None] * len(sums)

    size = len(usable)
    tokens = auto([row.sample.first_tokens for row in usable], [row.sample.total_tokens for row in usable]) / size
    times = auto([row.sample.first_seconds for row in usable], [row.sample.total_seconds for row in usable]) / size
    columns = zip(
        thresholds,
        mean(lambda grade: grade.score),
        mean(lambda grade: grade.accuracy),
        mean(lambda grade: grade.iou),
        strict=True,
    )
    return [
        SweepRow(
            threshold=float(level),
            score=score,
            accuracy=accuracy,
            miou=miou,
            think_ratio=float(exits[index]) / size,
            mean_tokens=float(tokens[index]),
            mean_seconds=float(times[index]),
        )
        for index, (level, score, accuracy, miou) in enumerate(columns)
    ]


def _thresholds(levels: np.ndarray, threshold: float, most: int) -> list[float]:
    """0, the midpoints between neighbouring confidences, one above all, and the threshold itself."""
    distinct = np.unique(levels[levels >= 0])
    between = (distinct[1:] + distinct[:-1]) / 2
    if len(between) > most:
        between = between[np.linspace(0, len(between) - 1, most).round().astype(np.int64)]
    highest = float(distinct[-1]) if len(distinct) else 0.0
    above = (highest + 1) / 2 if highest < 1 else math.nextafter(1, 2)
    if above <= highest:
        above = 1.0
    return sorted({0.0, *map(float, between), above, threshold})
