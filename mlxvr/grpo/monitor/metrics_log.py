"""The record of a training run: one JSON line for every step and validation, in `metrics.jsonl`.

A line is on the disk before `write` returns. Killed at any moment, a run loses at most the line that it was writing: a
last line without its newline is dropped when the file is read, and overwritten when the run goes on. A run that goes on
from a saved step drops what came after it, in one step (`rewind`), and writes it again.

Figures that are no numbers (NaN, infinity) become null, since JSON has no form for them. Other figures keep seven
digits, all that a float32 holds, so that 0.3 reads 0.3 and not 0.30000001192092896.

The same entries can go to other places while the run is on: TensorBoard (through tensorboardX, which needs neither
torch nor TensorFlow) and Weights & Biases. They are copies. One that fails is named once and left out from then on; the
run and its journal go on.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mlxvr.errors import ConfigError, DataError
from mlxvr.storage.atomic import replace_file

__all__ = ["FILE_NAME", "SINKS", "Journal", "Sink", "make_sinks", "read_entries"]

FILE_NAME = "metrics.jsonl"

_DIGITS = 7
_WHOLE = 10.0**_DIGITS  # from here on seven digits would round away whole numbers, such as bytes

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Another place that entries go to."""

    def write(self, entry: Mapping[str, Any]) -> None:
        """Take an entry, as it is in the file."""

    def rewind(self, step: int) -> None:
        """Forget entries after a step, as far as the place can."""

    def close(self) -> None:
        """Send what is left; nothing comes after."""


class Journal:
    """Appends entries to a run's `metrics.jsonl`, and reads them back.

    Args:
        folder: of the run; it is created. A file that is there is gone on with.
        sinks: where entries go too; they are closed with the journal.

    Raises `ConfigError` when the file cannot be written, or another process is writing it.
    """

    def __init__(self, folder: Path, *, sinks: Sequence[Sink] = ()) -> None:
        self.path = Path(folder) / FILE_NAME
        self._sinks = list(sinks)
        self._file = -1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._open()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append an entry; it is on the disk when this returns.

        Args:
            entry: JSON-ready values, or scalars that have `.item()`; `step` says to which step it belongs.

        Raises `ConfigError` when the file cannot be written; what was there before still is.
        """
        record = {name: _readable(value) for name, value in entry.items()}
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        line = f"{text}\n".encode(errors="backslashreplace")  # half a surrogate pair, from a path, as JSON escapes it
        try:
            os.ftruncate(self._file, self._end)
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise _unwritable(self.path, error) from error
        self._end += len(line)
        self._tell(lambda sink: sink.write(record))

    def entries(self) -> list[dict[str, Any]]:
        """All entries, as `read_entries` gives them."""
        return read_entries(self.path)

    def rewind(self, step: int) -> None:
        """Drop the entries after a step, in one step: a stop leaves all of them or none.

        Args:
            step: the last one that is kept; 0 keeps what was recorded before training.

        Raises:
            ConfigError: the file cannot be written.
            DataError: a line is no JSON object.
        """
        kept = []
        lines = _lines(self.path)
        for number, line in enumerate(lines, 1):
            if line.strip() and not _is_after(_parse(self.path, number, line), step):
                kept.append(line + b"\n")
        if len(kept) < len(lines):
            replace_file(self.path, lambda out: out.writelines(kept))
            self._open()
        self._tell(lambda sink: sink.rewind(step))

    def close(self) -> None:
        """Let go of the file and close the sinks; may be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._tell(lambda sink: sink.close())
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        """Take hold of the file that is at the path now, and let go of the one before."""
        before = self._file
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        if before >= 0:
            os.close(before)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            self._file = -1
            raise ConfigError(f"another process is writing {self.path}; wait for it or stop it") from error
        self._end = sum(len(line) + 1 for line in _lines(self.path))

    def _tell(self, say: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                say(sink)
            except Exception as error:  # hours of training are not lost for a copy of its figures
                self._sinks.remove(sink)
                logger.warning(
                    "%s gets no more figures (%s); %s has all of them",
                    type(sink).__name__.lstrip("_"),
                    error,
                    self.path,
                )


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal, in the order in which they were written; a run may be writing it.

    Raises:
        ConfigError: the file cannot be read.
        DataError: a line is no JSON object; the message names file and line.
    """
    return [_parse(path, number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]


def _lines(path: Path) -> list[bytes]:
    """The lines of the file without their newlines; a last one that was cut off is left out."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); choose another output folder") from error


