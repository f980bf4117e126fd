"""The live view of a training run: what a terminal shows of it."""

import io
import os
import re
import threading
import time

import numpy as np
import pytest
from screen import Screen

from mlxvr.grpo.monitor.live_view import LiveView, duration, sparkline

STEP = {
    "step": 1,
    "loss": 0.01,
    "kl": 0.00123,
    "reward": 1.734,
    "reward_std": 0.41,
    "rewards/format/mean": 0.991,
    "first_accuracy": 0.5,
    "second_accuracy": 0.7125,
    "think_ratio": 0.62,
    "completions/mean_length": 143.4,
    "completions/max_length": 1256,
    "grad_norm": 0.53,
    "learning_rate": 1e-5,
    "tokens_per_second": 812.2,
    "peak_memory": 14.2e9,
}
VALID = {
    "step": 20,
    "valid_first_accuracy": 0.51,
    "valid_second_accuracy": 0.69,
    "valid_auto_accuracy": 0.68,
    "valid_confidence": 0.8125,
    "valid_think_ratio": 0.55,
    "valid_tokens": 131,
    "valid_format": 1.0,
    "valid_reward": 2.1,
    "valid_rows": 300,
}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds, as a list of one; and a terminal of 100 columns without settings of the user's."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for name in ("CI", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    return now


def test_a_terminal_shows_every_figure_once(clock):
    screen = Screen()
    with LiveView(200, screen) as view:
        view.update({**VALID, "step": 0})
        for step in range(1, 51):
            clock[0] += 12
            view.update({**STEP, "step": step, "reward": 1 + step / 50})
        view.update({**STEP, **VALID, "step": 51, "reward": 1.5})
    lines = screen.lines(100)
    history = re.fullmatch("reward 1.500  ([▁-█]{32})  spread in a group 0.410", lines.pop(1))[1]
    assert list(history[:-1]) == sorted(history[:-1])
    assert (history[0], history[-2], history[-1]) == ("▁", "█", "▇")  # the last is the mean of 2.0 and 1.5: 7 of 8 high
    assert lines == [
        "step 51 of 200  ━━━━━━╺━━━━━━━━━━━━━━━━━  26%  elapsed 10:00  left 29:13",  # 600 s / 51 * 149
        "first 50.0%  second 71.2%  think 62.0%  format 99.1%",
        "kl 0.00123  grad norm 0.53  learning rate 1e-05",
        "tokens 143  longest 1,256  tokens/s 812  memory 14.2 GB",
        "validation at 51:  first 51.0%  second 69.0%   auto 68.0%    confidence 0.812",
        "think 55.0%        tokens 131   format 100.0%  reward 2.100  best reward 2.100 at 51",
    ]


def test_notes_stay_above_the_view():
    screen = Screen()
    view = LiveView(10, screen)
    view.note("a note before the first step")
    view.update(STEP)
    view.note("saved\nat step 1 \x1b[2J")
    view.update({**STEP, "step": 2})
    lines = screen.lines(100)
    assert lines[:3] == ["a note before the first step", "saved", "at step 1  [2J"]
    assert lines[3].startswith("step 2 of 10  ")
    assert len(lines) == 3 + 5


@pytest.mark.parametrize("columns", [1, 7, 20, 33, 60, 80, 100, 250])
@pytest.mark.parametrize("rows", [2, 5, 50])
def test_the_view_fits_its_terminal(monkeypatch, columns, rows):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(rows))
    screen = Screen()
    view = LiveView(123_456, screen)
    for step in range(1, 40):
        view.update({**STEP, **VALID, "step": step})
    written = re.split(r"[\r\n]", re.sub(r"\x1b\[\??[\d;]*[a-zA-Z]", "", screen.getvalue()))
    assert max(len(line) for line in written) <= columns
    lines = screen.lines(columns)
    assert len(lines) <= rows
    if columns >= 20 and rows == 50:
        assert lines[0].startswith("step 39 of 123,456")
        shown = " ".join(" ".join(lines).split())
        for figure in ("50.0%", "71.2%", "62.0%", "99.1%", "1e-05", "812", "14.2 GB", "51.0%", "0.812", "2.100"):
            assert figure in shown


