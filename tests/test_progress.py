"""Progress where there is no terminal: a line now and then, of stages that take long."""

import io
from types import SimpleNamespace

import pytest

from mlxvr.cli.progress import Bars


@pytest.fixture
def clock(monkeypatch):
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr("mlxvr.cli.progress.time", SimpleNamespace(monotonic=lambda: time.now))
    return time


def test_a_long_stage_writes_a_line_every_half_minute(clock):
    out = io.StringIO()
    with Bars(out) as bars:
        for second in range(100):
            clock.now = 100.0 + second
            bars("convert", second, 200)
    assert out.getvalue() == "convert: 15%\nconvert: 30%\nconvert: 45%\n"


def test_short_stages_write_nothing(clock):
    out = io.StringIO()
    with Bars(out) as bars:
        for number in range(20):
            clock.now += 20
            bars(f"stage {number}", 0, 10)
            clock.now += 5
            bars(f"stage {number}", 10, 10)
    assert out.getvalue() == ""


def test_a_stage_whose_size_is_not_known_writes_nothing(clock):
    out = io.StringIO()
    with Bars(out) as bars:
        for _ in range(5):
            bars("download", 0, 0)
            clock.now += 60
    assert out.getvalue() == ""
