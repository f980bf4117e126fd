"""The curves of a training run in one picture, from the entries of its `metrics.jsonl`.

Six panels over the steps: the reward with its parts, the accuracies of both answers, the shares (confidence, think
ratio, format), lengths, loss and KL, gradient norm and learning rate. Validations are marked by dots. Groups are few in
a step, so metrics are noisy: they are drawn faintly, with a mean over neighbouring steps on top. Lines that coincide
stay visible by their dashes, and legends are below their panels. A loss that is 0, as it is by construction with one
update of a batch, and a KL that is nearly 0 are drawn as 0 instead of filling their axes with rounding errors.

In a long run each point is the mean of several steps, as the axis then says, since a picture cannot show more than a
thousand points. Metrics that are null are left out, and a panel without any metric says so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvr.cli.plotting import BLUE, GRAY, GREEN, ORANGE, RED, VIOLET, check_plot, write_plot
from mlxvr.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plot", "plot_curves", "smooth", "thin"]

_MOST = 1_000  # points of a line
_FEW = 40  # points of a line: up to here each is marked, and none is smoothed
_WINDOWS = 30  # the mean is over this part of the run
_LARGEST = 1e30  # no metric of a training is larger, and sums of larger ones could overflow
_SMOOTH = {"learning_rate"}  # metrics that are not noisy
_LEAST_SPAN = {"loss": 1e-3, "kl": 1e-4}  # of an axis: smaller differences are rounding errors

Line = tuple[list[float], list[float]]  # steps and values


@dataclass(frozen=True)
class _Curve:
    """A metric of the training steps, and how it is drawn."""

    name: str
    label: str
    color: str
    style: str = "-"
    marker: str = "."


_REWARDS = (
    _Curve("reward", "reward", BLUE),
    _Curve("rewards/first/mean", "first answer", ORANGE),
    _Curve("rewards/second/mean", "second answer", GREEN),
    _Curve("rewards/format/mean", "format", GRAY, ":"),
    _Curve("rewards/fallback/mean", "fallback", VIOLET, "-."),
    _Curve("rewards/agreement/mean", "agreement", ORANGE, "--"),
    _Curve("rewards/coherence/mean", "coherence", GREEN, "--"),
)
_LOSS = _Curve("loss", "loss", BLUE)
_KL = _Curve("kl", "KL to the reference", ORANGE, "--", "x")
_GRADIENT_NORM = _Curve("grad_norm", "gradient norm", BLUE)
_LEARNING_RATE = _Curve("learning_rate", "learning rate", ORANGE, "--", "x")


def plot_curves(entries: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> None:
    """Write the curves of a run as PNG or SVG, by the suffix of `path`; the file is replaced in one step.

    Args:
        entries: of a `metrics.jsonl`; those without a step are passed over.
        path: ends in `.png` or `.svg`.
        title: heads the picture.

    Raises:
        ConfigError: another suffix, no matplotlib, or the file cannot be written.
        DataError: there is no entry with a step.
    """
    known = sorted((entry for entry in entries if _number(entry, "step") is not None), key=lambda entry: entry["step"])
    if not known:
        raise DataError("there is nothing to plot: no entry has a step; train for a step first")
    write_plot(lambda figure: _draw(figure, known, title), Path(path), size=(13.0, 9.0))


def thin(values: Line, most: int = _MOST) -> Line:
    """A line with at most `most` points: each the mean of equally many neighbours, the last perhaps of fewer.

    Args:
        values: steps and the values at them, of the same length.
        most: at least 1.
    """
    size = max(1, math.ceil(len(values[0]) / most))
    if size == 1:
        return values
    starts = range(0, len(values[0]), size)
    steps, means = ([_mean(axis[start : start + size]) for start in starts] for axis in values)
    return steps, means


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over the `window` values around each value (an odd number), and over fewer at both ends."""
    sums = [0.0, *accumulate(values)]
    half = window // 2
    edges = ((max(0, place - half), min(len(values), place + half + 1)) for place in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in edges]


