"""What becomes of samples: figures, a calibration, a comparison, and the report's files.

Two finished runs can be compared without their models: their folders hold all that is needed.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlxvr.data.rows import Row
from mlxvr.errors import ConfigError, DataError, MlxvrError
from mlxvr.evaluation import sharding
from mlxvr.evaluation.analysis.calibration import Calibration
from mlxvr.evaluation.analysis.compare import Comparison, compare
from mlxvr.evaluation.analysis.metrics import summarise
from mlxvr.evaluation.analysis.run_summary import Summary
from mlxvr.evaluation.analysis.sweep import SweepRow, sweep
from mlxvr.evaluation.eval_config import EvalConfig
from mlxvr.evaluation.report.report_files import ReportedRun, ReportOptions, write_report
from mlxvr.evaluation.samples import Sample, read_samples
from mlxvr.evaluation.threshold_file import save_threshold, write_threshold
from mlxvr.grading import math_equality
from mlxvr.runtime.hooks import Progress

__all__ = ["Baseline", "EvalReport", "EvalRun", "compare_finished", "read_baseline", "relabelled", "work_out"]

_REPORT = "report.json"
_SWEPT = tuple(step / 20 for step in range(21))


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """The result of an evaluation.

    Attributes:
        output: the folder; `samples` and `page` are files in it (`page` is None on all ranks but 0).
        settings: how the samples were made.
        notes: rows that were left out, and why.
        generated: rows that were asked in this run; the others were there.
        summary: the figures at the threshold.
        swept: auto at other thresholds; empty for a live run.
        calibration, comparison: None where they were not asked for.
        threshold_file: the `mlxvr.json`, or the file of its own, that the chosen threshold was written to, or None.
        rank: of this process; only rank 0 writes and compares.
    """

    output: Path
    samples: Path
    page: Path | None
    settings: dict[str, Any]
    notes: tuple[str, ...]
    generated: int
    summary: Summary
    swept: tuple[SweepRow, ...]
    calibration: Calibration | None = None
    comparison: Comparison | None = None
    threshold_file: Path | None = None
    rank: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, nested."""
        paths = {
            name: None if path is None else str(path)
            for name, path in (
                ("output", self.output),
                ("samples", self.samples),
                ("page", self.page),
                ("threshold_file", self.threshold_file),
            )
        }
        return {
            **paths,
            "settings": self.settings,
            "notes": list(self.notes),
            "generated": self.generated,
            "summary": self.summary.to_dict(),
            "swept": [asdict(row) for row in self.swept],
            "calibration": self.calibration and self.calibration.to_dict(),
            "comparison": self.comparison and self.comparison.to_dict(),
        }


@dataclass(frozen=True)
class Baseline:
    """The run that this one is compared with."""

    name: str
    samples: list[Sample]
    threshold: float | None


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """The samples of a run and how they were made.

    Attributes:
        samples: of all rows.
        settings: how the samples were made, with the "threshold".
        notes: rows that were left out, and why.
        generated: rows that were asked in this run.
        media_root: folder that the samples' media paths are relative to; None: the working directory.
        rank: of this process.
    """

    samples: list[Sample]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    generated: int = 0
    media_root: Path | None = None
    rank: int = 0


def read_baseline(folder: Path, rows: Iterable[Row] = ()) -> Baseline:
    """The run of a folder, with the current labels of `rows`; raises as `read_samples`."""
    asked = {row.id: row for row in rows}
    samples = [
        relabelled(sample, asked[sample.id]) if sample.id in asked else sample
        for sample in read_samples(folder / sharding.MAIN)
    ]
    return Baseline(folder.name or str(folder), samples, _settings(folder).get("threshold"))


def relabelled(sample: Sample, row: Row) -> Sample:
    """A sample with the current label, task, category and pair of its row."""
    return replace(sample, answer=row.answer, task=row.task, category=row.category, pair=row.pair)


