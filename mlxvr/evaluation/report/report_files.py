"""Writes the report of a run, for somebody who decides whether to ship it: `report.html`, `report.json` and plots.

    run = ReportedRun(title="My clips", samples=read_samples("report/samples.jsonl"), threshold=0.97)
    write_report(Path("report"), run)

`report.html` is one file that needs no network (`mlxvr.evaluation.report.page`); `report.json` holds every figure of
it; `plots/` is written where matplotlib is installed. Each file is replaced in one step, the page last.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlxvr.errors import ConfigError
from mlxvr.evaluation.analysis.calibration import Calibration
from mlxvr.evaluation.analysis.compare import Comparison, compare
from mlxvr.evaluation.analysis.metrics import summarise
from mlxvr.evaluation.graded_rows import GradedRow, curve, grade_rows
from mlxvr.evaluation.report.charts import Chart, draw_charts
from mlxvr.evaluation.report.content import Against, Content
from mlxvr.evaluation.report.gallery import embed_frames, gallery_rows
from mlxvr.evaluation.report.page import make_page
from mlxvr.evaluation.samples import Sample
from mlxvr.runtime.hooks import Progress
from mlxvr.storage.atomic import replace_file

__all__ = ["ReportOptions", "ReportedRun", "write_report"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run to report on.

    Attributes:
        title: heads the page.
        samples: of the run, in any order; samples that failed are listed, and no figure includes them.
        threshold: the operating point; for a live run, the threshold that it ran with.
        settings: how the run was made, JSON-ready: shown in the page, and written to `report.json`.
    """

    title: str
    samples: Iterable[Sample]
    threshold: float
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """How a report is made.

    Attributes:
        media_root: folder that the samples' media paths are relative to; None: the working directory.
        clips: number of clips with frames in the page (120 are about 4 MB); 0: none.
        plots: whether to write plots; None: if matplotlib is installed.
        bootstrap, seed: see `summarise`.
    """

    media_root: Path | None = None
    clips: int = 120
    plots: bool | None = None
    bootstrap: int = 1000
    seed: int = 0


def write_report(
    out: str | os.PathLike[str],
    run: ReportedRun,
    *,
    before: ReportedRun | None = None,
    calibration: Calibration | None = None,
    options: ReportOptions | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the report of a run.

    Args:
        out: the folder; it is created.
        run: the run.
        before: another run over the same rows to compare it with (before training, full precision): differences are
            `run` minus `before`.
        calibration: the result of `calibrate`.
        options: how the report is made.
        progress: called with ("frames", clips done, clips).

    Returns the path of `report.html`.

    Raises:
        ConfigError: a file cannot be written.
        DataError: see `summarise` and `compare`.
    """
    folder, samples, options = Path(out), list(run.samples), options or ReportOptions()
    summary = summarise(samples, threshold=run.threshold, bootstrap=options.bootstrap, seed=options.seed)
    rows = grade_rows(samples, run.threshold)
    against, rows_before, changes = None, None, None
    if before is not None:
        against = _compare(before, samples, run.threshold, options)
        rows_before = {row.sample.id: row for row in against.rows}
        changes = _changes(against.comparison, rows, rows_before)
    records = gallery_rows(rows, rows_before, changes)
    clips, left_out = embed_frames(rows, records, media_root=options.media_root, limit=options.clips, progress=progress)
    points = curve(rows, run.threshold)
    figures = {
        "title": run.title,
        "settings": dict(run.settings),
        "summary": summary.to_dict(),
        "curve": [asdict(point) for point in points],
        "calibration": None if calibration is None else calibration.to_dict(),
        "comparison": None if against is None else {"other": against.title, **against.comparison.to_dict()},
        "other_summary": None if against is None else against.summary.to_dict(),
    }
    content = Content(
        title=run.title,
        settings=dict(run.settings),
        summary=summary,
        curve=points,
        rows=rows,
        records=records,
        clips=clips,
        clips_left_out=left_out if options.clips else 0,
        calibration=calibration,
        against=against,
        figures=figures,
    )
    charts = draw_charts(content)
    page = make_page(content, charts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be created ({error.strerror}); choose another output folder") from error
    _write_plots(charts, folder, options.plots)
    _write_text(folder / "report.json", json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write_text(folder / "report.html", page)
    return folder / "report.html"


def _write_text(path: Path, text: str) -> None:
    # a path or an answer may hold half of a surrogate pair, which UTF-8 has no form for
    replace_file(path, lambda file: file.write(text.encode(errors="replace")))


def _write_plots(charts: Mapping[str, Chart], folder: Path, wanted: bool | None) -> None:
    from mlxvr.evaluation.report.plots import have_matplotlib, write_plots

    if wanted is False:
        return
    if have_matplotlib():
        write_plots(charts, folder / "plots")
    elif wanted:
        logger.warning("plots are left out: matplotlib is not installed (pip install 'mlxvr[plot]')")


def _compare(before: ReportedRun, samples: list[Sample], threshold: float, options: ReportOptions) -> Against:
    """What changed from `before` to the run with these samples at this threshold."""
    bootstrap, seed, samples_before = options.bootstrap, options.seed, list(before.samples)
    rows = grade_rows(samples_before, before.threshold)
    return Against(
        title=before.title,
        comparison=compare(
            samples_before, samples,
            threshold=before.threshold, second_threshold=threshold, bootstrap=bootstrap, seed=seed,
        ),
        rows=rows,
        summary=summarise(samples_before, threshold=before.threshold, bootstrap=bootstrap, seed=seed),
        curve=curve(rows, before.threshold),
    )  # fmt: skip


def _changes(
    comparison: Comparison, rows: Sequence[GradedRow], rows_before: Mapping[str, GradedRow]
) -> dict[str, list[str]]:
    """How each row changed, by id."""
    groups = {"began_to_think": comparison.began_to_think, "stopped_thinking": comparison.stopped_thinking}
    if comparison.auto is not None:
        groups = {
            "became_right": comparison.auto.became_right,
            "became_wrong": comparison.auto.became_wrong,
            **groups,
        }
    groups["answer_changed"] = tuple(
        row.sample.id
        for row in rows
        if row.sample.error is None
        and (row_before := rows_before.get(row.sample.id)) is not None
        and row_before.sample.error is None
        and row_before.sample.first != row.sample.first
    )
    changes: dict[str, list[str]] = {}
    for name, ids in groups.items():
        for row_id in ids:
            changes.setdefault(row_id, []).append(name)
    return changes
