r"""Formulas: which are equal, what is cut off by its processor time, and what happens to the process that computes.

Most tests put a stand-in for `math-verify` before it: a module that sleeps, fails or dies as its formula says. So they
run where the package is not installed; what the real one finds equal is tried where it is.
"""

import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from mlxvr.errors import ConfigError
from mlxvr.grading import math_equality
from mlxvr.grading.reward import score

ROOT = Path(__file__).parents[1]
STAND_IN = """
import os, time
from pathlib import Path

def parse(text, parsing_timeout):
    assert parsing_timeout is None, "its own limit needs signals, which reach the main thread alone"
    if text.startswith("sleep "):
        time.sleep(float(text.split()[1]))
    if text.startswith("spin "):
        end = time.process_time() + float(text.split()[1])
        while time.process_time() < end:
            pass
    if text.startswith("say "):
        print("True")
    if text.startswith("fail"):
        raise RecursionError
    if text.startswith("exit"):
        os._exit(1)
    if text.startswith("count "):
        with open(text.split()[1], "a") as file:
            file.write("x")
    return text.split()[-1:]

def verify(gold, said, timeout_seconds):
    assert timeout_seconds is None
    return gold == said
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "math_verify.py").write_text(STAND_IN, encoding="utf-8")
    return folder


@pytest.fixture
def fake(stand_in, monkeypatch):
    """The module, with a process of its own that asks the stand-in."""
    monkeypatch.syspath_prepend(str(stand_in))
    worker = math_equality._VerifierProcess()
    monkeypatch.setattr(math_equality, "_ask", worker.ask)
    yield math_equality
    worker.stop()


# ---- the package itself


@pytest.fixture(scope="module")
def installed():
    pytest.importorskip("math_verify")


EQUAL = [
    ("1/2", "0.5"),
    ("0.50", "1/2"),
    ("50%", "0.5"),
    ("1,000", "1000"),
    ("-3", "-3.0"),
    ("$x+1$", "$1+x$"),
    (r"$\frac{1}{2}$", "0.5"),
    (r"$\sqrt{8}$", r"$2\sqrt{2}$"),
    (r"$\frac{\sqrt{3}}{2}$", r"$\sqrt{\frac{3}{4}}$"),
    (r"$(x+1)^2$", r"$x^2+2x+1$"),
    (r"$\sin^2(x)+\cos^2(x)$", "$1$"),
    (r"\boxed{\frac{3}{6}}", "$1/2$"),
    (r"$\{1, 2\}$", r"$\{2, 1\}$"),
    ("$10!$", "3628800"),
]
UNEQUAL = [
    ("1/3", "0.5"),
    ("3", "-3"),
    ("$x+1$", "$x+2$"),
    (r"$\sqrt{8}$", r"$3\sqrt{2}$"),
    ("$(1, 2)$", "$(2, 1)$"),
    ("$x$", "$y$"),
    (r"$\frac{1}{$", "$1$"),
    ("hello", "hello"),  # no formula
    ("", "1"),
    ("\u2028{}\n$", "1"),
]


@pytest.mark.parametrize(("answer", "truth", "equal"), [(*c, True) for c in EQUAL] + [(*c, False) for c in UNEQUAL])
def test_formulas(installed, answer, truth, equal):
    assert math_equality.are_equal(answer, truth, seconds=30) is equal


def test_a_formula_that_never_ends_is_cut_off(installed):
    """Sympy computes this power in code that no signal interrupts; the next question is answered all the same."""
    math_equality.are_equal("1", "1", seconds=30)  # the process is there
    begin = time.monotonic()
    assert math_equality.are_equal("$9^{9^{9^9}}$", "$1$", seconds=1.0) is False
    assert 0.9 < time.monotonic() - begin < 10
    assert math_equality.are_equal("$2x$", "$x+x$", seconds=30) is True


# ---- the process


def test_answers_and_failures(fake):
    assert fake.are_equal("7", "7") is True
    assert fake.are_equal("8", "7") is False
    process = fake._ask.__self__._process
    for bad in ("fail 7", "exit 7"):
        assert fake._ask.__self__._process is process, "a failure costs no new start"
        assert fake.are_equal(bad, "7") is False
        assert fake.are_equal("7", "7") is True, "the next one is answered"
    assert fake._ask.__self__._process is not process


def test_the_limit_is_for_each_question(fake):
    fake.are_equal("1", "1")  # the process is there
    begin = time.monotonic()
    assert fake.are_equal("spin 60 7", "7", seconds=0.3) is False
    assert 0.25 < time.monotonic() - begin < 30
    assert fake.are_equal("7", "7") is True
    assert [fake.are_equal("spin 0.2 7", "7", seconds=0.3) for _ in range(3)] == [True] * 3, "0.6 s in all"


def test_the_clock_on_the_wall_does_not_count(fake):
    """A machine that is busy with something else makes no right answer wrong; waiting stands for it here."""
    assert fake.are_equal("sleep 0.6 7", "7", seconds=0.2) is True


def test_what_was_cut_off_is_asked_again(stand_in):
    """It is wrong that once; the answers around it are remembered."""
    code = """
    from mlxvr.grading import math_equality
    print(are_equal("spin 9 7", "7", seconds=0.1))
    print(are_equal("spin 0.01 7", "7", seconds=0.1), are_equal("spin 9 7", "7", seconds=0.1))
    print(math_equality._ask.cache_info().misses, math_equality._ask.cache_info().currsize)
    """
    assert run(stand_in, code) == "False\nTrue False\n3 1\n"


def test_a_process_that_stands_still_is_no_wrong_answer(fake, monkeypatch):
    monkeypatch.setattr(math_equality, "_STALLED_SECONDS", 0.2)
    with pytest.raises(ConfigError, match="math-verify gave no answer in 0 s"):
        fake.are_equal("sleep 60 7", "7", seconds=5)
    monkeypatch.setattr(math_equality, "_STALLED_SECONDS", 60)
    assert fake.are_equal("7", "7") is True


def test_what_a_formula_prints_is_no_answer(fake):
    assert fake.are_equal("say 8", "7") is False
    assert fake.are_equal("8", "7") is False
    assert fake.are_equal("7", "7") is True


def test_a_process_that_was_killed_is_started_anew(fake):
    worker = fake._ask.__self__
    fake.are_equal("1", "1")
    worker._process.kill()
    worker._process.wait()
    assert fake.are_equal("7", "7") is True


def test_beside_the_main_thread(fake):
    """Many threads at once, each with its own answer."""
    verdicts = {}

    def ask(number):
        verdicts[number] = fake.are_equal(f"sleep 0.01 {number}", str(number // 2 * 2))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {number: number % 2 == 0 for number in range(12)}


def test_texts_that_are_too_long_are_not_asked(fake, tmp_path):
    log = tmp_path / "log"
    assert fake.are_equal(f"count {log} {'7' * 2000}", "7") is False
    assert not log.exists()


def test_the_same_question_is_asked_once(stand_in, tmp_path):
    log = tmp_path / "log"
    assert run(stand_in, f"print([are_equal('count {log} 7', '7') for _ in range(3)])") == "[True, True, True]\n"
    assert log.read_text() == "x"


def run(stand_in, code, **options):
    """Run a script with the stand-in in place; what it printed."""
    script = "from mlxvr.grading.math_equality import are_equal\n" + textwrap.dedent(code)
    paths = os.pathsep.join(map(str, (stand_in, ROOT)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert (done.returncode, done.stderr) == (0, ""), "nothing is left running or open"
    return done.stdout


def test_where_python_finds_modules_the_process_does_too(stand_in, tmp_path):
    """Also by the empty entry, which is the working directory."""
    (tmp_path / "math_verify.py").symlink_to(stand_in / "math_verify.py")
    code = "import sys; assert sys.path[0] == ''; print(are_equal('word', 'word'))"
    assert run(ROOT, code, cwd=tmp_path) == "True\n"


@pytest.mark.parametrize(
    ("asks", "end"),
    [
        ("are_equal('1', '1')", "pass"),
        ("are_equal('1', '1')", "os._exit(0)"),  # as if killed: nothing is tidied up
        ("are_equal('1', '1'); threading.Thread(target=are_equal, args=('spin 60 7', '7'), kwargs={'seconds': 1}, "
         "daemon=True).start(); time.sleep(0.3)", "os._exit(0)"),
    ],
)  # fmt: skip
def test_it_ends_with_the_program(stand_in, asks, end):
    """However the program ends, and whatever is being computed."""
    code = f"""
    import os, threading, time
    from mlxvr.grading import math_equality
    {asks}
    print(math_equality._PROCESS._process.pid, flush=True)
    {end}
    """
    assert not alive(int(run(stand_in, code)))


def alive(pid, seconds=5.0):
    """Whether a process still runs after a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return False  # nobody has collected it
        time.sleep(0.02)
    return True


