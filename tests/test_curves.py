"""The curves of a training run: what is drawn, read from the SVG, and the arithmetic of long runs."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from mlxvr.cli import plotting
from mlxvr.errors import ConfigError, DataError
from mlxvr.grpo.monitor import curves
from mlxvr.grpo.monitor.curves import check_plot, plot_curves, smooth, thin

STEP = (
    "loss",
    "kl",
    "reward",
    "rewards/first/mean",
    "rewards/second/mean",
    "rewards/format/mean",
    "rewards/fallback/mean",
    "first_accuracy",
    "second_accuracy",
)
STEP += ("think_ratio", "completions/mean_length", "completions/max_length", "grad_norm", "learning_rate")
VALID = (
    "first_accuracy",
    "second_accuracy",
    "auto_accuracy",
    "confidence",
    "think_ratio",
    "tokens",
    "format",
    "reward",
)


def entry(step, *, valid=False):
    found = {"step": step, **dict.fromkeys(STEP, step % 7 / 7)}
    return {**found, **{f"valid_{name}": 0.5 for name in VALID}} if valid else found


def texts(path):
    """Every text in an SVG."""
    return [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Plots entries and returns, for each panel by its title, the lines with a label: {label: (steps, figures)}."""
    pytest.importorskip("matplotlib")
    figures = []
    draw = curves._draw
    monkeypatch.setattr(curves, "_draw", lambda figure, *rest: (figures.append(figure), draw(figure, *rest)))

    def plot(entries):
        plot_curves(entries, tmp_path / "drawn.svg")
        titles = {axes.get_subplotspec(): axes.get_title() for axes in figures[-1].axes if axes.get_title()}
        panels = {title: {} for title in titles.values()}
        for axes in figures[-1].axes:
            lines = panels[titles[axes.get_subplotspec()]]  # a second axis lies on the first and has no title
            for line in axes.lines:
                if not line.get_label().startswith("_"):
                    lines[line.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
        return panels

    return plot


def test_every_figure_is_in_its_panel(drawn):
    entries = [{"step": 0, "valid_reward": 2.0, "valid_auto_accuracy": 0.25}]
    entries += [{**entry(step, valid=step == 3), "reward": 1.5 * step, "kl": step / 100} for step in range(1, 4)]
    panels = drawn(entries)
    assert {title: set(lines) for title, lines in panels.items()} == {
        "reward": {"reward", "first answer", "second answer", "format", "fallback", "reward, validation"},
        "accuracy": {
            "first answer",
            "second answer",
            "first, validation",
            "second, validation",
            "auto, validation",
        },
        "confidence, think ratio, format": {
            "think ratio",
            "format",
            "confidence, validation",
            "think ratio, validation",
            "format, validation",
        },
        "tokens of a completion": {"mean", "longest", "mean, validation"},
        "loss and KL to the reference": {"loss", "KL to the reference"},
        "gradient norm and learning rate": {"gradient norm", "learning rate"},
    }
    assert panels["reward"]["reward"] == ([1, 2, 3], [1.5, 3.0, 4.5])
    assert panels["reward"]["reward, validation"] == ([0, 3], [2.0, 0.5])
    assert panels["accuracy"]["auto, validation"] == ([0, 3], [0.25, 0.5])
    assert panels["loss and KL to the reference"]["KL to the reference"] == ([1, 2, 3], [0.01, 0.02, 0.03])


def test_rewards_without_labels(drawn):
    panels = drawn([{"step": 1, "reward": 1.0, "rewards/agreement/mean": 0.5, "rewards/coherence/mean": 0.25}])
    assert panels["reward"] == {"reward": ([1], [1.0]), "agreement": ([1], [0.5]), "coherence": ([1], [0.25])}


def test_nulls_are_passed_over(drawn):
    nothing = [None, math.nan, math.inf, -math.inf, "?", True, [1], 1e300]
    entries = [{"step": step, "reward": figure} for step, figure in enumerate([1.0, *nothing, 2.0])]
    assert drawn([*entries, {"reward": 9.0}])["reward"]["reward"] == ([0, 9], [1.0, 2.0])


def test_entries_are_put_in_order(drawn):
    assert drawn([{"step": 2, "reward": 2.0}, {"step": 1, "reward": 1.0}])["reward"]["reward"] == ([1, 2], [1.0, 2.0])


def test_a_long_run(drawn):
    panels = drawn([{"step": step, "reward": float(step % 2), "learning_rate": step} for step in range(1, 5001)])
    steps, figures = panels["reward"]["reward"]
    assert len(steps) == 1000
    assert steps[:2] == [3, 8]  # the middle of 1 to 5, of 6 to 10
    assert np.allclose(figures, 0.5, atol=0.05)
    assert panels["gradient norm and learning rate"]["learning rate"] == (steps, steps)


@pytest.mark.parametrize("count", [1, 2, 300])
def test_pictures(tmp_path, count):
    pytest.importorskip("matplotlib")
    entries = [entry(step, valid=step == 1) for step in range(1, count + 1)]
    for name in ("a/curves.png", "curves.SVG"):
        plot_curves(entries, tmp_path / name, title="run <1>")
    with Image.open(tmp_path / "a" / "curves.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (1950, 1350)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    found = texts(tmp_path / "curves.SVG")
    assert {"run <1>", "reward", "accuracy", "step", "KL to the reference"} <= set(found)
    assert "not recorded" not in found
    before = (tmp_path / "curves.SVG").read_bytes()
    plot_curves(entries, tmp_path / "curves.SVG", title="run <1>")
    assert (tmp_path / "curves.SVG").read_bytes() == before


def test_what_was_not_recorded_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    plot_curves([{"step": 0, "valid_reward": 1.0, "loss": None}], tmp_path / "x.svg")
    found = texts(tmp_path / "x.svg")
    assert found.count("not recorded") == 5
    assert "KL to the reference: not recorded" in found


def test_steps_are_whole_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    plot_curves([{"step": 7, "reward": 0.123}], tmp_path / "x.svg")
    assert "7" in texts(tmp_path / "x.svg")
    assert not [text for text in texts(tmp_path / "x.svg") if re.fullmatch(r"[678]\.\d+", text)]


def test_the_means_of_a_long_run_are_said(tmp_path):
    pytest.importorskip("matplotlib")
    plot_curves([{"step": step, "reward": 1.0} for step in range(1, 2002)], tmp_path / "x.svg")
    assert texts(tmp_path / "x.svg").count("step (means of 3 steps)") == 2


def test_there_must_be_something(tmp_path):
    for entries in ([], [{"reward": 1.0}], [{"step": None}]):
        with pytest.raises(DataError, match="no entry has a step"):
            plot_curves(entries, tmp_path / "x.png")


@pytest.mark.parametrize(("name", "said"), [("x.jpg", "'.jpg'"), ("x", "no suffix"), (".png", "no suffix")])
def test_other_suffixes(tmp_path, name, said):
    for call in (lambda: check_plot(tmp_path / name), lambda: plot_curves([entry(1)], tmp_path / name)):
        with pytest.raises(ConfigError, match=rf"ends in .*{re.escape(said)}.*\.png or \.svg"):
            call()
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(plotting, "find_spec", lambda _: None)
    for call in (lambda: check_plot(tmp_path / "x.png"), lambda: plot_curves([entry(1)], tmp_path / "x.png")):
        with pytest.raises(ConfigError, match=r"pip install 'mlxvr\[plot\]'"):
            call()


def test_a_folder_that_cannot_be(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        plot_curves([entry(1)], tmp_path / "file" / "x.png")


def test_thin():
    assert thin(([1, 2, 3], [4, 5, 6]), 3) == ([1, 2, 3], [4, 5, 6])
    assert thin(([1, 2, 3, 4, 5], [10, 20, 30, 40, 90]), 3) == ([1.5, 3.5, 5], [15, 35, 90])
    assert thin(([1, 2, 3], [4, 5, 9]), 1) == ([2], [6])
    assert thin(([], [])) == ([], [])
    for count in (999, 1000, 1001, 1999, 2001, 12_345):
        steps, figures = thin((list(range(count)), [1.0] * count))
        assert len(steps) == len(figures) <= 1000
        assert steps == sorted(steps)


@pytest.mark.parametrize("window", [1, 3, 7])
def test_smooth(window):
    figures = np.random.default_rng(0).normal(size=20).tolist()
    half = window // 2
    naive = [np.mean(figures[max(0, place - half) : place + half + 1]) for place in range(20)]
    assert smooth(figures, window) == pytest.approx(naive)
    assert smooth([], window) == []


def test_smooth_by_hand():
    assert smooth([1, 2, 6, 0], 3) == [1.5, 3.0, pytest.approx(8 / 3), 3.0]


def limits(tmp_path, monkeypatch, entries):
    """The axes of a plot by the label of their y axis or title."""
    pytest.importorskip("matplotlib")
    seen = []
    draw = curves._draw
    monkeypatch.setattr(curves, "_draw", lambda figure, *rest: (seen.append(figure), draw(figure, *rest)))
    plot_curves(entries, tmp_path / "x.svg")
    return {axes.get_ylabel() or axes.get_title(): axes for axes in seen[-1].axes}


def test_what_is_as_good_as_nothing_does_not_fill_its_axis(tmp_path, monkeypatch):
    """A loss that is 0 on policy and a KL of 1e-10; steps that were skipped have no KL, and it is said."""
    entries = [{"step": step, "reward": 1.0, "loss": 1e-8 * step, "kl": 1e-10 * step} for step in range(1, 4)]
    entries.append({"step": 4, "reward": 1.0, "loss": None, "kl": None})
    axes = limits(tmp_path, monkeypatch, entries)
    assert axes["KL to the reference"].get_ylim()[1] == pytest.approx(1e-4)
    assert axes["loss"].get_ylim()[1] == pytest.approx(1e-3)
    told = "0 on policy, whatever is learned: look at the reward; steps that taught nothing have no KL"
    assert told in texts(tmp_path / "x.svg")
    large = [{"step": step, "reward": 1.0, "loss": -0.5, "kl": 0.25 * step} for step in range(1, 4)]
    axes = limits(tmp_path, monkeypatch, large)
    assert axes["KL to the reference"].get_ylim()[1] > 0.75
    assert axes["loss"].get_ylim()[0] < -0.5
    assert not [text for text in texts(tmp_path / "x.svg") if text and ("on policy" in text or "taught" in text)]


def test_steps_begin_at_0(tmp_path, monkeypatch):
    """Four steps reach from 0 to 4, not from -1 to 5."""
    entries = [{"step": 0, "valid_reward": 1.0}, *({"step": step, "reward": 1.0} for step in range(1, 5))]
    left, right = limits(tmp_path, monkeypatch, entries)["reward"].get_xlim()
    assert -0.1 < left < 0
    assert 4 < right <= 4.5


def test_lines_that_coincide_can_be_told_apart(tmp_path, monkeypatch):
    entries = [
        {
            "step": step,
            "rewards/second/mean": 1.0,
            "rewards/format/mean": 1.0,
            "rewards/fallback/mean": 1.0,
            "rewards/first/mean": 1.0,
        }
        for step in range(1, 5)
    ]
    lines = limits(tmp_path, monkeypatch, entries)["reward"].lines
    assert len({line.get_linestyle() for line in lines if line.get_label() != "first answer"}) == 3


def test_a_legend_hides_no_line(tmp_path, monkeypatch):
    entries = [entry(step, valid=step == 3) for step in range(1, 9)]
    axes = limits(tmp_path, monkeypatch, entries)["accuracy"]
    axes.figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().y1 <= axes.get_window_extent().y0
