"""Progress on stderr: one bar at a time, and none once a stage is done.

Where stderr cannot be redrawn (see `mlxvr.cli.terminal`), a stage that takes long writes a line every half minute.
"""

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["ProgressBar"]

_UNITS = {"decoding": "frames", "frames": "clips", "vision": "temporal patches", "prefill": "tokens"}
_UNITS |= {"evaluate": "rows", "filter": "rows"}
_BYTE_STAGES = {"download", "check", "convert", "upload"}
_SECONDS_BETWEEN_LINES = 30.0


class ProgressBar:
    """A progress hook (`stage, done, total`), and a context manager that clears the bar at its end."""

    def __init__(self, out: TextIO | None = None) -> None:
        """`out`: where the bar is drawn; None: stderr."""
        from mlxvr.cli.terminal import open_console  # and so rich, when work begins: --help answers at once

        self._out = out or sys.stderr
        self._console = open_console(self._out)
        self._stage = ""
        self._bar: Progress | None = None
        self._note = ""
        self._line_written_at = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move the stage's bar to `done` of `total`; 0 is a total that is not known."""
        if stage != self._stage:
            self.clear()
            self._stage, self._line_written_at = stage, time.monotonic()
        if done >= total > 0:
            self.clear()
        elif self._console is None:
            self._write_line(stage, done, total)
        else:
            self._draw(stage, done, total)

    def note(self, text: str) -> None:
        """Show `text` beside the bar from its next step on."""
        from mlxvr.cli.terminal import printable

        self._note = printable(text)

    def clear(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._stage = self._note = ""

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._make_bar(stage)
            self._bar.add_task(stage, completed=done, total=total or None, note=self._note)
            self._bar.start()
            self._bar.console.show_cursor(True)  # a process that is killed could not bring it back
        self._bar.update(self._bar.task_ids[0], completed=done, total=total or None, note=self._note)

    def _make_bar(self, stage: str) -> "Progress":
        from rich import progress

        unit = _UNITS.get(stage, "")
        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.TaskProgressColumn(),
            progress.DownloadColumn() if stage in _BYTE_STAGES else progress.MofNCompleteColumn(),
            progress.TextColumn(unit),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
            redirect_stdout=False,  # results go there
            redirect_stderr=self._out is sys.stderr,  # warnings scroll away above the bar
        )

    def _write_line(self, stage: str, done: int, total: int) -> None:
        if total > 0 and time.monotonic() - self._line_written_at >= _SECONDS_BETWEEN_LINES:
            self._line_written_at = time.monotonic()
            print(f"{stage}: {done / total:.0%}", file=self._out, flush=True)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
