"""All that a page shows, gathered before a line of it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxvr.evaluation.analysis.calibration import Calibration
from mlxvr.evaluation.analysis.compare import Comparison
from mlxvr.evaluation.analysis.run_summary import GroupSummary, Summary
from mlxvr.evaluation.analysis.sweep import SweepRow
from mlxvr.evaluation.graded_rows import GradedRow

__all__ = ["Against", "Content", "score_name"]


@dataclass(frozen=True, kw_only=True)
class Against:
    """The run that this one is held against, and what changed from it to this one."""

    title: str
    comparison: Comparison
    rows: Sequence[GradedRow]
    summary: Summary
    curve: Sequence[SweepRow]


@dataclass(frozen=True, kw_only=True)
class Content:
    """All that a page shows.

    Attributes:
        title, settings: as `write_report` was given them.
        summary, curve, calibration: the figures.
        rows: every row with its grades.
        records, clips: the gallery's (`mlxvr.evaluation.report.gallery`); records know their clip.
        clips_left_out: how many clips have no frames in the page because it would grow too large.
        against: another run, or None.
    """

    title: str
    settings: Mapping[str, Any]
    summary: Summary
    curve: Sequence[SweepRow]
    rows: Sequence[GradedRow]
    records: Sequence[Mapping[str, Any]]
    clips: Sequence[Mapping[str, Any]]
    clips_left_out: int = 0
    calibration: Calibration | None = None
    against: Against | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


def score_name(group: GroupSummary | None) -> str:
    """What the score of these rows is called."""
    figures = None if group is None else group.direct
    if figures is None or figures.miou is None:
        return "Accuracy"
    return "mIoU" if figures.accuracy is None else "Score"
