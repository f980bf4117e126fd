"""Grades of samples: of the first answer, and of any text as the answer."""

from collections.abc import Iterable

from mlxvr.evaluation.samples import Sample
from mlxvr.grading.lenient import Grade, grade_parts

__all__ = ["direct_grade", "is_live", "mode_grade", "usable"]


def usable(samples: Iterable[Sample]) -> list[Sample]:
    """The samples of rows that did not fail."""
    return [sample for sample in samples if sample.error is None]


def is_live(samples: Iterable[Sample]) -> bool:
    """Whether a run stopped early itself: some row did not reason."""
    return any(not sample.reasoned for sample in samples)


def direct_grade(sample: Sample) -> Grade | None:
    """The grade of the first answer; a missing one is wrong. None: the row has no label."""
    return mode_grade(sample, sample.first)


def mode_grade(sample: Sample, text: str | None) -> Grade | None:
    """The grade of a text as the answer to a sample's question; None: the row has no label."""
    return grade_parts(sample.kind, text, sample.answer, sample.options) if sample.is_labelled else None
