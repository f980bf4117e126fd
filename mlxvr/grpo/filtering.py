"""Which rows are worth training on: those that the base model sometimes solves.

A group whose completions all earn the same teaches nothing, so k completions of every row are sampled, and a row that
is right 0 times or k times out of k is dropped (arXiv 2601.05175 does so with 8). Right means that the reviewed answer,
the second, earns at least a threshold. Texts and formulas earn 0 or 1, so any threshold says the same of them; for
moments it is an IoU; of grounded answers, which earn up to 2, it is held against half of that. The default is the 0.7
from which the reward itself takes an answer for right. The paper has a language model judge instead of the reward.

A reward function of the user's own judges in its place: by the `second` of a `Reward`, or by the number itself where it
returns a number. Such a function may judge rows that have no answer, too.

What is sampled is kept row by row in a log beside the output, on the disk before the next row begins. Killed at any
point, the same call goes on there; since a row's seed comes from the run's seed and the row's id, it ends with the same
output. A row that was changed is sampled again, and the threshold may be changed without any sampling. The output is
written at the end, in one step: a dataset like any other, with `pass_rate` for curious readers.

Media paths. The output gives them relative to its own folder where all media lie in it. Where they do not, they are
relative to the media root that was given, or to the folder that they have in common, and the report says which: the
output has to be read with that as its media root.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvr.data.rows import Row, to_record
from mlxvr.errors import Cancelled, ConfigError, DataError, MediaError
from mlxvr.grading.reward import RewardFunction, call_reward, highest_reward, score
from mlxvr.media.spec import VisionSpec
from mlxvr.runtime.hooks import Progress, ShouldStop
from mlxvr.storage.jsonl_log import JsonlLog, read_records, write_records

if TYPE_CHECKING:
    from mlxvr.model.network import VideoModel

__all__ = ["FilterReport", "Sampler", "Sampling", "filter_rows", "make_sampler", "progress_file"]

Sampler = Callable[[Row, int], Sequence[str]]  # of a row and a seed: the texts of its completions


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are sampled; raises `ConfigError` when built from values that cannot be used."""

    max_tokens: int = 2_048
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_prompt_tokens: int | None = None
    prefill_step_size: int = 2048

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}: expected at least 1")
        if not self.temperature > 0 or not math.isfinite(self.temperature):
            raise ConfigError(f"temperature is {self.temperature}: samples differ only above 0, such as 1.0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: expected a share from above 0 to 1")
        if self.prefill_step_size < 1:
            raise ConfigError(f"prefill_step_size is {self.prefill_step_size}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class FilterReport:
    """What a filtering kept.

    Attributes:
        output: the file of the rows that were kept.
        progress: the log of what was sampled.
        media_root: what has to be given as the media root to read `output`; None: nothing.
        samples: completions a row.
        threshold: from which an answer was right.
        total: rows that came in; each is in one of the following counts.
        kept: rows that are sometimes right.
        never, always: rows that were dropped, since they were right 0 times or each time.
        unlabelled: rows without an answer, which cannot be judged and are kept.
        failed: why rows could not be sampled, one line each; they are left out and tried again by the next run.
        sampled: rows that were sampled in this run; the others had been.
        left_out: rows of the data that could not be read; not among `total`.
    """

    output: Path
    progress: Path
    media_root: Path | None
    samples: int
    threshold: float
    total: int
    kept: int
    never: int
    always: int
    unlabelled: int
    failed: tuple[str, ...]
    sampled: int
    left_out: int = 0

    def describe(self) -> str:
        """One line for people."""
        parts = [
            f"{self.kept + self.unlabelled:,} of {self.total:,} rows kept in {self.output}",
            f"{self.never:,} dropped as never right and {self.always:,} as right {self.samples} times of "
            f"{self.samples}",
        ]
        if self.unlabelled:
            parts.append(f"{self.unlabelled:,} have no answer and were kept")
        if self.failed:
            parts.append(f"{len(self.failed):,} failed (the first: {self.failed[0]})")
        if self.left_out:
            parts.append(f"{self.left_out:,} rows of the data were left out")
        if self.media_root is not None:
            parts.append(f"its media paths need --media-root {self.media_root}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        paths = {
            name: None if path is None else str(path)
            for name, path in (("output", self.output), ("progress", self.progress), ("media_root", self.media_root))
        }
        return {**asdict(self), **paths, "failed": list(self.failed)}


def filter_rows(
    model: "VideoModel | None",
    rows: Sequence[Row],
    output: Path,
    *,
    samples: int = 8,
    threshold: float = 0.7,
    sampling: Sampling | None = None,
    spec: VisionSpec | None = None,
    media_root: Path | None = None,
    skip_bad: bool = False,
    sampler: Sampler | None = None,
    reward: RewardFunction | None = None,
    judged_by: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> FilterReport:
    """Keep the rows that a model solves sometimes; goes on where an earlier call stopped.

    Args:
        model: what is sampled from; None only with a `sampler`.
        rows: with unique ids.
        output: the JSONL to write; its progress is beside it (`progress_file`).
        samples: completions a row.
        threshold: what the second answer has to earn to be right, in (0, 1]; any number with a `reward`.
        sampling: tokens, temperature and seed; None: the defaults of `Sampling`.
        spec: frames and pixels; None: the model's own.
        media_root: that of the rows, if they have one.
        skip_bad: whether rows that cannot be shown or judged are left out instead of raising.
        sampler: takes the place of the model: texts of a row's completions, as many as `samples`.
        reward: judges in the place of the paper's reward.
        judged_by: what else decides what is sampled and how it is judged, JSON-ready, such as the names of the adapter
            and of the reward: progress that was made with something else is refused.
        progress: called with ("filter", rows done, rows).
        should_stop: ends the work between rows and tokens with `Cancelled`; what was sampled is kept.

    Raises:
        ConfigError: a value cannot be used, or the progress is that of other settings.
        DataError: two rows have one id, the output is the file that they come from, or no row is left.
        MediaError: what a row shows cannot be read.
    """
    sampling = sampling or Sampling()
    _check(rows, output, samples, threshold, any_threshold=reward is not None)
    if sampler is None:
        if model is None:
            raise ConfigError("there is no model to sample from: give one, or a sampler")
        sampler = make_sampler(model, samples=samples, sampling=sampling, spec=spec, should_stop=should_stop)
    labelled = [row for row in rows if row.answer is not None or reward is not None]
    failed: list[str] = []
    sampled = 0
    with JsonlLog(progress_file(output), {**_run(model, samples, sampling, spec), **(judged_by or {})}) as log:
        known = _known(log.path, samples)
        for done, row in enumerate(labelled):
            _tell(progress, done, len(labelled))
            if (row.id, _digest(row)) in known:
                continue
            if should_stop is not None and should_stop():
                raise Cancelled(f"stopped after {done} of {len(labelled)} rows; the same call goes on there")
            try:
                earned = _earned(row, sampler(row, _seed(sampling.seed, row)), samples, reward)
            except (DataError, MediaError) as error:
                told = str(error) if str(error).startswith(row.line) else f"{row.line}: {error}"
                if not skip_bad:
                    raise type(error)(told) from error
                failed.append(told)
                continue
            log.append({"id": row.id, "asked": _digest(row), "second": earned})
            known[row.id, _digest(row)] = earned
            sampled += 1
        _tell(progress, len(labelled), len(labelled))
        report, records = _decide(
            rows, known, output, samples, threshold, media_root, failed, sampled, reward is not None
        )
        if not records:
            raise DataError(f"no row is left of {report.total}: {report.describe()}")
        write_records(output, records)
    return report


def make_sampler(
    model: "VideoModel",
    *,
    samples: int,
    sampling: Sampling,
    spec: VisionSpec | None = None,
    should_stop: ShouldStop | None = None,
) -> Sampler:
    """Sample completions of a row from a model, by one rollout."""
    from mlxvr.grpo.step.prompts import encode_row
    from mlxvr.grpo.step.rollout import rollout

    def sample(row: Row, seed: int) -> list[str]:
        prompt = encode_row(
            model,
            row,
            spec=spec or model.spec,
            max_prompt_tokens=sampling.max_prompt_tokens,
            should_stop=should_stop,
        )
        group = rollout(
            model,
            prompt,
            group_size=samples,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            prefill_step_size=sampling.prefill_step_size,
            should_stop=should_stop,
        )
        return group.texts

    return sample


def progress_file(output: Path) -> Path:
    """The log of an output: `kept.progress.jsonl` beside `kept.jsonl`."""
    return output.with_name(f"{output.stem}.progress.jsonl")


def _check(rows: Sequence[Row], output: Path, samples: int, threshold: float, *, any_threshold: bool) -> None:
    if samples < 2:
        raise ConfigError(f"samples is {samples}: whether a row is solved sometimes takes at least 2")
    if not math.isfinite(threshold) or not (any_threshold or 0 < threshold <= 1):
        raise ConfigError(f"threshold is {threshold}: expected a number above 0, up to 1")
    if output.is_dir():
        raise ConfigError(f"{output} is a folder: give the JSONL file to write")
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise DataError(f"{row.line}: the id {row.id!r} is that of {seen[row.id]} already: give every row its own")
        seen[row.id] = row.line
    if output.exists() and any(_is_same(line.rpartition(":")[0], output) for line in seen.values()):
        raise DataError(f"{output} is the file that the rows come from: give another one to write")


def _is_same(path: str, output: Path) -> bool:
    return os.path.abspath(path) == os.path.abspath(output) or Path(path).resolve() == output.resolve()


def _run(model: "VideoModel | None", samples: int, sampling: Sampling, spec: VisionSpec | None) -> dict[str, Any]:
    """What samples depend on beside their rows."""
    if model is not None:
        spec = spec or model.spec
    prompt = "" if model is None else hashlib.sha256(model.system_prompt.encode()).hexdigest()[:16]
    return {
        "work": "filter",
        "weights": None if model is None else model.fingerprint,
        "system_prompt": prompt,
        "samples": samples,
        **asdict(sampling),
        "frames": None if spec is None else hashlib.sha256(repr(spec).encode()).hexdigest()[:16],
    }


def _known(path: Path, samples: int) -> dict[tuple[str, str], list[float]]:
    """What earlier runs found: rewards of second answers, by id and digest."""
    known = {}
    for number, record in read_records(path):
        second = record.get("second")
        named = isinstance(record.get("id"), str) and isinstance(record.get("asked"), str)
        if not named or not isinstance(second, list) or len(second) != samples:
            raise DataError(f"{path}:{number}: no progress of a row; remove the line, and its row is sampled again")
        known[record["id"], record["asked"]] = [float(one) for one in second]
    return known


def _digest(row: Row) -> str:
    """Tells apart rows that are asked or judged differently."""
    record = to_record(row, media=row.media)
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _seed(seed: int, row: Row) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{row.id}".encode("utf-8", "surrogatepass")).digest()[:4])


def _earned(row: Row, texts: Sequence[str], samples: int, reward: RewardFunction | None) -> list[float]:
    """What the second answers earn, unweighted; what a user's function says of the whole where it says nothing else."""
    if len(texts) != samples:
        raise ConfigError(f"{row.line}: the sampler made {len(texts)} completions: expected {samples}")
    if reward is None:
        return [float(score(text, row.answer, row.kind).second) for text in texts]
    rewards = [call_reward(reward, text, row) for text in texts]
    return [earned.total if math.isnan(earned.second) else earned.second for earned in rewards]


def _decide(
    rows: Sequence[Row],
    known: dict[tuple[str, str], list[float]],
    output: Path,
    samples: int,
    threshold: float,
    media_root: Path | None,
    failed: Sequence[str],
    sampled: int,
    judges_all: bool,
) -> tuple[FilterReport, list[dict[str, Any]]]:
    """Which rows stay, as a report and as the lines of the output."""
    root = _root(rows, output.parent, media_root)
    records = []
    kept = never = always = unlabelled = 0
    for row in rows:
        earned = known.get((row.id, _digest(row)))
        record = to_record(row, media=_relative(row, root or output.parent))
        if row.answer is None and not judges_all:
            unlabelled += 1
            records.append(record)
        elif earned is not None:
            highest = (
                1.0 if judges_all else highest_reward(row.kind)
            )  # a user's own scale is held against the threshold as it is
            right = sum(one >= threshold * highest for one in earned)
            never += right == 0
            always += right == samples
            if 0 < right < samples:
                kept += 1
                records.append({**record, "pass_rate": right / samples})
    report = FilterReport(
        output=output,
        progress=progress_file(output),
        media_root=root,
        samples=samples,
        threshold=threshold,
        total=len(rows),
        kept=kept,
        never=never,
        always=always,
        unlabelled=unlabelled,
        failed=tuple(failed),
        sampled=sampled,
    )
    return report, records


def _root(rows: Sequence[Row], folder: Path, media_root: Path | None) -> Path | None:
    """What media paths of the output are relative to; None: the output's own folder, as all media lie in it."""
    paths = [path for row in rows if (path := row.video or row.image) is not None]
    if all(path.resolve().is_relative_to(folder.resolve()) for path in paths):
        return None
    absolute = [Path(os.path.abspath(path)) for path in paths]
    if media_root is not None:
        root = Path(os.path.abspath(media_root))
        if all(path.is_relative_to(root) for path in absolute):
            return root
    return Path(os.path.commonpath([path.parent for path in absolute]))


def _relative(row: Row, base: Path) -> str:
    path = row.video or row.image
    if path is None:
        return ""
    absolute, root = Path(os.path.abspath(path)), Path(os.path.abspath(base))
    if absolute.is_relative_to(root):
        return absolute.relative_to(root).as_posix()
    return path.resolve().relative_to(base.resolve()).as_posix()


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None and total:
        progress("filter", done, total)
