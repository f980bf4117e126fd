"""The metrics of a training run: one JSON line for every step and validation, in `metrics.jsonl`.

The file is a `JsonlLog`: a line is on the disk before `write` returns, and a killed run loses at most the line that it
was writing. A run that resumes from a saved step drops what came after it, in one step (`rewind`), and writes it again.

Metrics that are no numbers (NaN, infinity) become null, since JSON has no form for them. Others keep seven digits, all
that a float32 holds, so that 0.3 reads 0.3 and not 0.30000001192092896.

Sinks get the same entries. One that fails is named once and left out from then on; the run and its log go on.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlxvr.grpo.monitor.sinks import Sink
from mlxvr.storage.jsonl_log import JsonlLog, read_records

__all__ = ["FILE_NAME", "MetricsLog", "read_metrics"]

FILE_NAME = "metrics.jsonl"

_DIGITS = 7
_WHOLE = 10.0**_DIGITS  # from here on seven digits would round away whole numbers, such as bytes
_REMEDY = "remove the line: its metrics are lost"

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends entries to a run's `metrics.jsonl`, and reads them back.

    Args:
        folder: of the run; it is created. A file that is there is continued.
        sinks: where entries go too; they are closed with the log.

    Raises `ConfigError` when the file cannot be written, or another process is writing it.
    """

    def __init__(self, folder: Path, *, sinks: Sequence[Sink] = ()) -> None:
        self._log = JsonlLog(Path(folder) / FILE_NAME, remedy=_REMEDY)
        self._sinks = list(sinks)

    @property
    def path(self) -> Path:
        """The file."""
        return self._log.path

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append an entry; it is on the disk when this returns.

        Args:
            entry: JSON-ready values, or scalars that have `.item()`; `step` is the step that it belongs to.

        Raises `ConfigError` when the file cannot be written; earlier entries are still there.
        """
        record = {name: _to_json(value) for name, value in entry.items()}
        self._log.append(record)
        self._send(lambda sink: sink.write(record))

    def entries(self) -> list[dict[str, Any]]:
        """Return all entries, as `read_metrics` does."""
        return self._log.records()

    def rewind(self, step: int) -> None:
        """Drop the entries after a step, in one step: a stop leaves all of them or none.

        Args:
            step: the last step whose entries stay; 0 leaves what was recorded before training.

        Raises:
            ConfigError: the file cannot be written.
            DataError: a line is no JSON object.
        """
        self._log.retain(lambda entry: not _is_after(entry, step))
        self._send(lambda sink: sink.rewind(step))

    def close(self) -> None:
        """Let go of the file and close the sinks; may be called twice."""
        self._log.close()
        self._send(lambda sink: sink.close())
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:  # hours of training are not lost for a copy of its metrics
                self._sinks.remove(sink)
                logger.warning(
                    "%s gets no more metrics (%s); %s has all of them",
                    type(sink).__name__.lstrip("_"),
                    error,
                    self.path,
                )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a `metrics.jsonl` in the order in which they were written; a run may be writing it.

    Raises:
        ConfigError: the file cannot be read.
        DataError: a line is no JSON object; the message names file and line.
    """
    return [entry for _, entry in read_records(path, remedy=_REMEDY)]


def _to_json(value: Any) -> Any:
    """A value as it is written: scalars of arrays as numbers, and no more digits than a float32 has."""
    if hasattr(value, "item") and not isinstance(value, Mapping):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(name): _to_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(part) for part in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}") if abs(value) < _WHOLE else float(round(value))


def _is_after(entry: Mapping[str, Any], step: int) -> bool:
    entry_step = entry.get("step")
    return isinstance(entry_step, int | float) and entry_step > step
