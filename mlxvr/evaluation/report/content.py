"""Everything that a page shows, collected before the page is rendered."""

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
    """The run to compare with, and what changed from it to the run of the report."""

    title: str
    comparison: Comparison
    rows: Sequence[GradedRow]
    summary: Summary
    curve: Sequence[SweepRow]


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything that a page shows.

    Attributes:
        title, settings: as given to `write_report`.
        summary, curve, calibration: the figures.
        rows: every row with its grades.
        records, clips: the gallery's rows and clips (`mlxvr.evaluation.report.gallery`); a record has its clip's index.
        clips_left_out: number of clips whose frames are left out, because the page would grow too large.
        against: the run to compare with, or None.
        figures: what `report.json` holds.
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