def compare_finished(config: EvalConfig, progress: Progress | None = None) -> EvalReport:
    """Compare the second run of `config.compare` with the first; no model is loaded and nothing is asked.

    Raises:
        ConfigError: a folder holds no finished run.
        DataError: the runs have no row in common; too few rows to calibrate.
    """
    before, after = config.compare
    settings = _settings(after)
    if not {"model", "data", "threshold"} <= settings.keys():
        raise ConfigError(f"{after} holds no finished run: its {_REPORT} is missing or damaged; run it to its end")
    if config.threshold is not None:
        settings["threshold"] = config.threshold
    left_out = tuple(settings.pop("left_out", ()))
    run = EvalRun(
        samples=list(read_samples(after / sharding.MAIN)),
        settings=settings,
        notes=left_out,
        media_root=config.media_root,
    )
    return work_out(config, run, read_baseline(before), progress=progress)


def _settings(folder: Path) -> dict[str, Any]:
    """How a folder's samples were made, as its report says; {} if it has no report."""
    try:
        return dict(json.loads((folder / _REPORT).read_bytes())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def work_out(
    config: EvalConfig, run: EvalRun, baseline: Baseline | None = None, *, progress: Progress | None = None
) -> EvalReport:
    """Compute the figures of a run; on rank 0 also calibrate, compare and write the files.

    Args:
        config: which figures, and where they are written.
        run: the samples and how they were made.
        baseline: the run that this one is compared with.
        progress: called with ("frames", clips done, clips).

    Raises as `mlxvr.evaluation.runner.evaluate`.
    """
    samples, settings = run.samples, run.settings
    failed = [sample for sample in samples if sample.error is not None]
    if len(failed) == len(samples):
        first = f"; the first: {failed[0].error}" if failed else ""
        raise DataError(f"all {len(samples)} rows failed{first}")
    if any(sample.kind == "math" for sample in samples):
        way = (
            "math-verify" if math_equality.is_available() else "text and numbers: pip install 'mlxvr[math]' for algebra"
        )
        settings = {**settings, "formulas_compared_by": way}
    threshold = settings["threshold"]
    summary = summarise(samples, threshold=threshold, bootstrap=config.resamples, seed=config.seed)
    report = EvalReport(
        output=config.output,
        samples=(config.compare[1] if len(config.compare) > 1 else config.output) / sharding.MAIN,
        page=None,
        settings=settings,
        notes=run.notes,
        generated=run.generated,
        summary=summary,
        swept=() if summary.live else tuple(sweep(samples, sorted({*_SWEPT, threshold}))),
        rank=run.rank,
    )
    return report if run.rank else _finish(config, report, run, baseline, progress)


def _finish(
    config: EvalConfig, report: EvalReport, run: EvalRun, baseline: Baseline | None, progress: Progress | None
) -> EvalReport:
    """Calibrate, compare and write; the report is written even if the calibration or the comparison fails."""
    threshold = report.settings["threshold"]
    earlier_threshold = threshold if baseline is None or baseline.threshold is None else baseline.threshold
    failure: MlxvrError | None = None
    try:
        if config.calibrate is not None:
            report = replace(report, calibration=config.calibration_of(run.samples))
        if report.calibration is not None:
            report = replace(report, threshold_file=_write_threshold(config, report.calibration))
        if baseline is not None:
            comparison = compare(
                baseline.samples,
                run.samples,
                threshold=earlier_threshold,
                second_threshold=threshold,
                bootstrap=config.resamples,
                seed=config.seed,
            )
            report = replace(report, comparison=comparison)
    except MlxvrError as error:
        failure = error
    reported = ReportedRun(
        title=f"{report.settings['model']} on {report.settings['data']}",
        samples=run.samples,
        threshold=threshold,
        settings={**report.settings, **({"left_out": list(report.notes)} if report.notes else {})},
    )
    before = None
    if baseline is not None and report.comparison is not None:
        before = ReportedRun(
            title=baseline.name,
            samples=baseline.samples,
            threshold=earlier_threshold,
        )
    options = ReportOptions(media_root=run.media_root, bootstrap=config.resamples, seed=config.seed)
    page = write_report(
        config.output, reported, before=before, calibration=report.calibration, options=options, progress=progress
    )
    if failure is not None:
        raise failure
    return replace(report, page=page)


def _write_threshold(config: EvalConfig, calibration: Calibration) -> Path | None:
    if config.threshold_file is not None:
        return save_threshold(config.threshold_file, calibration)
    return write_threshold(str(config.model), calibration) if config.write_threshold else None
