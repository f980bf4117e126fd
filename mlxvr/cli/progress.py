"""Progress on stderr: one bar at a time, and none once a stage is done.

Where stderr is no terminal, such as in a log, a stage that takes long writes a line every half minute instead.
"""

import sys
import time
from typing import Any, TextIO

__all__ = ["Bars"]

_BYTES = {"unit": "B", "unit_scale": True}
_UNITS: dict[str, dict[str, Any]] = {
    "decoding": {"unit": "frame"},
    "frames": {"unit": "clip"},
    "vision": {"unit": "row"},
    "prefill": {"unit": "token"},
    "evaluate": {"unit": "row"},
    "download": _BYTES,
    "check": _BYTES,
    "convert": _BYTES,
    "upload": _BYTES,
}


_BETWEEN_LINES = 30.0  # seconds


class Bars:
    """A `Progress` callback, and a context manager that clears the screen."""

    def __init__(self, out: TextIO | None = None):
        """`out`: where bars are drawn; None: stderr."""
        self._out = out or sys.stderr
        self._stage = ""
        self._bar: Any = None
        self._note = ""
        self._told_at = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move the stage's bar to `done` of `total`."""
        from tqdm import tqdm  # on first need: --help answers at once

        if stage != self._stage or self._bar is None:
            self.clear()
            self._stage = stage
            self._told_at = time.monotonic()
            units = _UNITS.get(stage, {})
            self._bar = tqdm(total=total, desc=stage, file=self._out, leave=False, disable=None, **units)
        if self._bar.disable:
            self._write_line(stage, done, total)
        if self._note:
            self._bar.set_postfix_str(self._note, refresh=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.clear()

    def _write_line(self, stage: str, done: int, total: int) -> None:
        if total > 0 and time.monotonic() - self._told_at >= _BETWEEN_LINES:
            self._told_at = time.monotonic()
            print(f"{stage}: {done / total:.0%}", file=self._out, flush=True)

    def note(self, text: str) -> None:
        """Show `text` beside the bar from its next step on."""
        self._note = text

    def clear(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._note = ""

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
