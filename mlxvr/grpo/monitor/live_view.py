"""How a training run is getting on, for people: a few lines redrawn in place by rich, or a plain line for every step.

On a terminal the lines stay where they are and notes scroll away above them. Elsewhere (see `mlxvr.cli.terminal`) each
entry is one line without escape codes. Metrics that are missing are left out. The view is never wider or higher than
its terminal: what finds no room on a line goes on in the next one, and lines at the end that find no room are left out.

The reward's history is drawn over the whole run, each column the mean of as many steps as it takes. "best" is the
highest reward of a validation, as for the adapter in `best/`.

Between entries the view is drawn anew once a second where that is asked for: the time goes on, and the view says what
the run is doing, so that a step of minutes does not look like a run that hangs.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from statistics import fmean
from types import TracebackType
from typing import Any, Self, TextIO

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from mlxvr.cli.terminal import Redrawing, SafeStream, open_console, printable

__all__ = ["LiveView", "duration", "sparkline"]

_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_BAR_WIDTH, _SPARK_WIDTH = 24, 32
_STAGES = {"sample": "sampling {done} of {total}", "learn": "learning", "validate": "validating {done} of {total}"}
_LARGEST = 1e30  # no metric of a training is larger, and its digits would fill the screen


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"  # the units of the memory estimate


_Metric = tuple[str, str, Callable[[float], str]]  # label, name in metrics.jsonl, how it is written
_ROWS: tuple[tuple[_Metric, ...], ...] = (
    (("reward", "reward", "{:.3f}".format), ("spread in a group", "reward_std", "{:.3f}".format)),
    (
        ("first", "first_accuracy", _percent),
        ("second", "second_accuracy", _percent),
        ("think", "think_ratio", _percent),
        ("format", "rewards/format/mean", _percent),
    ),
    (
        ("kl", "kl", "{:.3g}".format),
        ("grad norm", "grad_norm", "{:.3g}".format),
        ("learning rate", "learning_rate", "{:.3g}".format),
    ),
    (
        ("tokens", "completions/mean_length", "{:,.0f}".format),
        ("longest", "completions/max_length", "{:,.0f}".format),
        ("truncated", "completions/clipped_ratio", _percent),
        ("tokens/s", "tokens_per_second", "{:,.0f}".format),
        ("memory", "peak_memory", _bytes),
    ),
)
_VALIDATION: tuple[_Metric, ...] = (
    ("first", "valid_first_accuracy", _percent),
    ("second", "valid_second_accuracy", _percent),
    ("auto", "valid_auto_accuracy", _percent),
    ("confidence", "valid_confidence", "{:.3f}".format),
    ("think", "valid_think_ratio", _percent),
    ("tokens", "valid_tokens", "{:,.0f}".format),
    ("format", "valid_format", _percent),
    ("reward", "valid_reward", "{:.3f}".format),
)


class LiveView:
    """Shows a run's entries as they come; `step_metrics` and `validation` say what their metrics mean.

    Args:
        total_steps: of the whole run.
        out: where to write; None: stderr.
        history: entries of steps that were made before, by a run that is resumed; they are not timed.
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
        out = out if out is not None else sys.stderr
        self._total = total_steps
        self._plain = SafeStream(out)
        self._screen = None
        if (console := open_console(out)) is not None:
            self._screen = Redrawing(
                console, self._render, refresh_seconds=refresh_seconds, redirect_stderr=out is sys.stderr
            )
        self._is_closed = self._has_begun = False
        self._step = self._steps_here = 0
        self._start = self._step_ended = time.monotonic()
        self._activity = ""
        self._last: Mapping[str, Any] = {}
        self._valid: Mapping[str, Any] = {}
        self._best: tuple[float, int] | None = None  # the highest validation reward, and the step before it
        self._rewards: list[float] = []
        for entry in history:
            self._take(entry)
        self._steps_here = 0

    def update(self, entry: Mapping[str, Any]) -> None:
        """Show an entry: of a step, of a validation, or of both."""
        if not self._has_begun:  # whoever makes a view with its first entry has made that step already
            self._has_begun = True
            self._start -= sum(_number(entry, name) or 0.0 for name in ("rollout_seconds", "update_seconds"))
        self._take(entry)
        self._activity = ""
        if self._is_closed:
            return
        if self._screen is None:
            self._print(self._line(entry))
        elif self._last or self._valid:
            self._screen.start()
            self._screen.refresh()

    def work(self, stage: str, done: int, total: int) -> None:
        """Show what the run is doing, as its `progress` hook reports it; on a terminal only."""
        words = _STAGES.get(stage, f"{stage} {{done}} of {{total}}")
        self._activity = words.format(done=min(done + 1, total), total=total)
        if self._screen is not None and self._screen.is_started:
            self._screen.refresh()

    def note(self, text: str) -> None:
        """Write something that stays: above the lines of the view, or as a line of its own."""
        if not self._is_closed:
            for line in text.splitlines() or [""]:
                self._print(printable(line))

    def close(self) -> None:
        """Leave the last lines where they are; nothing is shown after. May be called twice."""
        self._is_closed = True
        self._activity = ""
        if self._screen is not None:
            self._screen.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _print(self, line: str) -> None:
        if self._screen is not None:
            self._screen.console.print(line, soft_wrap=True)
        else:
            self._plain.write(f"{line}\n")
            self._plain.flush()

    def _take(self, entry: Mapping[str, Any]) -> None:
        step, valid_reward = _number(entry, "step"), _number(entry, "valid_reward")
        if any(str(name).startswith("valid_") for name in entry):
            self._valid = dict(entry)
        if step and valid_reward is not None and (self._best is None or valid_reward > self._best[0]):
            self._best = valid_reward, int(step)
        if step is not None and _is_of_step(entry):
            self._steps_here += max(0, int(step) - self._step) if self._steps_here else 1
            self._step = int(step)
            self._step_ended = time.monotonic()
            self._last = dict(entry)
            reward = _number(entry, "reward")
            if reward is not None:
                self._rewards.append(reward)

    def _times(self) -> tuple[str, str]:
        """The time so far, and the time that is left at the pace so far; "" while that is unknown."""
        now = time.monotonic()
        if not self._steps_here:
            return duration(now - self._start), ""
        left = (self._step_ended - self._start) / self._steps_here * max(0, self._total - self._step)
        return duration(now - self._start), duration(left - (now - self._step_ended))

    def _line(self, entry: Mapping[str, Any]) -> str:
        """An entry as one line of text."""
        parts: list[tuple[str, str]] = []
        if _is_of_step(entry):
            known = [part for row in _ROWS for part in _known(entry, row)]
            parts = [("step", f"{self._step}/{self._total}"), *known, ("left", self._times()[1])]
        parts += self._validation(entry)
        return "  ".join(f"{label} {value}".strip() for label, value in parts if value or label.endswith(":"))

    def _validation(self, entry: Mapping[str, Any]) -> list[tuple[str, str]]:
        parts = _known(entry, _VALIDATION)
        step = _number(entry, "step")
        best = [("best reward", "{:.3f} at {}".format(*self._best))] if self._best is not None else []
        return [(f"validation at {step or 0:.0f}:", ""), *parts, *best] if parts else []

    def _render(self) -> RenderableType:
        """What is on a terminal, line by line where there is room."""
        elapsed, left = self._times()
        share = min(1.0, max(0.0, self._step / self._total)) if self._total > 0 else 0.0
        head = [("step", f"{self._step:,} of {self._total:,}"), ("", f"{100 * share:.0f}%"), ("elapsed", elapsed)]
        head += [("left", left)] if left else []
        head += [("", self._activity)] if self._activity else []
        assert self._screen is not None
        blocks = _ASCII_BLOCKS if self._screen.console.options.ascii_only else _BLOCKS
        history = sparkline(self._rewards, min(_SPARK_WIDTH, self._screen.console.width), blocks)
        pictures = [Text(history, no_wrap=True)] if history else []
        first, *others = (_known(self._last, metrics) for metrics in _ROWS)
        rows = [_row(head, ProgressBar(total=1.0, completed=share, width=_BAR_WIDTH))]
        rows += [_row(first, *pictures)] if first else []
        rows += [_row(parts) for parts in chain(others, [self._validation(self._valid)]) if parts]
        return Group(*rows)


def _row(parts: Iterable[tuple[str, str]], *pictures: RenderableType) -> Columns:
    """Labels and values beside each other, as many as there is room for; pictures come after the first."""
    texts = [Text.assemble((label, "dim"), " " if label and value else "", value) for label, value in parts]
    return Columns([*texts[:1], *pictures, *texts[1:]], padding=(0, 2))


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
        values: finite numbers, the oldest first.
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
    return "".join(blocks[min(len(blocks) - 1, int((mean - low) / (high - low) * len(blocks)))] for mean in means)


def _is_of_step(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has metrics of a step, and not of a validation alone."""
    return any(name != "step" and not str(name).startswith("valid_") for name in entry)


def _known(entry: Mapping[str, Any], metrics: Iterable[_Metric]) -> list[tuple[str, str]]:
    """Labels and values of the metrics that an entry has."""
    numbers = ((label, _number(entry, name), write) for label, name, write in metrics)
    return [(label, write(number)) for label, number, write in numbers if number is not None]


def _number(entry: Mapping[str, Any], name: str) -> float | None:
    """A metric, if it is known, a number and finite."""
    try:
        value = float(entry[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) and abs(value) < _LARGEST else None