def test_ctrl_c_is_not_for_it(stand_in):
    """The trainer finishes its step on Ctrl-C, which the terminal sends to every process of the group."""
    code = """
    import os, signal, threading
    signal.signal(signal.SIGINT, lambda *_: None)
    are_equal("1", "1")
    threading.Timer(0.3, os.killpg, (0, signal.SIGINT)).start()
    print(are_equal("sleep 1 7", "7"))
    """
    assert run(stand_in, code, start_new_session=True) == "True\n"


def test_a_package_that_does_not_start(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="is installed but does not start"):
        math_equality._VerifierProcess().ask("1", "1", 5.0)


# ---- without the package


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_absence_is_an_error_for_rows_that_need_it_only(absent):
    assert not math_equality.is_available()
    for ask in (
        math_equality.require,
        lambda: math_equality.are_equal("1", "1"),
        lambda: score(r"\boxed{1}", "1", "math"),
    ):
        with pytest.raises(ConfigError, match=r"math-verify: pip install 'mlxvr\[math\]'"):
            ask()
    completion = r"\boxed{A}<think>r</think>\boxed{A}"
    assert score(completion, "A").total == pytest.approx(3.0)
    assert score(r"\boxed{[1, 2]}", [1, 2], "iou").second == 1
    assert score(r"\boxed{A <> [1, 2]}", ["A", [[1, 2]]], "gqa").second == 2
