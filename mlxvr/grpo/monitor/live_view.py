"""How a training run is getting on, for people: a few lines redrawn in place, or a plain line for every step.

On a terminal the lines stay where they are and notes scroll away above them. Elsewhere (a file, a pipe, a terminal that
calls itself dumb) each entry is one line without escape codes. Figures that are missing are left out.

The view is never wider or higher than its terminal: bar and history shrink first, then what finds no room on a line
goes on in the next one, and lines at the end that find no room are left out.

The reward's history is drawn over the whole run, each column the mean of as many steps as it takes.

Between entries the view is drawn anew once a second where that is asked for: the time goes on, and the view says what
the run is doing now, so that a step of minutes does not look like a run that hangs.

The view never ends a run. Where its terminal is gone (a connection was lost), it is silent.
"""

import contextlib
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from types import TracebackType
from typing import Any, NamedTuple, Self, TextIO

__all__ = ["LiveView", "duration", "sparkline"]

_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_BAR, _ASCII_BAR = "█░", "#-"
_BAR_WIDTH, _SPARK_WIDTH = 24, 32
_LEAST = 6  # characters: a bar or a history of fewer says nothing
_GAP = "  "
_STAGES = {"sample": "sampling {done} of {total}", "learn": "learning", "validate": "validating {done} of {total}"}
_LARGEST = 1e30  # no figure of a training is larger, and its digits would fill the screen


class _Part(NamedTuple):
    label: str
    value: str

    def plain(self) -> str:
        return f"{self.label} {self.value}" if self.label and self.value else self.label or self.value

    def dimmed(self) -> str:
        label = f"\x1b[2m{self.label}\x1b[22m" if self.label else ""
        return f"{label} {self.value}" if label and self.value else label or self.value


