"""Plots as files, PNG and SVG by the suffix, for slides and papers; needs matplotlib (extra `plot`).

What every plot of this package has in common: its colours, its frame, and files that come out the same every time. What
is drawn is said by the caller. Reports of an evaluation and the curves of a training are such plots.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvr.errors import ConfigError
from mlxvr.storage.atomic import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GRAY", "GREEN", "ORANGE", "RED", "VIOLET", "check_plot", "have_matplotlib", "write_plot"]

BLUE, ORANGE, RED, VIOLET, GREEN, GRAY = "#1f62c4", "#d9741a", "#c4361f", "#8a5cc2", "#2a8f5b", "#7a828c"

_METADATA: dict[str, dict[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None}}
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "mlxvr",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
}


def have_matplotlib() -> bool:
    """Whether plots can be written."""
    return find_spec("matplotlib") is not None


def check_plot(path: Path) -> None:
    """Raise `ConfigError` when no plot could be written to `path`, so that long work can ask before it begins."""
    if path.suffix.lower() not in _METADATA:
        raise ConfigError(f"{path} ends in {path.suffix or 'no suffix'!r}: plots are written as .png or .svg")
    if not have_matplotlib():
        raise ConfigError(f"{path} needs matplotlib, which is not installed: pip install 'mlxvr[plot]'")


def write_plot(draw: Callable[["Figure"], object], *paths: Path, size: tuple[float, float] = (6.0, 4.0)) -> None:
    """Draw a figure and write it to each path, in the format of its suffix; each file is replaced in one step.

    Args:
        draw: puts its axes and lines on an empty figure; called once.
        paths: that end in `.png` or `.svg`.
        size: in inches, (across, up); a PNG has 150 pixels an inch.

    Raises `ConfigError`: another suffix, no matplotlib, or a file that cannot be written.
    """
    for path in paths:
        check_plot(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        draw(figure)
        for path in paths:
            suffix = path.suffix.lower()
            replace_file(
                path,
                lambda out, s=suffix: figure.savefig(out, format=s[1:], metadata=_METADATA[s]),  # type: ignore[misc]
            )