def _draw(figure: "Figure", entries: Sequence[Mapping[str, Any]], title: str) -> None:
    panels = figure.subplots(3, 2, sharex=True)
    _draw_reward(panels[0][0], entries)
    _draw_accuracies(panels[0][1], entries)
    _draw_shares(panels[1][0], entries)
    _draw_lengths(panels[1][1], entries)
    _draw_two(panels[2][0], entries, _LOSS, _KL)
    _draw_two(panels[2][1], entries, _GRADIENT_NORM, _LEARNING_RATE)
    steps = sum(any(name != "step" and not name.startswith("valid_") for name in entry) for entry in entries)
    size = max(1, math.ceil(steps / _MOST))
    for axes in panels[-1]:
        axes.set_xlabel("step" if size == 1 else f"step (means of {size:,} steps)")
    first, last = float(entries[0]["step"]), float(entries[-1]["step"])
    margin = max(0.5, 0.02 * (last - first))
    edge = 0.01 * max(1.0, last - first)  # so that a mark at step 0 is whole
    panels[0][0].set_xlim(max(-edge, first - margin), last + margin)
    panels[0][0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if title:
        figure.suptitle(title)


def _draw_reward(axes: "Axes", entries: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("reward")
    for curve in _REWARDS:
        _draw_curve(axes, entries, curve)
    _draw_validation(axes, entries, "valid_reward", "reward, validation", BLUE)
    _finish(axes)


def _draw_accuracies(axes: "Axes", entries: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("accuracy")
    _draw_curve(axes, entries, _Curve("first_accuracy", "first answer", ORANGE))
    _draw_curve(axes, entries, _Curve("second_accuracy", "second answer", GREEN, "--"))
    _draw_validation(axes, entries, "valid_first_accuracy", "first, validation", ORANGE)
    _draw_validation(axes, entries, "valid_second_accuracy", "second, validation", GREEN)
    _draw_validation(axes, entries, "valid_auto_accuracy", "auto, validation", RED)
    _finish(axes, percent=True)


def _draw_shares(axes: "Axes", entries: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("confidence, think ratio, format")
    _draw_curve(axes, entries, _Curve("think_ratio", "think ratio", VIOLET))
    _draw_curve(axes, entries, _Curve("rewards/format/mean", "format", GRAY, ":"))
    _draw_validation(axes, entries, "valid_confidence", "confidence, validation", BLUE)
    _draw_validation(axes, entries, "valid_think_ratio", "think ratio, validation", VIOLET)
    _draw_validation(axes, entries, "valid_format", "format, validation", GRAY)
    _finish(axes, percent=True)


def _draw_lengths(axes: "Axes", entries: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("tokens of a completion")
    _draw_curve(axes, entries, _Curve("completions/mean_length", "mean", BLUE))
    _draw_curve(axes, entries, _Curve("completions/max_length", "longest", GRAY))
    _draw_validation(axes, entries, "valid_tokens", "mean, validation", BLUE)
    axes.set_ylim(bottom=0)
    _finish(axes)


def _draw_two(axes: "Axes", entries: Sequence[Mapping[str, Any]], left: _Curve, right: _Curve) -> None:
    """Draw two metrics of unlike size, the second with an axis at the right."""
    axes.set_title(f"{left.label} and {right.label}")
    right_axes = axes.twinx()
    right_axes.spines["right"].set_visible(True)
    right_axes.grid(False)
    for side, curve in ((axes, left), (right_axes, right)):
        _draw_curve(side, entries, curve)
        side.set_ylabel(curve.label if side.lines else f"{curve.label}: not recorded", color=curve.color)
        side.tick_params(axis="y", labelcolor=curve.color)
        side.ticklabel_format(axis="y", scilimits=(-3, 4))
        if not side.lines:
            side.set_yticks([])
        elif curve.name in _LEAST_SPAN:
            _widen(side, _line(entries, curve.name)[1], _LEAST_SPAN[curve.name])
    if left.name == "loss" and axes.lines:
        note = "0 on policy, whatever is learned: look at the reward" if _is_flat(_line(entries, "loss")[1]) else ""
        note += ("; " if note else "") + "steps that taught nothing have no KL" if _has_gaps(entries) else ""
        axes.text(0.02, 0.96, note, transform=axes.transAxes, va="top", fontsize=7.5, color=GRAY)
    if not axes.lines and not right_axes.lines:
        _say_nothing(axes)


def _draw_curve(axes: "Axes", entries: Sequence[Mapping[str, Any]], curve: _Curve) -> None:
    steps, values = thin(_line(entries, curve.name))
    if not steps:
        return
    if len(steps) <= _FEW or curve.name in _SMOOTH:
        mark = curve.marker if len(steps) <= _FEW else ""
        axes.plot(steps, values, curve.style, color=curve.color, linewidth=1.5, marker=mark, label=curve.label)
        return
    axes.plot(steps, values, color=curve.color, linewidth=0.6, alpha=0.3)
    window = max(3, len(values) // _WINDOWS | 1)
    axes.plot(steps, smooth(values, window), curve.style, color=curve.color, linewidth=1.6, label=curve.label)


def _draw_validation(axes: "Axes", entries: Sequence[Mapping[str, Any]], name: str, label: str, color: str) -> None:
    steps, values = thin(_line(entries, name))
    if steps:
        size = 6.0 if len(steps) <= _FEW else 3.0
        axes.plot(steps, values, ":o", color=color, linewidth=1, markersize=size, markeredgecolor="white", label=label)


def _finish(axes: "Axes", *, percent: bool = False) -> None:
    if percent:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    if axes.lines:
        axes.legend(fontsize=7.5, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.02))
    else:
        _say_nothing(axes)


def _widen(axes: "Axes", values: Sequence[float], least: float) -> None:
    """Give an axis a span that does not magnify values that are nearly 0; a KL is never negative."""
    low, high = min([*values, 0.0]), max([*values, 0.0])
    if high - low < least:
        axes.set_ylim(-least if low < 0.0 else -0.05 * least, least)


def _is_flat(values: Sequence[float]) -> bool:
    return all(abs(value) < _LEAST_SPAN["loss"] for value in values)


def _has_gaps(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some steps have a KL and some have none."""
    steps = [entry for entry in entries if _number(entry, "reward") is not None]
    known = sum(_number(entry, "kl") is not None for entry in steps)
    return 0 < known < len(steps)


def _say_nothing(axes: "Axes") -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=GRAY)


def _line(entries: Sequence[Mapping[str, Any]], name: str) -> Line:
    """Return steps and values of the entries that have a metric."""
    points = [(float(entry["step"]), value) for entry in entries if (value := _number(entry, name)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _number(entry: Mapping[str, Any], name: str) -> float | None:
    value = entry.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < _LARGEST else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