def test_a_narrower_terminal_is_cleared_as_a_whole(monkeypatch):
    """Lines of 80 columns take two rows each on a terminal of 50: a row left behind would show the old step."""
    screen = Screen()
    view = LiveView(200, screen)
    view.update(STEP)
    height = [len(line) for line in screen.lines(100)]
    monkeypatch.setenv("COLUMNS", "50")
    before = len(screen.getvalue())
    view.update({**STEP, "step": 2})
    cleared = re.match(r"(\r|\x1b\[2K|\x1b\[1A)*", screen.getvalue()[before:])[0]
    rows = sum(-(-length // 50) for length in height)
    assert cleared.count("\x1b[1A") == rows - 1 > len(height) - 1  # the cursor is in the last of them
    assert screen.getvalue()[before + len(cleared) :].startswith("\x1b[2mstep\x1b[0m 2 of 200")


def test_elsewhere_there_is_a_plain_line_for_every_entry(clock):
    out = io.StringIO()
    with LiveView(200, out) as view:
        view.update({**VALID, "step": 0})
        clock[0] += 10
        view.update(STEP)
        view.note("saved run/best")
        clock[0] += 30
        view.update({**STEP, **VALID, "step": 2})
    figures = (
        "reward 1.734  spread in a group 0.410  first 50.0%  second 71.2%  think 62.0%  format 99.1%  kl 0.00123  "
        "grad norm 0.53  learning rate 1e-05  tokens 143  longest 1,256  tokens/s 812  memory 14.2 GB"
    )
    valid = (
        "first 51.0%  second 69.0%  auto 68.0%  confidence 0.812  think 55.0%  tokens 131  format 100.0%  reward 2.100"
    )
    assert out.getvalue().splitlines() == [
        f"validation at 0:  {valid}",
        f"step 1/200  {figures}  left 33:10",
        "saved run/best",
        f"step 2/200  {figures}  left 1:06:00  validation at 2:  {valid}  best reward 2.100 at 2",
    ]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen()
    LiveView(10, screen).update(STEP)
    assert "\x1b" not in screen.getvalue()


def test_no_color(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen()
    LiveView(10, screen).update(STEP)
    assert not re.search(r"\x1b\[[\d;]*m", screen.getvalue())
    monkeypatch.delenv("NO_COLOR")
    other = Screen()
    LiveView(10, other).update(STEP)
    assert "\x1b[2mreward\x1b[0m" in other.getvalue()
    assert other.lines(100)[1:] == screen.lines(100)[1:]
    assert "━" * 2 + " " in screen.lines(100)[0]  # what is left of the bar would look like what is done


@pytest.mark.parametrize("kind", [Screen, io.StringIO])
@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"step": None},
        {"step": 1},
        {"step": 1, "reward": None, "kl": float("nan"), "loss": float("inf")},
        dict.fromkeys({**STEP, **VALID}),
        dict.fromkeys({**STEP, **VALID}, "?"),
        dict.fromkeys({**STEP, **VALID}, 1e308),
        dict.fromkeys({**STEP, **VALID}, -(10**400)),
        {name: [1] for name in {**STEP, **VALID}},
        {name: np.float32(1) for name in {**STEP, **VALID}},
        {**STEP, "step": 10**9},
        {**STEP, "step": -5},
        {5: 1, "step": 1},
    ],
    ids=range(13),
)
@pytest.mark.parametrize("total", [0, 10])
def test_odd_entries_do_not_end_a_run(kind, entry, total):
    out = kind()
    with LiveView(total, out) as view:
        for one in (entry, STEP, entry, {**STEP, "reward": 1e308}, VALID, entry):
            view.update(one)
        view.note("")
    for word in ("nan", "inf", "None"):
        assert word not in out.getvalue()


def test_figures_that_are_missing_are_left_out():
    out = io.StringIO()
    LiveView(10, out).update({"step": 3, "reward": 1.5, "kl": None, "grad_norm": float("nan")})
    assert out.getvalue() == "step 3/10  reward 1.500  left 0:00\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_ascii_where_blocks_cannot_be_shown(encoding):
    screen = Screen()
    screen.encoding = encoding
    view = LiveView(10, screen)
    view.note("ready ✓")
    for step in range(1, 6):
        view.update({**STEP, "step": step, "reward": step})
    screen.getvalue().encode(encoding)
    note, head, reward, *_ = screen.lines(100)
    shown = ("✓", "━" * 12 + "╺" + "━" * 11, "▁▃▅▇█") if encoding == "utf-8" else ("?", "-" * 12, "_-=*#")
    assert (note[-1], head.split()[4], reward.split()[2]) == shown


def test_a_terminal_that_is_gone_does_not_end_a_run():
    class Gone(Screen):
        def write(self, _):
            raise OSError(5, "Input/output error")

    for out in (Gone(), io.StringIO()):
        view = LiveView(10, out)
        if not isinstance(out, Gone):
            out.close()
        view.update(STEP)  # none of these raises, which would end the run
        view.note("x")
        view.close()


