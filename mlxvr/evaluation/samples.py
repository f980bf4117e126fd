r"""Samples: what the model generated for each row, a line of `samples.jsonl`, from which every metric is computed.

Each row is generated once, in think mode. Its sample holds both answers, the confidence and the cost of each part, so
that direct, think and auto at any threshold follow without another generation (`decide`).

The file is a `JsonlLog`: it grows by one line per row, survives a kill, and refuses samples that were made with other
settings.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

from mlxvr.data.row_fields import GradingKind
from mlxvr.errors import ConfigError, DataError
from mlxvr.storage.jsonl_log import JsonlLog, check_run, read_records, read_run, write_records

__all__ = [
    "Decision",
    "Sample",
    "SampleWriter",
    "check_run",
    "decide",
    "ordered",
    "read_run",
    "read_samples",
    "write_samples",
]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the model made of one row; the row's own fields are repeated, so that a report needs no other file.

    Attributes:
        id, task, category, pair, kind, question, options, answer, start, end: the row's. `answer` is None, "" or []
            where the row has no label.
        media: path of the video or image as it was given; "" if there is none.
        first: content of the first box, or None.
        confidence: of the first answer, in [0, 1]; None: there is no direct answer (fallback, no box), so the model
            always reasons. A number that is not finite becomes None.
        second: content of the second box, or None.
        reasoning: the text between the think tags, or None.
        text: what the generation ends with: the second box, else the last box, else the text.
        first_tokens: generated up to and with the token that closes the first box.
        total_tokens: generated in all.
        prompt_tokens, video_tokens: length of the prompt, and how much of it is visual.
        first_seconds, total_seconds: generating up to the first box, and in all.
        prefill_seconds, media_seconds: the prompt through the model, and reading the frames.
        problems: departures from the format (`mlxvr.answering.transcript.Transcript.problems`).
        reasoned: whether generation continued after the first box; False only for a live run that stopped there.
        error: why the row failed, in one line; rows that failed count in no metric.
        asked: a digest of all fields of the row that its answer depends on; "" where it was not recorded.
    """

    id: str
    kind: GradingKind
    task: str = ""
    category: str = ""
    pair: str = ""
    question: str = ""
    options: tuple[str, ...] = ()
    answer: str | list[Any] | None = None
    media: str = ""
    start: float | None = None
    end: float | None = None
    first: str | None = None
    confidence: float | None = None
    second: str | None = None
    reasoning: str | None = None
    text: str = ""
    first_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens: int = 0
    video_tokens: int = 0
    first_seconds: float = 0.0
    total_seconds: float = 0.0
    prefill_seconds: float = 0.0
    media_seconds: float = 0.0
    problems: tuple[str, ...] = ()
    reasoned: bool = True
    error: str | None = None
    asked: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise DataError(f"a sample's id is {self.id!r}; expected a text that is not empty")
        if self.kind not in get_args(GradingKind):
            raise DataError(f"sample {self.id}: kind {self.kind!r}; expected one of {', '.join(get_args(GradingKind))}")
        if self.confidence is not None and not math.isfinite(self.confidence):
            object.__setattr__(self, "confidence", None)
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise DataError(f"sample {self.id}: confidence {self.confidence!r}; expected a number from 0 to 1")
        object.__setattr__(self, "options", tuple(self.options))
        object.__setattr__(self, "problems", tuple(self.problems))

    @property
    def is_labelled(self) -> bool:
        """Whether there is an answer to grade against."""
        return self.answer not in (None, "", [])

    @property
    def final(self) -> str:
        """The answer after reasoning: the second box, else what the generation ends with."""
        return self.text if self.second is None else self.second

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self) | {"options": list(self.options), "problems": list(self.problems)}


@dataclass(frozen=True)
class Decision:
    """What a threshold makes of a sample: the answer, generated tokens and seconds, whether the model reasons."""

    text: str
    tokens: int
    seconds: float
    reasoned: bool


def decide(sample: Sample, threshold: float) -> Decision:
    """Take the first answer when there is one at least as sure as `threshold`, else the answer after reasoning.

    Raises `ConfigError` for a sample of a live run that stopped before it got there: what it would have reasoned is
    not known.
    """
    if sample.confidence is not None and sample.confidence >= threshold:
        return Decision(sample.first or "", sample.first_tokens, sample.first_seconds, reasoned=False)
    if not sample.reasoned:
        raise ConfigError(
            f"sample {sample.id} stopped at its first answer (live run), so threshold {threshold:g} cannot be tried "
            "on it: generate without --live"
        )
    return Decision(sample.final, sample.total_tokens, sample.total_seconds, reasoned=True)


def ordered(samples: Iterable[Sample]) -> list[Sample]:
    """The samples sorted by id, so that no figure depends on the order they were made in.

    Raises `DataError` for an id that is there twice.
    """
    result = sorted(samples, key=lambda sample: sample.id)
    for sample, following in pairwise(result):
        if sample.id == following.id:
            raise DataError(f"two samples have the id {sample.id!r}; give every row an id of its own")
    return result


def read_samples(path: str | os.PathLike[str]) -> list[Sample]:
    """Read the samples of a run, in the order they were written; a last line that was cut off is dropped.

    Raises `DataError` naming file and line for a line that is no sample and an id that is there twice, and
    `ConfigError` when the file cannot be read.
    """
    source = Path(path)
    samples: dict[str, Sample] = {}
    for number, record in read_records(source):
        sample = _sample(source, number, record)
        if sample.id in samples:
            raise DataError(f"{source}:{number}: the id {sample.id!r} is there twice; remove one of the two lines")
        samples[sample.id] = sample
    return list(samples.values())


def write_samples(path: str | os.PathLike[str], run: Mapping[str, Any], samples: Iterable[Sample]) -> None:
    """Write a whole file of samples in one step: a stop leaves the old file or the new one.

    Raises `ConfigError` when it cannot be written.
    """
    write_records(path, (sample.to_dict() for sample in samples), run=run)


class SampleWriter:
    """Appends samples to a file, each on the disk before `write` returns, and goes on where an earlier run stopped.

        with SampleWriter(path, {"model": "..", "max_tokens": 4096}) as writer:
            for row in rows:
                if row.id not in writer.done:
                    writer.write(generate(row))

    Args:
        path: of the file; it and its folder are created when they are not there.
        run: what the samples depend on (model, frame limits, decoding), as JSON-ready values.

    Attributes:
        done: ids of the samples that are in the file.

    Raises:
        ConfigError: the file was made with other settings or for another purpose, another process is writing it, or
            it cannot be written.
        DataError: a line of it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self._log = JsonlLog(path, run)
        try:
            self.done = {sample.id for sample in read_samples(path)}
        except BaseException:
            self._log.close()
            raise

    def write(self, sample: Sample) -> None:
        """Append a sample.

        Raises:
            DataError: a sample of this id is there already.
            ConfigError: the disk is full or the file cannot be written; what was there before still is.
        """
        if sample.id in self.done:
            raise DataError(f"{self._log.path} has a sample {sample.id!r} already; give every row an id of its own")
        self._log.append(sample.to_dict())
        self.done.add(sample.id)

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _sample(path: Path, number: int, record: dict[str, Any]) -> Sample:
    """A sample from a line; fields of a later version are passed over."""
    wanted = {known.name for known in fields(Sample)}
    try:
        return Sample(**{name: value for name, value in record.items() if name in wanted})
    except (DataError, TypeError) as error:
        raise DataError(f"{path}:{number}: no sample ({error}); remove the line, and its row is asked again") from error
