"""An evaluation from its rows to its report: ask rows, merge samples, compute figures, write the report.

Every row is asked once, in think mode, and direct, think and auto follow from that (`metrics`). A live run stops early
instead and has figures at its own threshold only. The output folder holds `samples.jsonl`, which grows while the run
goes on, and what `report` writes at its end.

What a sample depends on (weights, system prompt, frames, decoding) is in the first line of `samples.jsonl`, and a run
with other settings refuses to continue it. Labels, tasks, categories and pairs are not part of that: they are read from
the rows each time, so that a corrected label costs no generation. The figures are over the rows of this run, even if
the file holds more.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvr.checkpoint.bundled import NOT_OF_THE_DEMO, demo_folder, is_bundled, is_demo_model
from mlxvr.cli.settings import part_of
from mlxvr.data.benchmarks import read_benchmark
from mlxvr.data.rows import Row, load_rows
from mlxvr.errors import ConfigError, DataError
from mlxvr.evaluation import sharding
from mlxvr.evaluation.analysis.compare import check_comparable
from mlxvr.evaluation.analysis.grades import usable
from mlxvr.evaluation.analysis.threshold_search import check_enough
from mlxvr.evaluation.eval_config import EvalConfig
from mlxvr.evaluation.finishing import (
    Baseline,
    EvalReport,
    EvalRun,
    compare_finished,
    read_baseline,
    relabelled,
    work_out,
)
from mlxvr.evaluation.generation import Asking, digest, generate, group_rows
from mlxvr.evaluation.samples import Sample, SampleWriter, read_samples, write_samples
from mlxvr.evaluation.threshold_file import check_writable
from mlxvr.media import VisionSpec
from mlxvr.model.families.base import FAMILIES
from mlxvr.model.prompt import evaluation_copy
from mlxvr.reasoner.load_options import LoadOptions
from mlxvr.runtime.distributed import ProcessGroup
from mlxvr.runtime.hooks import Progress

if TYPE_CHECKING:
    from mlxvr.reasoner.reasoner import Reasoner

__all__ = ["EvalReport", "Questions", "evaluate", "read_questions"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The rows to ask, and what belongs to them.

    Attributes:
        rows: in their order.
        name: for titles.
        folder: what `Row.media` is relative to.
        limits: frame and token limits of a benchmark that all families share; None for a data file.
        notes: what was left out and why, for people.
    """

    rows: tuple[Row, ...]
    name: str
    folder: Path
    limits: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()


def evaluate(config: EvalConfig, *, progress: Progress | None = None) -> EvalReport:
    """Evaluate a model; continue where an earlier run into the same output folder stopped.

    Args:
        config: the settings.
        progress: called with (stage, done, total); stages are "download", "check", "evaluate" and "frames".

    Raises:
        ConfigError: a setting cannot be used, or the output folder is another run's.
        DataError: a row cannot be used; all rows failed; too few of them to calibrate.
        CheckpointError: the model cannot be loaded.
    """
    if len(config.compare) > 1:
        return compare_finished(config, progress)
    questions = read_questions(config)
    baseline = read_baseline(config.compare[0], questions.rows) if config.compare else None
    _check_in_time(config, questions.rows, baseline)
    ranks = ProcessGroup()
    if ranks.size > 1 and config.workers > 1:
        raise ConfigError(
            f"{ranks.size} ranks were launched already: leave --workers out, or start it without launcher"
        )
    if is_demo_model(config.model) and not is_bundled(questions.folder):
        logger.warning(NOT_OF_THE_DEMO)
    with _load(config, progress) as reasoner:
        limits: dict[str, Any] = {}
        if questions.limits is not None:
            family = FAMILIES[reasoner.identity()["family"]]
            limits = {**questions.limits, **family.benchmark_limits(questions.name)}
        reasoner.spec = reasoner.spec.with_overrides(**{**limits, **config.overrides})
        if config.task is not None:
            reasoner.system_prompt = evaluation_copy(reasoner.system_prompt)
        settings = _settings(config, questions, reasoner)
        samples, generated = _samples(config, questions.rows, reasoner, ranks, progress)
    run = EvalRun(
        samples=samples,
        settings=settings,
        notes=questions.notes,
        generated=generated,
        media_root=questions.folder,
        rank=ranks.rank,
    )
    return work_out(config, run, baseline, progress=progress)