def test_nothing_is_shown_after_the_end():
    screen = Screen()
    view = LiveView(10, screen)
    view.update(STEP)
    view.close()
    view.close()
    before = screen.getvalue()
    view.update(STEP)
    view.note("x")
    assert screen.getvalue() == before


def test_a_run_that_goes_on_times_its_own_steps(clock):
    screen = Screen()
    earlier = [{**STEP, "step": step, "reward": 1.0} for step in range(1, 101)] + [{**VALID, "step": 100}]
    view = LiveView(110, screen, history=earlier)
    clock[0] += 6
    view.update({**STEP, "step": 101, "reward": 3.0})
    lines = screen.lines(100)
    assert lines[0].endswith("92%  elapsed 0:06  left 0:54")  # 9 steps of 6 s
    assert lines[1][14:46] == "▁" * 31 + "█"
    assert lines[-2].startswith("validation at 100:  first 51.0%")


def test_the_first_step_counts_where_the_view_begins_with_it(clock):
    """It was made in 60 s before there was a view; two more of 60 s are left, and then one."""
    screen = Screen()
    view = LiveView(3, screen)
    seconds = {"rollout_seconds": 50.0, "update_seconds": 10.0}
    view.update({**STEP, **seconds})
    assert "elapsed 1:00  left 2:00" in screen.lines(100)[0]
    clock[0] += 60
    view.update({**STEP, **seconds, "step": 2})
    assert "elapsed 2:00  left 1:00" in screen.lines(100)[0]


def test_memory_has_the_units_of_the_estimate():
    screen = Screen()
    LiveView(3, screen).update({**STEP, "peak_memory": 188_990_102})
    assert "memory 189 MB" in "".join(screen.lines(100))


def test_the_size_of_a_real_terminal_is_asked():
    import fcntl
    import struct
    import termios

    main, side = os.openpty()
    try:
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 40, 0, 0))
        with os.fdopen(side, "w", encoding="utf-8") as out:
            LiveView(200, out).update(STEP)
            shown = ""
            while "memory" not in shown:
                shown += os.read(main, 10_000).decode()
    finally:
        os.close(main)
    widths = [len(line) for line in re.split(r"[\r\n]", re.sub(r"\x1b\[\??[\d;]*[a-zA-Z]", "", shown))]
    assert 30 <= max(widths) <= 40


def test_sparkline():
    assert sparkline([], 10) == sparkline([1.0], 10) == sparkline([1.0, 2.0], 0) == ""
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 4) == "▁▃▆█"  # 0.5, 2.5, 4.5, 6.5
    assert sparkline([3.0, 3.0, 3.0], 8) == "▅▅▅"
    assert sparkline([-1, 1], 8, "ab") == "ab"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (751, "12:31"), (11_112, "3:05:12"), (187_512, "2d 4:05:12")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_time_goes_on_between_entries(clock):
    """What was left after the last step counts down, and what the run is doing now is said."""
    screen = Screen()
    view = LiveView(10, screen)
    view.update({**STEP, "rollout_seconds": 15.0, "update_seconds": 5.0})
    clock[0] += 61
    view.work("sample", 1, 4)
    head = screen.lines(100)[0]
    assert "elapsed 1:21  left 1:59  sampling 2 of 4" in head  # 20 s a step, 9 of them left, 61 s gone by
    view.work("learn", 0, 1)
    assert screen.lines(100)[0].endswith("learning")
    view.work("validate", 3, 3)
    assert screen.lines(100)[0].endswith("validating 3 of 3")
    clock[0] += 19
    view.update({**STEP, "step": 2})
    assert "elapsed 1:40  left 6:40" in screen.lines(100)[0]
    assert "validating" not in screen.lines(100)[0]
    view.close()
    assert len(screen.lines(100)) == 5


def test_a_thread_draws_the_view_anew(clock):
    """It ends with the view; elsewhere than on a terminal there is none."""
    before = threading.active_count()
    plain = io.StringIO()
    assert LiveView(10, plain, refresh_seconds=0.01) is not None
    assert threading.active_count() == before
    screen = Screen()
    view = LiveView(10, screen, refresh_seconds=0.01)
    view.update(STEP)
    clock[0] += 3600
    ends = time.perf_counter() + 10
    while "elapsed 1:00:00" not in screen.lines(100)[0] and time.perf_counter() < ends:
        threading.Event().wait(0.01)
    assert "elapsed 1:00:00" in screen.lines(100)[0]
    view.close()
    ends = time.perf_counter() + 10
    while threading.active_count() > before and time.perf_counter() < ends:
        threading.Event().wait(0.01)
    assert threading.active_count() == before


