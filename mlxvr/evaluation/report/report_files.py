"""What a run is worth, for somebody who decides whether to ship it: `report.html`, `report.json` and plots.

    write_report(Path("report"), samples=read_samples("report/samples.jsonl"), threshold=0.97, title="My clips")

`report.html` is one file that needs no network (`mlxvr.evaluation.report.page`); `report.json` holds every figure of
it; `plots/` is written where matplotlib is installed. Each file is replaced in one step, the page last.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxvr.errors import ConfigError
from mlxvr.evaluation.analysis.calibration import Calibration
from mlxvr.evaluation.analysis.compare import Comparison, compare
from mlxvr.evaluation.analysis.metrics import summarise
from mlxvr.evaluation.graded_rows import Judged, curve, judge
from mlxvr.evaluation.report.content import Against, Content
from mlxvr.evaluation.report.gallery import embed_frames, gallery_rows
from mlxvr.evaluation.report.page import make_page
from mlxvr.evaluation.samples import Sample
from mlxvr.runtime.hooks import Progress
from mlxvr.storage.atomic import replace_file

__all__ = ["write_report"]

logger = logging.getLogger(__name__)

_CLIPS = 120  # with frames in the page: about 4 MB


def write_report(
    out: str | os.PathLike[str],
    *,
    samples: Iterable[Sample],
    threshold: float,
    title: str,
    settings: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    other: tuple[str, Iterable[Sample]] | None = None,
    other_threshold: float | None = None,
    media_root: Path | None = None,
    clips: int = _CLIPS,
    plots: bool | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write the report of a run.

    Args:
        out: the folder; it is created.
        samples: of the run, in any order; those that failed are listed and in no figure.
        threshold: the operating point; for a live run the one that it ran with.
        title: heads the page.
        settings: what the run was made with, JSON-ready: shown, and kept in `report.json`.
        calibration: what `calibrate` found.
        other: title and samples of another run over the same rows, the one this run is held against (before training,
            full precision): differences are this run minus it.
        other_threshold: of that run; None: the same.
        media_root: folder that the samples' media paths are relative to; None: the working directory.
        clips: of how many clips frames are put into the page; 0: of none.
        plots: whether to write plots; None: if matplotlib is installed.
        bootstrap, seed: see `summarise`.
        progress: called with ("frames", clips done, clips).

    Returns the path of `report.html`.

    Raises:
        ConfigError: a file cannot be written.
        DataError: see `summarise` and `compare`.
    """
    folder, run = Path(out), list(samples)
    summary = summarise(run, threshold=threshold, bootstrap=bootstrap, seed=seed)
    rows = judge(run, threshold)
    against = None
    if other is not None:
        earlier_threshold = threshold if other_threshold is None else other_threshold
        against = _against(other[0], list(other[1]), earlier_threshold, run, threshold, bootstrap, seed)
    others = None if against is None else {row.sample.id: row for row in against.rows}
    changes = None if against is None else _changes(against.comparison, rows, others or {})
    records = gallery_rows(rows, others, changes)
    pictures, left_out = embed_frames(rows, records, media_root=media_root, limit=clips, progress=progress)
    points = curve(rows, threshold)
    figures = {
        "title": title,
        "settings": dict(settings or {}),
        "summary": summary.to_dict(),
        "curve": [asdict(point) for point in points],
        "calibration": None if calibration is None else calibration.to_dict(),
        "comparison": None if against is None else {"other": against.title, **against.comparison.to_dict()},
        "other_summary": None if against is None else against.summary.to_dict(),
    }
    content = Content(
        title=title,
        settings=dict(settings or {}),
        summary=summary,
        curve=points,
        rows=rows,
        records=records,
        clips=pictures,
        clips_left_out=left_out if clips else 0,
        calibration=calibration,
        against=against,
        figures=figures,
    )
    page = make_page(content)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be created ({error.strerror}); choose another output folder") from error
    _write_plots(content, folder, plots)
    _write_text(folder / "report.json", json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write_text(folder / "report.html", page)
    return folder / "report.html"


def _write_text(path: Path, text: str) -> None:
    # a path or an answer may hold half of a surrogate pair, which UTF-8 has no form for
    replace_file(path, lambda file: file.write(text.encode(errors="replace")))


def _write_plots(content: Content, folder: Path, wanted: bool | None) -> None:
    from mlxvr.evaluation.report.plots import have_matplotlib, write_plots

    if wanted is False:
        return
    if have_matplotlib():
        write_plots(content, folder / "plots")
    elif wanted:
        logger.warning("plots are left out: matplotlib is not installed (pip install 'mlxvr[plot]')")


def _against(
    title: str,
    samples: list[Sample],
    earlier_threshold: float,
    run: list[Sample],
    threshold: float,
    bootstrap: int,
    seed: int,
) -> Against:
    rows = judge(samples, earlier_threshold)
    return Against(
        title=title,
        comparison=compare(
            samples, run, threshold=earlier_threshold, second_threshold=threshold, bootstrap=bootstrap, seed=seed
        ),
        rows=rows,
        summary=summarise(
            samples,
            threshold=earlier_threshold,
            bootstrap=bootstrap,
            seed=seed,
        ),
        curve=curve(rows, earlier_threshold),
    )


def _changes(found: Comparison, rows: Sequence[Judged], others: Mapping[str, Judged]) -> dict[str, list[str]]:
    """What became of each row, by id."""
    groups = {"began_to_think": found.began_to_think, "stopped_thinking": found.stopped_thinking}
    if found.auto is not None:
        groups = {"became_right": found.auto.became_right, "became_wrong": found.auto.became_wrong, **groups}
    groups["answer_changed"] = tuple(
        row.sample.id
        for row in rows
        if row.sample.error is None
        and (other := others.get(row.sample.id)) is not None
        and other.sample.error is None
        and other.sample.first != row.sample.first
    )
    changes: dict[str, list[str]] = {}
    for name, ids in groups.items():
        for one in ids:
            changes.setdefault(one, []).append(name)
    return changes
