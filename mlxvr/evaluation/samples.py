r"""One generated row, as it is kept: a line of `samples.jsonl`, from which every figure is computed.

A row is generated once, in think mode. Its sample holds both answers, the confidence and what each part cost, so that
direct, think and auto at any threshold follow without another generation (`decide`).

The file grows by one line per row and each line is on the disk before the next row is asked. Killed at any moment, a
run loses at most the row that it was working on: a last line without its newline is dropped when the file is read, and
overwritten when the run goes on. The first line says which settings the samples were made with, and a run with other
settings is refused, since figures from both together would describe neither.
"""

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

from mlxvr.dataset import Kind
from mlxvr.errors import ConfigError, DataError

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

_RUN = "run"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        prefill_seconds, decode_seconds: the prompt through the model, and reading the frames.
        problems: departures from the format (`mlxvr.protocol.Transcript.problems`).
        reasoned: whether the model went on after the first box; False only for a live run that stopped there.
        error: why the row failed, in one line; no figure comes from a row that failed.
        asked: a digest of all of the row that its answer depends on; "" where that was not noted.
    """

    id: str
    kind: Kind
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
    decode_seconds: float = 0.0
    problems: tuple[str, ...] = ()
    reasoned: bool = True
    error: str | None = None
    asked: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise DataError(f"a sample's id is {self.id!r}; expected a text that is not empty")
        if self.kind not in get_args(Kind):
            raise DataError(f"sample {self.id}: kind {self.kind!r}; expected one of {', '.join(get_args(Kind))}")
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


def decide(sample: Sample, tau: float) -> Decision:
    """Take the first answer when there is one at least as sure as `tau`, else the answer after reasoning.

    Raises `ConfigError` for a sample of a live run that stopped before it got there: what it would have reasoned is
    not known.
    """
    if sample.confidence is not None and sample.confidence >= tau:
        return Decision(sample.first or "", sample.first_tokens, sample.first_seconds, reasoned=False)
    if not sample.reasoned:
        raise ConfigError(
            f"sample {sample.id} stopped at its first answer (live run), so threshold {tau:g} cannot be tried on it: "
            "generate without --live"
        )
    return Decision(sample.final, sample.total_tokens, sample.total_seconds, reasoned=True)


def ordered(samples: Iterable[Sample]) -> list[Sample]:
    """The samples sorted by id, so that no figure depends on the order they were made in.

    Raises `DataError` for an id that is there twice.
    """
    result = sorted(samples, key=lambda sample: sample.id)
    for one, other in pairwise(result):
        if one.id == other.id:
            raise DataError(f"two samples have the id {one.id!r}; give every row an id of its own")
    return result


def read_samples(path: str | os.PathLike[str]) -> list[Sample]:
    """Read the samples of a run, in the order they were written; a last line that was cut off is dropped.

    Raises `DataError` naming file and line for a line that is no sample and an id that is there twice, and
    `ConfigError` when the file cannot be read.
    """
    source = Path(path)
    samples: dict[str, Sample] = {}
    for number, record in _records(source, _whole_lines(_read(source))):
        if number == 1 and set(record) == {_RUN}:
            continue
        sample = _sample(source, number, record)
        if sample.id in samples:
            raise DataError(f"{source}:{number}: the id {sample.id!r} is there twice; remove one of the two lines")
        samples[sample.id] = sample
    return list(samples.values())


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the settings that the samples of a file were made with; {} if it does not say."""
    source = Path(path)
    for _, record in _records(source, _whole_lines(_read(source)).split(b"\n", 1)[0]):
        if set(record) == {_RUN} and isinstance(record[_RUN], dict):
            return record[_RUN]
        break
    return {}


