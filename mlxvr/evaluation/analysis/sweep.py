"""Score and cost of auto at many thresholds."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mlxvr.errors import ConfigError
from mlxvr.evaluation.analysis.grades import direct_grade, is_live, mode_grade, usable
from mlxvr.evaluation.samples import Sample, decide, ordered
from mlxvr.grading.lenient import Grade

__all__ = ["SweepRow", "sweep"]


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """Auto at one threshold; `score`, `accuracy` and `miou` are those of `Figures`, and None without labels."""

    threshold: float
    score: float | None
    accuracy: float | None
    miou: float | None
    think_ratio: float
    mean_tokens: float
    mean_seconds: float


def sweep(samples: Iterable[Sample], thresholds: Iterable[float]) -> list[SweepRow]:
    """The figures of auto at each threshold, in the order of `thresholds`.

    Raises `ConfigError` for a live run or when every row failed, and `DataError` as `summarise`.
    """
    finished = usable(ordered(samples))
    if not finished:
        raise ConfigError("there is no sample without an error; nothing can be swept")
    if is_live(finished):
        raise ConfigError("a live run stopped at its own threshold and shows no other: generate without --live")
    direct = [direct_grade(sample) for sample in finished]
    think = [mode_grade(sample, sample.final) for sample in finished]
    rows = []
    for threshold in thresholds:
        decisions = [decide(sample, threshold) for sample in finished]
        modes = zip(decisions, direct, think)
        grades = [thought if decision.reasoned else first for decision, first, thought in modes]
        rows.append(
            SweepRow(
                threshold=threshold,
                score=_mean_of(grades, lambda grade: grade.score),
                accuracy=_mean_of(grades, lambda grade: grade.accuracy),
                miou=_mean_of(grades, lambda grade: grade.iou),
                think_ratio=sum(decision.reasoned for decision in decisions) / len(finished),
                mean_tokens=sum(decision.tokens for decision in decisions) / len(finished),
                mean_seconds=math.fsum(decision.seconds for decision in decisions) / len(finished),
            )
        )
    return rows


def _mean_of(grades: Sequence[Grade | None], part: Callable[[Grade], float | None]) -> float | None:
    values = [value for grade in grades if grade is not None and (value := part(grade)) is not None]
    return math.fsum(values) / len(values) if values else None
