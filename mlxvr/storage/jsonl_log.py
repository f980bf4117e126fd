"""A file of records that grows line by line and outlives the process that writes it.

The first line says which settings the records were made with: a run with other settings is refused, since what follows
from both together would describe neither. Every line after it is one record, on the disk before `append` returns.
Killed at any moment, a run loses at most the record that it was writing: a last line without its newline is dropped
when the file is read, and overwritten when the run goes on. One process writes at a time.

Samples of an evaluation and the progress of a filtering are such files.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlxvr.errors import ConfigError, DataError
from mlxvr.storage.atomic import unwritable

__all__ = ["Ledger", "check_run", "read_entries", "read_run", "write_atomically", "write_ledger"]

_RUN = "run"


def read_entries(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each record with its line's number, from 1; the settings and a last line that was cut off are left out.

    Raises `DataError` naming file and line for a line that is no JSON object, and `ConfigError` when the file cannot
    be read.
    """
    source = Path(path)
    for number, record in _records(source, _whole_lines(_read(source))):
        if number > 1 or set(record) != {_RUN}:
            yield number, record


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the settings that the records of a file were made with; {} if it does not say."""
    source = Path(path)
    for _, record in _records(source, _whole_lines(_read(source)).split(b"\n", 1)[0]):
        if set(record) == {_RUN} and isinstance(record[_RUN], dict):
            return record[_RUN]
        break
    return {}


def check_run(path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
    """Raise `ConfigError` when a file's records were made with other settings than `run`; an empty file is fine."""
    found = _whole_lines(_read(Path(path)))
    if found:
        _check_run(Path(path), found, _line({_RUN: dict(run)}))


def write_ledger(path: str | os.PathLike[str], run: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file in one step: a stop leaves the old file or the new one.

    Raises `ConfigError` when it cannot be written.
    """
    write_atomically(path, ({_RUN: dict(run)}, *records))


def write_atomically(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Write records, one JSON object a line, in one step; raises `ConfigError` when they cannot be written."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.writelines(_line(record) for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


class Ledger:
    """Appends records to a file, each on the disk before `append` returns.

    Args:
        path: of the file; it and its folder are created when they are not there.
        run: what the records depend on, as JSON-ready values.

    Raises:
        ConfigError: the file was made with other settings or for another purpose, another process is writing it, or
            it cannot be written.
        DataError: its first line is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self.path = Path(path)
        header = _line({_RUN: dict(run)})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        try:
            _lock(self._file, self.path)
            found = _whole_lines(self.path.read_bytes())
            self._end = len(found)
            if found:
                _check_run(self.path, found, header)
            else:
                self._append(header)
                _sync_folder(self.path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Put a record behind the last whole one, over what may be left of one that was cut off.

        Raises `ConfigError`: the disk is full or the file cannot be written; what was there before still is.
        """
        self._append(_line(record))

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
        try:
            os.ftruncate(self._file, self._end)
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
            os.fsync(self._file)
        except OSError as error:
            _shorten(self._file, self._end)
            raise _unwritable(self.path, error) from error
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
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a file that a run has written") from error


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
            raise DataError(
                f"{path}:{number}: a {type(record).__name__}; expected an object; remove the line, and its row is "
                "asked again"
            )
        yield number, record


def _check_run(path: Path, found: bytes, header: bytes) -> None:
    """Refuse to add to the records of another run."""
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
    return unwritable(path, error, when_full="free some space and run again: it goes on where it stopped")