def read_questions(config: EvalConfig) -> Questions:
    """The rows that a configuration names; raises `DataError` for rows of a data file that cannot be used."""
    if config.task is not None and config.data_root is not None:
        benchmark = read_benchmark(config.task, config.data_root, subtitles=config.subtitles)
        return Questions(
            rows=benchmark.rows[: config.limit],
            name=benchmark.name,
            folder=config.data_root,
            limits=benchmark.limits,
            notes=benchmark.notes,
        )
    path = config.data
    if path is None:
        path = demo_folder() / "clips.jsonl"
    bad: list[DataError] | None = [] if config.skip_bad_rows else None
    rows = load_rows(path, media_root=config.media_root, labelled=config.needs_answers, bad_rows=bad)
    return Questions(
        rows=tuple(rows[: config.limit]),
        name=path.stem,
        folder=config.media_root or path.parent,
        limits=None,
        notes=tuple(str(error) for error in bad or ()),
    )


def _load(config: EvalConfig, progress: Progress | None = None) -> "Reasoner":
    from mlxvr.reasoner import reasoner

    return reasoner.load_with(part_of(config, LoadOptions), progress)


def _settings(config: EvalConfig, questions: Questions, reasoner: "Reasoner") -> dict[str, Any]:
    """How samples are made, for the report."""
    return {
        "model": "bundled demo" if config.model is None else str(config.model),
        "adapter": None if config.adapter is None else str(config.adapter),
        "revision": config.revision,
        "data": questions.name,
        "mode": "live" if config.live else "think",
        "threshold": _threshold(config, reasoner),
        **_run(config, reasoner),
        "dtype": config.dtype,
        "versions": {name: version(name) for name in ("mlxvr", "mlx", "mlx-vlm")},
    }


def _run(config: EvalConfig, reasoner: "Reasoner") -> dict[str, Any]:
    """What samples depend on beside their rows; they are not added to those of other settings."""
    identity, spec = reasoner.identity(), reasoner.spec
    live = {"live_at": _threshold(config, reasoner)} if config.live else {}
    return {
        "weights": identity["weights"],
        "system_prompt": hashlib.sha256(identity["system_prompt"].encode()).hexdigest()[:16],
        "max_tokens": config.max_tokens,
        "kv_bits": config.kv_bits,
        "fps": spec.fps,
        "frames": [spec.min_frames, spec.max_frames],
        "frame_tokens": [spec.frame_min_tokens, spec.frame_max_tokens],
        "video_tokens": spec.video_tokens,
        "image_tokens": [spec.image_min_tokens, spec.image_max_tokens],
        **live,
    }


def _threshold(config: EvalConfig, reasoner: "Reasoner") -> float:
    return reasoner.threshold if config.threshold is None else config.threshold


def _samples(
    config: EvalConfig, rows: Sequence[Row], reasoner: "Reasoner", ranks: ProcessGroup, progress: Progress | None
) -> tuple[list[Sample], int]:
    """The samples of all rows, in their order, with their current labels, and how many were generated now."""
    run = _run(config, reasoner)
    known = _prepare(config, run, ranks)
    _check_unchanged(known, rows, config.output)
    remaining = [row for row in rows if row.id not in known]
    groups = group_rows(remaining)
    total = sum(len(group) for group in groups[ranks.rank :: ranks.size])
    done = len(rows) - len(remaining)

    def report_progress(asked: int) -> None:
        if progress is not None and total:
            progress("evaluate", done + asked, done + total)

    asking = Asking(
        mode="auto" if config.live else "think", threshold=_threshold(config, reasoner), max_tokens=config.max_tokens
    )
    with SampleWriter(sharding.shard_file(config.output, ranks.rank), run) as writer:
        if config.workers > 1 and len(groups) > 1:
            count = min(config.workers, len(groups))
            job = _WorkerJob(
                config=config,
                run=run,
                shares=[groups[shard::count] for shard in range(count)],
                asking=asking,
                spec=reasoner.spec,
                system_prompt=reasoner.system_prompt,
            )
            _ask_with_workers(job, reasoner, writer, report_progress)
        else:
            for number, sample in enumerate(generate(reasoner, groups[ranks.rank :: ranks.size], asking), 1):
                writer.write(sample)
                report_progress(number)
    known = _merge_shards(config.output, run, ranks, rows)
    return [relabelled(known[row.id], row) for row in rows], len(remaining)


