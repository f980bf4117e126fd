"""Where text can be redrawn in place: a terminal that a person looks at.

Pipes, files, terminals that call themselves dumb (`TERM=dumb`) and CI systems (`CI` is set) get plain lines instead.
With `NO_COLOR` a terminal is redrawn without colours and dim letters.

The cursor stays visible while something is drawn, since a process that is killed could not bring it back.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console, ConsoleDimensions, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment

__all__ = ["Redrawing", "SafeStream", "open_console", "printable"]


def open_console(out: TextIO) -> Console | None:
    """Return a console that draws on `out`; None where only plain lines can be written."""
    try:
        is_terminal = out.isatty()
    except (AttributeError, ValueError):
        is_terminal = False
    is_watched = os.environ.get("CI", "").lower() in ("", "0", "false")
    if not is_terminal or not is_watched or os.environ.get("TERM") in ("dumb", "unknown"):
        return None
    return _Console(
        file=SafeStream(out),  # type: ignore[arg-type]
        force_terminal=True,
        force_interactive=True,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        highlight=False,
        markup=False,
        emoji=False,
    )


def printable(text: str) -> str:
    """Replace control characters by spaces, so that no text can move the cursor."""
    return "".join(char if char.isprintable() else " " for char in text)


class SafeStream:
    """A text stream that never raises when it is written to.

    Characters that its encoding lacks become `?`. A stream that is closed, or whose terminal is gone (a connection was
    lost), takes nothing: hours of work do not end for lack of an audience.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> int:
        """Write what can be written; returns the length of the text."""
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError, LookupError):
            self._out.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError, ValueError):
            self._out.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


class _Console(Console):
    """A console that asks its own terminal for the size: rich asks stdin's first, and `COLUMNS` only once."""

    @property  # type: ignore[misc]  # the setter of rich's is not needed
    def size(self) -> ConsoleDimensions:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            columns, lines = os.get_terminal_size(self.file.fileno())
            if columns and lines:
                return ConsoleDimensions(columns, lines)
        return ConsoleDimensions(*shutil.get_terminal_size())


class Redrawing(Live):
    """Lines at the bottom of a terminal: what `render` returns, until `stop` leaves it where it is.

    A terminal that becomes narrower breaks the lines that it shows into more rows than rich counts, and rows of the old
    lines would stay behind. So the lengths of the drawn lines are noted, and the additional rows are cleared as well.

    Args:
        console: from `open_console`.
        render: called for each drawing, also by another thread.
        refresh_seconds: between two drawings by that thread; None: there is no such thread.
        redirect_stderr: whether what others write to stderr scrolls away above.
    """

    def __init__(
        self,
        console: Console,
        render: Callable[[], RenderableType],
        *,
        refresh_seconds: float | None = None,
        redirect_stderr: bool = False,
    ) -> None:
        self._render = render
        self._lengths: list[int] = []
        super().__init__(
            self,
            console=console,
            auto_refresh=refresh_seconds is not None,
            refresh_per_second=1.0 / (refresh_seconds or 1.0),
            redirect_stdout=False,  # results go there
            redirect_stderr=redirect_stderr,
            vertical_overflow="crop",
        )

    def start(self, refresh: bool = False) -> None:
        """Begin to draw; may be called twice."""
        if not self.is_started:
            super().start(refresh)
            self.console.show_cursor(True)

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Clear the rows that the lines take on a terminal of this width, then draw."""
        additional = sum(max(0, math.ceil(length / self.console.width) - 1) for length in self._lengths)
        up = ((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2))
        clear = [Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), *up * additional)]
        return [*(clear if additional else ()), *super().process_renderables(renderables)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._render(), options, pad=False)
        self._lengths = [Segment.get_line_length(line) for line in lines][: options.size.height]
        for line in lines:
            yield from line
            yield Segment.line()