def check_run(path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
    """Raise `ConfigError` when a file's samples were made with other settings than `run`; an empty file is fine."""
    found = _whole_lines(_read(Path(path)))
    if found:
        _check_run(Path(path), found, _line({_RUN: dict(run)}))


def write_samples(path: str | os.PathLike[str], run: Mapping[str, Any], samples: Iterable[Sample]) -> None:
    """Write a whole file of samples in one step: a stop leaves the old file or the new one.

    Raises `ConfigError` when it cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(_line({_RUN: dict(run)}))
            file.writelines(_line(sample.to_dict()) for sample in samples)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


class SampleWriter:
    """Appends samples to a file, each on the disk before `write` returns, and goes on where an earlier run stopped.

        with SampleWriter(path, {"model": "..", "max_tokens": 4096}) as writer:
            for row in rows:
                if row.id not in writer.done:
                    writer.write(generate(row))

    Args:
        path: of the file; it and its folder are created when they are not there.
        run: what the samples depend on (model, budgets, decoding), as JSON-ready values.

    Attributes:
        done: ids of the samples that are in the file.

    Raises:
        ConfigError: the file was made with other settings or for another purpose, another process is writing it, or
            it cannot be written.
        DataError: a line of it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self.done: set[str] = set()
        header = _line({_RUN: dict(run)})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        try:
            _lock(self._file, self._path)
            found = _whole_lines(self._path.read_bytes())
            self._end = len(found)
            if found:
                _check_run(self._path, found, header)
                self.done = {sample.id for sample in read_samples(self._path)}
            else:
                self._append(header)
                _sync_folder(self._path.parent)
        except BaseException:
            os.close(self._file)
            raise

    def write(self, sample: Sample) -> None:
        """Append a sample.

        Raises:
            DataError: a sample of this id is there already.
            ConfigError: the disk is full or the file cannot be written; what was there before still is.
        """
        if sample.id in self.done:
            raise DataError(f"{self._path} has a sample {sample.id!r} already; give every row an id of its own")
        self._append(_line(sample.to_dict()))
        self.done.add(sample.id)

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        """Put a line behind the last whole one, over what may be left of one that was cut off."""
        try:
            os.ftruncate(self._file, self._end)
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
            os.fsync(self._file)
        except OSError as error:
            _shorten(self._file, self._end)
            raise _unwritable(self._path, error) from error
        self._end += len(line)


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # a path that is no UTF-8; escaped it is valid JSON all the same
        return f"{json.dumps(record, allow_nan=False)}\n".encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the samples.jsonl of a run") from error


def _whole_lines(content: bytes) -> bytes:
    """The content without a last line that was cut off."""
    return content[: content.rfind(b"\n") + 1]


def _records(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file's lines with their numbers, from 1; empty lines are passed over."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: no JSON ({error}); remove the line, and its row is asked again"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: a {type(record).__name__}; expected an object with a sample's fields")
        yield number, record


def _sample(path: Path, number: int, record: dict[str, Any]) -> Sample:
    """A sample from a line; fields of a later version are passed over."""
    wanted = {known.name for known in fields(Sample)}
    try:
        return Sample(**{name: value for name, value in record.items() if name in wanted})
    except (DataError, TypeError) as error:
        raise DataError(f"{path}:{number}: no sample ({error}); remove the line, and its row is asked again") from error


def _check_run(path: Path, found: bytes, header: bytes) -> None:
    """Refuse to add to the samples of another run."""
    old = read_run(path)
    new = json.loads(header)[_RUN]
    if old == new:
        return
    if not old and set(json.loads(found.split(b"\n", 1)[0] or b"{}")) != {_RUN}:
        raise ConfigError(f"{path} does not begin with the settings of a run; choose another output folder")
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    told = ", ".join(f"{name} {old.get(name)!r} (now {new.get(name)!r})" for name in names[:3])
    raise ConfigError(f"{path} was made with other settings: {told}; use those, or choose another output folder")


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another process is writing {path}; wait for it or stop it") from error


def _shorten(descriptor: int, size: int) -> None:
    try:
        os.ftruncate(descriptor, size)
    except OSError:  # the line that was cut off is dropped by whoever reads the file
        return


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> ConfigError:
    if error.errno in _FULL:
        return ConfigError(f"the disk of {path} is full; free some space and run again: it goes on where it stopped")
    return ConfigError(f"{path} cannot be written ({error.strerror}); choose another output folder")
