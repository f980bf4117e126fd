"""Progress: one bar on a terminal, and elsewhere a line now and then, of stages that take long."""

import io
import re
from types import SimpleNamespace

import pytest
from screen import Screen

from mlxvr.cli.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr("mlxvr.cli.progress.time", SimpleNamespace(monotonic=lambda: time.now))
    return time


def test_a_long_stage_writes_a_line_every_half_minute(clock):
    out = io.StringIO()
    with ProgressBar(out) as bar:
        for second in range(100):
            clock.now = 100.0 + second
            bar("convert", second, 200)
    assert out.getvalue() == "convert: 15%\nconvert: 30%\nconvert: 45%\n"


def test_short_stages_write_nothing(clock):
    out = io.StringIO()
    with ProgressBar(out) as bar:
        for number in range(20):
            clock.now += 20
            bar(f"stage {number}", 0, 10)
            clock.now += 5
            bar(f"stage {number}", 10, 10)
    assert out.getvalue() == ""


def test_a_stage_whose_size_is_not_known_writes_nothing(clock):
    out = io.StringIO()
    with ProgressBar(out) as bar:
        for _ in range(5):
            bar("download", 0, 0)
            clock.now += 60
    assert out.getvalue() == ""


@pytest.fixture
def terminal(monkeypatch):
    for name in ("CI", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "24")


def plain(text):
    return re.sub(r"\x1b\[\??[\d;]*[a-zA-Z]", "", text)


def test_a_terminal_shows_one_bar_and_none_at_the_end(terminal):
    out = Screen()
    with ProgressBar(out) as bar:
        bar("evaluate", 3, 12)
        bar.note("row a\x1b[2J, peak 1 MB")
        bar("evaluate", 6, 12)
        bar._bar.refresh()
        drawn = re.split(r"[\r\n]", plain(out.getvalue()))[-1]
        assert re.match(r"evaluate ━+╺?━* +50% +6/12 rows 0:00:00 left .* row a +.2J, peak 1 MB", drawn), drawn
        assert "\x1b[2J" not in out.getvalue()
        bar("convert", 10**9, 4 * 10**9)
        drawn = re.split(r"[\r\n]", plain(out.getvalue()))[-1]
        assert "1.0/4.0 GB" in drawn
        assert "evaluate" not in drawn
        bar("convert", 4 * 10**9, 4 * 10**9)
    assert out.lines(120) == []
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l")


@pytest.mark.parametrize("name", ["TERM", "CI"])
def test_terminals_that_are_not_watched_get_lines(terminal, monkeypatch, clock, name):
    monkeypatch.setenv(name, {"TERM": "dumb", "CI": "true"}[name])
    out = Screen()
    with ProgressBar(out) as bar:
        bar("convert", 0, 10)
        clock.now += 31
        bar("convert", 5, 10)
    assert out.getvalue() == "convert: 50%\n"


def test_no_color(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = Screen()
    with ProgressBar(out) as bar:
        bar("convert", 1, 10)
    assert "convert" in out.getvalue()
    assert not re.search(r"\x1b\[[\d;]*m", out.getvalue())


@pytest.mark.parametrize("columns", [1, 10, 30, 60])
def test_a_narrow_terminal_has_one_line(terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Screen()
    with ProgressBar(out) as bar:
        bar("sensitivity", 1, 10)
        bar._bar.refresh()
        lines = re.split(r"[\r\n]", plain(out.getvalue()))
        assert max(len(line) for line in lines) <= columns
        assert "\n" not in out.getvalue()


def test_a_terminal_that_is_gone_does_not_end_the_work(terminal):
    class Gone(Screen):
        def write(self, _):
            raise OSError(5, "Input/output error")

    with ProgressBar(Gone()) as bar:
        bar("convert", 1, 10)
        bar("convert", 2, 10)