def make_sinks(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Sink]:
    """Open the places that a run's figures go to beside its journal.

    Args:
        names: of `SINKS`, without regard to order or repetition.
        folder: of the run: TensorBoard's files come into `folder/tensorboard`, those of Weights & Biases into
            `folder/wandb`, and the run's id there into `folder/wandb_id`, so that a run that goes on is the same one.
        config: the run's settings, JSON-ready.

    Raises `ConfigError`: a name that is none of `SINKS`, a package that is not installed (the message says how to
    install it), or a place that cannot be opened.
    """
    for name in names:
        if name not in SINKS:
            raise ConfigError(f"{name!r} is no place for figures: expected {' or '.join(SINKS)}")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    opened: list[Sink] = []
    try:
        for name in dict.fromkeys(names):
            opened.append(SINKS[name](folder, config))
    except BaseException:
        for sink in opened:
            sink.close()
        raise
    return opened


class _TensorBoard:
    """Figures as scalars: those of validations under `valid/`, the others under `train/`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"tensorboard needs tensorboardX ({error}): pip install tensorboardX, and tensorboard to look at it"
            ) from error
        self._make_writer = SummaryWriter
        self._folder = folder / "tensorboard"
        self._config = json.dumps({name: _readable(value) for name, value in config.items()}, indent=2, default=str)
        self._writer: Any = None
        self._written = 0  # files of this process; two of one second would have one name
        self._from: int | None = None

    def write(self, entry: Mapping[str, Any]) -> None:
        writer, step = self._open(), entry.get("step")
        for name, value in _figures(entry).items():
            tag = f"valid/{name.removeprefix('valid_')}" if name.startswith("valid_") else f"train/{name}"
            writer.add_scalar(tag, value, step)
        writer.flush()

    def rewind(self, step: int) -> None:
        """What is shown from the next step on is hidden once a file says that it begins there."""
        self._close_file()
        self._from = step + 1

    def close(self) -> None:
        self._close_file()

    def _open(self) -> Any:
        if self._writer is None:
            suffix = f".{self._written}" if self._written else ""
            self._writer = self._make_writer(str(self._folder), purge_step=self._from, filename_suffix=suffix)
            if not self._written:
                self._writer.add_text("config", f"```\n{self._config}\n```", self._from or 0)
            self._written += 1
        return self._writer

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Wandb:
    """Figures against the run's own `step`: a step that is trained again is shown again, since W&B forgets nothing."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"wandb is not installed ({error}): pip install wandb") from error
        try:
            self._run: Any = wandb.init(
                project="mlxvr", dir=str(folder), config=dict(config), id=_wandb_id(folder), resume="allow"
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # every release of wandb has other errors
            raise ConfigError(
                f"wandb does not start ({error}): run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def write(self, entry: Mapping[str, Any]) -> None:
        step = {"step": entry["step"]} if "step" in entry else {}
        self._run.log({**step, **_figures(entry)})

    def rewind(self, step: int) -> None:
        return

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


def _wandb_id(folder: Path) -> str:
    """The id of the folder's run, made when there is none."""
    path = folder / "wandb_id"
    try:
        found = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        found = ""
    if not found:
        found = secrets.token_hex(4)
        replace_file(path, lambda out: out.write(f"{found}\n".encode()))
    return found


def _figures(entry: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in entry.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _readable(value: Any) -> Any:
    """A value as it is written: scalars of arrays as numbers, and no more digits than a float32 has."""
    if hasattr(value, "item") and not isinstance(value, Mapping):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(name): _readable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(one) for one in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}") if abs(value) < _WHOLE else float(round(value))


def _is_after(entry: Mapping[str, Any], step: int) -> bool:
    found = entry.get("step")
    return isinstance(found, int | float) and found > step


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: no JSON ({error}); remove the line: its figures are lost") from error
    if not isinstance(entry, dict):
        raise DataError(f"{path}:{number}: a {type(entry).__name__}; expected an object; remove the line")
    return entry


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be written ({error.strerror}); free some space or choose another output folder")
