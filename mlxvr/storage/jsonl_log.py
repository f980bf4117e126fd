"""A log: a file of JSON records, one a line, that grows while a program runs and outlives its end.

A record is on the disk before `append` returns. A program that is killed loses at most the record that it was writing:
a last line without its newline is dropped when the file is read, and overwritten when the next run appends. One process
writes at a time.

A log can begin with a line of settings, `{"run": {..}}`. A run with other settings is then refused, since records of
both together would describe neither.

The samples of an evaluation, the progress of a filtering and the metrics of a training are such logs.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from mlxvr.errors import ConfigError, DataError
from mlxvr.storage.atomic import replace_file, sync_folder, unwritable

__all__ = ["JsonlLog", "check_run", "read_records", "read_run", "write_records"]

_RUN = "run"
_ADVICE = "choose another output folder"
_WHEN_FULL = "free some space and run again: it resumes where it stopped"
_REMEDY = "remove the line, and its row is asked again"


def read_records(path: str | os.PathLike[str], *, remedy: str = _REMEDY) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each record with the number of its line, from 1; settings and a cut-off last line are left out.

    Raises:
        DataError: a line is no JSON object; the message names file and line and ends in `remedy`.
        ConfigError: the file cannot be read.
    """
    for number, record in _objects(Path(path), _whole_lines(Path(path)), remedy):
        if number > 1 or set(record) != {_RUN}:
            yield number, record


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the settings that a log begins with; {} if it begins with a record. Raises as `read_records`."""
    for _, record in _objects(Path(path), _first_line(Path(path)), _REMEDY):
        if set(record) == {_RUN} and isinstance(record[_RUN], dict):
            return record[_RUN]
    return {}


def check_run(path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
    """Raise `ConfigError` when a log was made with settings other than `run`; an empty file was made with none."""
    header = _first_line(Path(path))
    before, now = read_run(path), json.loads(_line(run))
    if not header or before == now:
        return
    if not before and (not header.strip() or set(json.loads(header)) != {_RUN}):
        raise ConfigError(f"{path} does not begin with the settings of a run; {_ADVICE}")
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    changes = ", ".join(f"{name} {before.get(name)!r} (now {now.get(name)!r})" for name in names[:3])
    raise ConfigError(f"{path} was made with other settings: {changes}; use those, or {_ADVICE}")


def write_records(
    path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]], *, run: Mapping[str, Any] | None = None
) -> None:
    """Write a whole log in one step: a stop leaves the old file or the new one.

    Raises `ConfigError` when it cannot be written.
    """
    header = () if run is None else ({_RUN: dict(run)},)
    replace_file(Path(path), lambda file: file.writelines(_line(record) for record in (*header, *records)))


class JsonlLog:
    """Appends records to a file, each on the disk before `append` returns.

    Args:
        path: the file; it and its folder are created when they are not there.
        run: the settings that the records depend on, as JSON-ready values; None: the log has none.
        remedy: what to do about a line that is no JSON object.

    Raises:
        ConfigError: the file was made with other settings or for another purpose, another process is writing it, or
            it cannot be written.
        DataError: its first line is damaged.
    """

    def __init__(
        self, path: str | os.PathLike[str], run: Mapping[str, Any] | None = None, *, remedy: str = _REMEDY
    ) -> None:
        self.path = Path(path)
        self._remedy = remedy
        self._file = -1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.path, error, advice=_ADVICE, when_full=_WHEN_FULL) from error
        self._open()
        try:
            if run is not None and self._end:
                check_run(self.path, run)
            elif run is not None:
                self.append({_RUN: dict(run)})
            sync_folder(self.path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Put a record behind the last whole one, over the rest of a record that was cut off.

        Raises `ConfigError`: the disk is full or the file cannot be written; earlier records are still there.
        """
        line = _line(record)
        try:
            os.ftruncate(self._file, self._end)
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # readers drop a line that was cut off
                os.ftruncate(self._file, self._end)
            raise unwritable(self.path, error, advice=_ADVICE, when_full=_WHEN_FULL) from error
        self._end += len(line)

    def records(self) -> list[dict[str, Any]]:
        """Return all records; raises as `read_records`."""
        return [record for _, record in read_records(self.path, remedy=self._remedy)]

    def retain(self, is_wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the records that a function refuses, in one step: a stop leaves all of them or none.

        Raises as `append` and `read_records`.
        """
        lines = _whole_lines(self.path).split(b"\n")
        objects = dict(_objects(self.path, b"\n".join(lines), self._remedy))
        wanted = [lines[number - 1] + b"\n" for number, record in objects.items() if is_wanted(record)]
        if len(wanted) < len(lines) - 1:
            replace_file(self.path, lambda file: file.writelines(wanted))
            self._open()

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

    def _open(self) -> None:
        """Open and lock the file that is at the path now, and let go of the one before."""
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unwritable(self.path, error, advice=_ADVICE, when_full=_WHEN_FULL) from error
        self.close()
        self._file = file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end = len(_whole_lines(self.path))
        except BlockingIOError as error:
            self.close()
            raise ConfigError(f"another process is writing {self.path}; wait for it or stop it") from error
        except BaseException:
            self.close()
            raise


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # a path that is no UTF-8; escaped it is valid JSON all the same
        return f"{json.dumps(record, allow_nan=False)}\n".encode()


def _first_line(path: Path) -> bytes:
    """Read the first line with its newline; an empty one if it was cut off."""
    with _readable(path) as file:
        line = file.readline()
    return line if line.endswith(b"\n") else b""


def _whole_lines(path: Path) -> bytes:
    """Read a file without its last line if that was cut off."""
    with _readable(path) as file:
        content = file.read()
    return content[: content.rfind(b"\n") + 1]


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a file that a run has written") from error


def _objects(path: Path, content: bytes, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a file's lines with the lines' numbers, from 1; empty lines are passed over."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: no JSON ({error}); {remedy}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: a {type(record).__name__}; expected an object; {remedy}")
        yield number, record