def test_completions_that_were_cut_off_are_shown():
    """With a limit of 16 tokens all were, and nothing said so."""
    screen, plain = Screen(), io.StringIO()
    LiveView(10, screen).update({**STEP, "completions/clipped_ratio": 1.0})
    assert "truncated 100.0%" in " ".join(screen.lines(100))
    view = LiveView(10, plain)
    view.update({**STEP, "completions/clipped_ratio": 0.25})
    view.update({**STEP, "step": 2, "completions/clipped_ratio": 0.0})
    first, second = plain.getvalue().splitlines()
    assert "truncated 25.0%" in first
    assert "truncated 0.0%" in second


def test_best_is_the_highest_validation_reward():
    """As the trainer keeps it: the first of equals, and not what there was before training."""
    screen = Screen()
    earlier = [{"step": 0, "valid_reward": 9.0}, {**STEP, "step": 1, "valid_reward": 2.0}]
    view = LiveView(10, screen, history=earlier)
    view.update({**STEP, "step": 2, "valid_reward": 2.5})
    view.update({**STEP, "step": 3, "valid_reward": 2.5})
    view.update({**STEP, "step": 4, "valid_reward": 1.0})
    assert screen.lines(100)[-1] == "validation at 4:  reward 1.000  best reward 2.500 at 2"


def test_ci_gets_plain_lines(monkeypatch):
    for value, is_plain in (("true", True), ("1", True), ("", False), ("false", False)):
        monkeypatch.setenv("CI", value)
        screen = Screen()
        LiveView(10, screen).update(STEP)
        assert ("\x1b" not in screen.getvalue()) == is_plain


IN_A_TERMINAL = """
import sys, time, warnings
from mlxvr.grpo.monitor.live_view import LiveView
view = LiveView(10, refresh_seconds=0.25)
view.note("loaded")
view.update({"step": 1, "reward": 1.0, "rollout_seconds": 3.0, "kl": 0.001, "grad_norm": 0.5, "peak_memory": 1e9})
view.work("sample", 0, 4)
sys.stdin.readline()
print("a line of another library", file=sys.stderr)
view.note("saved")
view.update({"step": 2, "reward": 2.0})
view.close()
print("the result")
"""


def test_in_a_real_terminal():
    """A long step is redrawn by itself, also where the terminal becomes narrower; what others write stays above."""
    import fcntl
    import pty
    import select
    import signal
    import struct
    import subprocess
    import sys
    import termios

    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "COLUMNS", "LINES")}
    screen = Screen()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL],
        stdin=subprocess.PIPE,
        stdout=side,
        stderr=side,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(side)

    def read_until(*texts):
        ends = time.perf_counter() + 60
        while not all(text in screen.getvalue() for text in texts):
            assert time.perf_counter() < ends, screen.getvalue()
            screen.write(os.read(main, 100_000).decode().replace("\r\n", "\n"))

    try:
        read_until("elapsed\x1b[0m 0:03", "elapsed\x1b[0m 0:04", "elapsed\x1b[0m 0:05", "sampling 1 of 4")
        wide = screen.lines(100)
        assert wide[0] == "loaded"
        assert wide[1].startswith("step 1 of 10  ━━╺━")
        assert len(wide) == 5
        process.send_signal(signal.SIGSTOP)  # so that nothing is drawn while the width changes
        os.waitpid(process.pid, os.WUNTRACED)
        while select.select([main], [], [], 0.2)[0]:
            screen.write(os.read(main, 100_000).decode().replace("\r\n", "\n"))
        fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 60, 0, 0))
        before, reflowed = len(screen.getvalue()), "\n".join(screen.lines(100))
        process.send_signal(signal.SIGCONT)
        while "sampling" not in screen.getvalue()[before:]:
            screen.write(os.read(main, 100_000).decode().replace("\r\n", "\n"))
        drawn = re.sub(r"\x1b\[\??[\d;]*[a-zA-Z]", "", screen.getvalue()[before:])
        assert max(len(line) for line in re.split(r"[\r\n]", drawn)) <= 60
        process.stdin.write(b"\n")
        process.stdin.flush()
        read_until("the result\n")
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        os.close(main)
    narrow = Screen()
    narrow.write(reflowed + screen.getvalue()[before:])
    lines = narrow.lines(60)
    assert lines[-1] == "the result"
    assert [line for line in lines if line in ("a line of another library", "saved", "loaded")] == [
        "loaded",
        "a line of another library",
        "saved",
    ]
    (head,) = [line for line in lines if line.startswith("step ")]
    assert head.startswith("step 2 of 10  ━━━━")
    assert screen.getvalue().rfind("\x1b[?25h") > screen.getvalue().rfind("\x1b[?25l")  # the cursor is there again
