"""Write plots as PNG or SVG files, by their suffix, for slides and papers; needs matplotlib (extra `plot`).

Here is what all plots of this package share: colours, axes, and files with the same bytes every time. The caller draws
the content: the figures of an evaluation's report, or the curves of a training run.
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
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_plot(path: Path) -> None:
    """Raise `ConfigError` if no plot can be written to `path`; call it before work that takes long."""
    if path.suffix.lower() not in _METADATA:
        raise ConfigError(f"{path} ends in {path.suffix or 'no suffix'!r}: plots are written as .png or .svg")
    if not have_matplotlib():
        raise ConfigError(f"{path} needs matplotlib, which is not installed: pip install 'mlxvr[plot]'")


def write_plot(draw: Callable[["Figure"], object], *paths: Path, size: tuple[float, float] = (6.0, 4.0)) -> None:
    """Draw a figure and write it to each path, in the format of its suffix; each file is replaced in one step.

    Args:
        draw: adds axes and lines to an empty figure; called once.
        paths: files that end in `.png` or `.svg`.
        size: (width, height) in inches; a PNG has 150 pixels an inch.

    Raises `ConfigError` for another suffix, without matplotlib, or if a file cannot be written.
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