def _prepare(config: EvalConfig, run: dict[str, Any], ranks: ProcessGroup) -> dict[str, Sample]:
    """Merge what earlier runs left into one file; return its samples, without the rows that are asked again."""
    main, leftovers = config.output / sharding.MAIN, sharding.shard_files(config.output)
    if ranks.rank:
        known = sharding.collect(config.output, run, ranks)
    else:
        with SampleWriter(main, run) as writer:  # refuses what another process is writing
            known = sharding.collect(config.output, run, ranks)
            samples = {name: sample for name, sample in known.items() if not (config.retry_errors and sample.error)}
            if samples.keys() != writer.done or leftovers:
                write_samples(main, run, samples.values())
            for path in leftovers:
                path.unlink(missing_ok=True)
    ranks.barrier()
    if ranks.rank:
        sharding.shard_file(config.output, ranks.rank).unlink(missing_ok=True)
    return {name: sample for name, sample in known.items() if not (config.retry_errors and sample.error)}


def _check_unchanged(known: Mapping[str, Sample], rows: Iterable[Row], output: Path) -> None:
    for row in rows:
        if row.id in known and known[row.id].asked != digest(row):
            raise ConfigError(
                f"{row.line}: row {row.id!r} is asked otherwise than it was for {output / sharding.MAIN}: "
                "choose another output folder"
            )


@dataclass(frozen=True, kw_only=True)
class _WorkerJob:
    """What each worker's process gets.

    Attributes:
        config: which model, and where samples are written.
        run: what samples depend on beside their rows.
        shares: the groups of rows that each shard asks.
        asking: how rows are asked.
        spec, system_prompt: those of the reasoner in the first process, which a benchmark may have changed.
    """

    config: EvalConfig
    run: dict[str, Any]
    shares: Sequence[Sequence[tuple[Row, ...]]]
    asking: Asking
    spec: VisionSpec
    system_prompt: str


def _ask_with_workers(
    job: _WorkerJob, reasoner: "Reasoner", writer: SampleWriter, report_progress: Callable[[int], None]
) -> None:
    """Ask the first share in this process and the others in workers."""
    own = 0
    with sharding.workers(len(job.shares), partial(_work, job)) as pool:
        for own, sample in enumerate(generate(reasoner, job.shares[0], job.asking), 1):
            writer.write(sample)
            pool.poll()
            report_progress(own + pool.steps)
        pool.wait(lambda: report_progress(own + pool.steps))


def _work(job: _WorkerJob, shard: int, step: Callable[[], None]) -> None:
    """Ask a shard's share in a worker's process; call `step` after each row."""
    path = sharding.shard_file(job.config.output, shard)
    with _load(job.config) as reasoner, SampleWriter(path, job.run) as writer:
        reasoner.spec, reasoner.system_prompt = job.spec, job.system_prompt
        for sample in generate(reasoner, job.shares[shard], job.asking):
            writer.write(sample)
            step()


def _merge_shards(output: Path, run: dict[str, Any], ranks: ProcessGroup, rows: Sequence[Row]) -> dict[str, Sample]:
    """All samples; those of several shards become one file, in the order of the rows."""
    if ranks.size == 1 and not sharding.shard_files(output):
        return {sample.id: sample for sample in read_samples(output / sharding.MAIN)}
    known = sharding.collect(output, run, ranks)
    if ranks.rank == 0:
        order = {row.id: place for place, row in enumerate(rows)}
        in_order = sorted(known.values(), key=lambda sample: order.get(sample.id, len(order)))
        write_samples(output / sharding.MAIN, run, in_order)
        for path in sharding.shard_files(output):
            path.unlink(missing_ok=True)
    ranks.barrier()
    if ranks.rank:
        sharding.shard_file(output, ranks.rank).unlink(missing_ok=True)
    return known


def _check_in_time(config: EvalConfig, rows: Sequence[Row], baseline: Baseline | None) -> None:
    """Refuse now what could only fail after hours of work: a calibration, a comparison, a file."""
    if config.write_threshold and (config.model is None or not Path(config.model).is_dir()):
        raise ConfigError(
            "the threshold is written into a model folder: give --model the folder of a converted model, or "
            "--threshold-file a file"
        )
    if config.calibrate is not None:
        counted = [row for row in rows if row.answer not in (None, "", []) or not config.needs_answers]
        check_enough(counted, config.folds)
        if config.write_threshold:
            check_writable(Path(str(config.model)) / "mlxvr.json")
        if config.threshold_file is not None:
            check_writable(config.threshold_file)
    if baseline is not None:
        check_comparable({sample.id: sample for sample in usable(baseline.samples)}, {row.id: row for row in rows})