class LiveView:
    """Shows a run's entries as they come; see `journal` for their names.

    Args:
        total_steps: of the whole run.
        out: where to write; None: stderr.
        history: entries of steps that were made before, by a run that is gone on with; they are not timed.
        refresh_seconds: after which a terminal is drawn anew between entries, by a thread that ends with `close`; None:
            never.
    """

    def __init__(
        self,
        total_steps: int,
        out: TextIO | None = None,
        *,
        history: Iterable[Mapping[str, Any]] = (),
        refresh_seconds: float | None = None,
    ) -> None:
        self._total = total_steps
        self._out: TextIO = out if out is not None else sys.stderr
        self._is_live = _is_terminal(self._out)
        self._has_blocks = _can_show(self._out, _BLOCKS + _BAR)
        self._is_dim = self._is_live and not os.environ.get("NO_COLOR")
        self._is_closed = False
        self._has_begun = False
        self._drawn: list[int] = []  # widths of the lines on the screen
        self._step = 0
        self._steps_here = 0
        self._start = self._step_ended = time.monotonic()
        self._doing = ""
        self._lock = threading.RLock()  # a signal's handler may write a note while its own thread draws
        self._ended = threading.Event()
        self._last: dict[str, Any] = {}
        self._valid: dict[str, Any] = {}
        self._rewards: list[float] = []
        for entry in history:
            self._take(entry)
        self._steps_here = 0
        if refresh_seconds is not None and self._is_live:
            threading.Thread(target=self._keep_fresh, args=(refresh_seconds,), daemon=True).start()

    def update(self, entry: Mapping[str, Any]) -> None:
        """Show an entry: of a step, of a validation, or of both."""
        with self._lock:
            if not self._has_begun:  # whoever makes a view with its first entry has made that step already
                self._has_begun = True
                self._start -= sum(_number(entry, name) or 0.0 for name in ("rollout_seconds", "update_seconds"))
            self._take(entry)
            self._doing = ""
            if self._is_closed:
                return
            if self._is_live:
                self._draw()
            else:
                self._write(f"{self._line(entry)}\n")

    def work(self, stage: str, done: int, total: int) -> None:
        """Say what the run is doing now, as its `progress` tells it; shown on a terminal alone."""
        with self._lock:
            words = _STAGES.get(stage, f"{stage} {{done}} of {{total}}")
            self._doing = words.format(done=min(done + 1, total), total=total)
            self.refresh()

    def refresh(self) -> None:
        """Draw a terminal anew: the time goes on between entries."""
        with self._lock:
            if self._is_live and not self._is_closed and (self._last or self._valid):
                self._draw()

    def note(self, text: str) -> None:
        """Say something that stays: above the lines of the view, or as a line of its own."""
        with self._lock:
            if self._is_closed:
                return
            lines = [_printable(line) for line in text.splitlines()] or [""]
            if self._is_live:
                self._write(self._clearing() + "".join(f"{line}\n" for line in lines))
                self._drawn = []
                self.refresh()
            else:
                self._write("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Leave the last lines where they are; nothing is shown after. May be called twice."""
        with self._lock:
            self._doing = ""
            self.refresh()
            self._is_closed = True
        self._ended.set()

    def _keep_fresh(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            self.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, entry: Mapping[str, Any]) -> None:
        step = _number(entry, "step")
        if any(str(name).startswith("valid_") for name in entry):
            self._valid = dict(entry)
        if step is not None and any(name != "step" and not str(name).startswith("valid_") for name in entry):
            self._steps_here += max(0, int(step) - self._step) if self._steps_here else 1
            self._step = int(step)
            self._step_ended = time.monotonic()
            self._last = dict(entry)
            reward = _number(entry, "reward")
            if reward is not None:
                self._rewards.append(reward)

    def _times(self) -> tuple[float, float | None]:
        """Seconds so far, and those that are left at the pace so far."""
        now = time.monotonic()
        if not self._steps_here:
            return now - self._start, None
        left = (self._step_ended - self._start) / self._steps_here * max(0, self._total - self._step)
        return now - self._start, max(0.0, left - (now - self._step_ended))

    def _draw(self) -> None:
        columns, rows = _size(self._out)
        width = max(1, columns - 1)  # a full line makes some terminals go on to the next
        lines = [line for parts in self._parts(width) for line in _flow(parts, width)][: max(1, rows - 1)]
        texts = [_GAP.join(part.dimmed() if self._is_dim else part.plain() for part in line) for line in lines]
        self._write(self._clearing() + "".join(f"{text}\n" for text in texts))
        self._drawn = [_width(line) for line in lines]

    def _clearing(self) -> str:
        """What takes the lines of the view off the screen, where a narrower terminal may have broken them."""
        if not self._drawn:
            return ""
        columns, _ = _size(self._out)
        up = sum(max(1, math.ceil(width / max(1, columns))) for width in self._drawn)
        return f"\x1b[{up}A\r\x1b[J"

    def _parts(self, width: int) -> list[list[_Part]]:
        """What is on a terminal, line by line where there is room."""
        last = self._last
        elapsed, left = self._times()
        share = min(1.0, max(0.0, self._step / self._total)) if self._total > 0 else 0.0
        head = _known(
            ("step", f"{self._step:,} of {self._total:,}"),
            ("", f"{100 * share:3.0f}%"),
            ("elapsed", duration(elapsed)),
            ("left", "" if left is None else duration(left)),
            ("", self._doing),
        )
        bar = _BAR if self._has_blocks else _ASCII_BAR
        room = _room(head, width, _BAR_WIDTH)
        full = round(share * room)
        head[1:1] = _known(("", bar[0] * full + bar[1] * (room - full)))
        reward = _known(("reward", _plain(last, "reward", 6)), ("spread in a group", _plain(last, "reward_std", 5)))
        blocks = _BLOCKS if self._has_blocks else _ASCII_BLOCKS
        reward[1:1] = _known(("", sparkline(self._rewards, _room(reward, width, _SPARK_WIDTH), blocks)))
        answers = _known(
            ("first", _percent(last, "first_accuracy", 6)),
            ("second", _percent(last, "second_accuracy", 6)),
            ("think", _percent(last, "think_ratio", 6)),
            ("format", _percent(last, "rewards/format/mean", 6)),
        )
        update = _known(
            ("kl", _small(last, "kl", 7)),
            ("grad norm", _small(last, "grad_norm", 7)),
            ("learning rate", _small(last, "learning_rate", 7)),
        )
        cost = _known(
            ("tokens", _whole(last, "completions/mean_length", 6)),
            ("longest", _whole(last, "completions/max_length", 6)),
            ("truncated", _percent(last, "completions/clipped_ratio", 6)),
            ("tokens/s", _whole(last, "tokens_per_second", 6)),
            ("memory", _memory(last)),
        )
        return [head, reward, answers, update, cost, self._validation(self._valid)]

    def _line(self, entry: Mapping[str, Any]) -> str:
        """An entry as one line of text."""
        parts = []
        if any(name != "step" and not str(name).startswith("valid_") for name in entry):
            _, left = self._times()
            parts = _known(
                ("step", f"{self._step}/{self._total}"),
                ("reward", _plain(entry, "reward")),
                ("first", _percent(entry, "first_accuracy")),
                ("second", _percent(entry, "second_accuracy")),
                ("think", _percent(entry, "think_ratio")),
                ("format", _percent(entry, "rewards/format/mean")),
                ("tokens", _whole(entry, "completions/mean_length")),
                (
                    "truncated",
                    _percent(entry, "completions/clipped_ratio") if _number(entry, "completions/clipped_ratio") else "",
                ),
                ("kl", _small(entry, "kl")),
                ("grad", _small(entry, "grad_norm")),
                ("lr", _small(entry, "learning_rate")),
                ("tokens/s", _whole(entry, "tokens_per_second")),
                ("memory", _memory(entry)),
                ("left", "" if left is None else duration(left)),
            )
        return _GAP.join(part.plain() for part in [*parts, *self._validation(entry)])

    @staticmethod
    def _validation(entry: Mapping[str, Any]) -> list[_Part]:
        figures = _known(
            ("first", _percent(entry, "valid_first_accuracy")),
            ("second", _percent(entry, "valid_second_accuracy")),
            ("auto", _percent(entry, "valid_auto_accuracy")),
            ("confidence", _plain(entry, "valid_confidence")),
            ("think", _percent(entry, "valid_think_ratio")),
            ("tokens", _whole(entry, "valid_tokens")),
            ("format", _percent(entry, "valid_format")),
            ("reward", _plain(entry, "valid_reward")),
        )
        step = _number(entry, "step")
        return [_Part("validation" if step is None else f"validation at {step:.0f}:", ""), *figures] if figures else []

    def _write(self, text: str) -> None:
        encoding = _encoding(self._out)
        try:
            self._out.write(text.encode(encoding, "replace").decode(encoding))
            self._out.flush()
        except (OSError, ValueError, LookupError):
            self._is_closed = True


def duration(seconds: float) -> str:
    """Seconds as `0:07`, `12:31`, `3:05:12` or `2d 4:05:12`."""
    whole = max(0, round(seconds))
    days, whole = divmod(whole, 86_400)
    hours, whole = divmod(whole, 3_600)
    minutes, whole = divmod(whole, 60)
    if days or hours:
        return f"{f'{days}d ' if days else ''}{hours}:{minutes:02}:{whole:02}"
    return f"{minutes}:{whole:02}"


def sparkline(values: Sequence[float], width: int, blocks: str = _BLOCKS) -> str:
    """A history in at most `width` characters, from the lowest of `blocks` to the highest.

    Args:
        values: finite figures, the oldest first.
        width: of the picture; where there are more values, each column is the mean of its share of them.
        blocks: characters from low to high; a history that does not change is drawn in the middle.

    Returns an empty string for fewer than two values.
    """
    if len(values) < 2 or width < 1:
        return ""
    columns = min(width, len(values))
    edges = [len(values) * place // columns for place in range(columns + 1)]
    means = [fmean(values[start:end]) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    if not high > low:
        return blocks[len(blocks) // 2] * columns
    return "".join(blocks[min(len(blocks) - 1, int((one - low) / (high - low) * len(blocks)))] for one in means)


def _known(*parts: tuple[str, str]) -> list[_Part]:
    return [_Part(label, value) for label, value in parts if value]


def _width(parts: Iterable[_Part]) -> int:
    return len(_GAP.join(part.plain() for part in parts))


def _room(parts: Sequence[_Part], width: int, most: int) -> int:
    """Characters that are left for a picture among parts on a line; 0 where they are too few."""
    left = min(most, width - _width(parts) - len(_GAP))
    return left if left >= _LEAST else 0


def _flow(parts: Iterable[_Part], width: int) -> list[list[_Part]]:
    """Parts on as many lines as they need, none of them wider than `width`."""
    lines: list[list[_Part]] = []
    for part in parts:
        if len(part.plain()) > width:
            value = part.value.strip()
            part = _Part("", _Part(part.label[: max(0, width - len(value) - 1)], value).plain()[:width])
        if lines and _width([*lines[-1], part]) <= width:
            lines[-1].append(part)
        else:
            lines.append([part])
    return lines


def _number(entry: Mapping[str, Any], name: str) -> float | None:
    """A figure, if it is known, a number and finite."""
    try:
        value = float(entry[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return value if abs(value) < _LARGEST else None


def _plain(entry: Mapping[str, Any], name: str, width: int = 0) -> str:
    value = _number(entry, name)
    return "" if value is None else f"{value:{width}.3f}"


def _percent(entry: Mapping[str, Any], name: str, width: int = 0) -> str:
    value = _number(entry, name)
    return "" if value is None else f"{f'{100 * value:.1f}%':>{width}}"


def _whole(entry: Mapping[str, Any], name: str, width: int = 0) -> str:
    value = _number(entry, name)
    return "" if value is None else f"{value:{width},.0f}"


def _small(entry: Mapping[str, Any], name: str, width: int = 0) -> str:
    value = _number(entry, name)
    return "" if value is None else f"{value:{width}.3g}"


def _memory(entry: Mapping[str, Any]) -> str:
    """In the units of the estimate that a run begins with."""
    value = _number(entry, "peak_memory")
    if value is None:
        return ""
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def _printable(text: str) -> str:
    """Without control characters, so that no text can move the cursor."""
    return "".join(char if char.isprintable() else " " for char in text)


def _is_terminal(out: TextIO) -> bool:
    try:
        return out.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        return False


def _encoding(out: TextIO) -> str:
    return getattr(out, "encoding", None) or "utf-8"


def _can_show(out: TextIO, text: str) -> bool:
    try:
        text.encode(_encoding(out))
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _size(out: TextIO) -> tuple[int, int]:
    """Columns and rows of the terminal."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        size = os.get_terminal_size(out.fileno())
        if size.columns and size.lines:
            return size
    return shutil.get_terminal_size()
