"""Auto at many thresholds: what each one scores and costs."""

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
    """Auto at one threshold; `score`, `accuracy` and `miou` as in `Figures`, None without labels."""

    threshold: float
    score: float | None
    accuracy: float | None
    miou: float | None
    think_ratio: float
    mean_tokens: float
    mean_seconds: float


def sweep(samples: Iterable[Sample], thresholds: Iterable[float]) -> list[SweepRow]:
    """Auto at each of the thresholds, in their order.

    Raises `ConfigError` for a live run or when every row failed, and `DataError` as `summarise`.
    """
    kept = usable(ordered(samples))
    if not kept:
        raise ConfigError("there is no sample without an error; nothing can be swept")
    if is_live(kept):
        raise ConfigError("a live run stopped at its own threshold and cannot tell of others: generate without --live")
    direct, think = [direct_grade(sample) for sample in kept], [mode_grade(sample, sample.final) for sample in kept]
    rows = []
    for threshold in thresholds:
        decisions = [decide(sample, threshold) for sample in kept]
        grades = [after if made.reasoned else first for made, first, after in zip(decisions, direct, think)]
        rows.append(
            SweepRow(
                threshold=threshold,
                score=_mean_of(grades, lambda one: one.score),
                accuracy=_mean_of(grades, lambda one: one.accuracy),
                miou=_mean_of(grades, lambda one: one.iou),
                think_ratio=sum(made.reasoned for made in decisions) / len(kept),
                mean_tokens=sum(made.tokens for made in decisions) / len(kept),
                mean_seconds=math.fsum(made.seconds for made in decisions) / len(kept),
            )
        )
    return rows


def _mean_of(grades: Sequence[Grade | None], part: Callable[[Grade], float | None]) -> float | None:
    values = [value for one in grades if one is not None and (value := part(one)) is not None]
    return math.fsum(values) / len(values) if values else None
