"""Compare two formulas with the package `math-verify` (extra `math`), within a limit of processor time.

A model may write any formula, and some take for ever to compute, in code that no signal interrupts (`9^{9^{9^9}}`).
Besides, signals reach only the main thread, and training need not run there. So another Python process computes. It is
stopped when its time is up, started again when it is next needed, and ends with this process.

The limit is processor time, which the operating system counts, not wall-clock time: other work on the machine makes no
right answer wrong. A comparison that is cut off counts as unequal, and the result is not cached. So a formula is judged
the same in each run, unless it takes about as long as the limit, or the machine has another speed.
"""

import atexit
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache

from mlxvr.errors import ConfigError

__all__ = ["are_equal", "is_available", "require"]

_LIMIT_SECONDS = 5.0  # of processor time, as math-verify itself allows for one step
_STALLED_SECONDS = 600.0  # of wall-clock time; a process that has not answered by then is not busy with a formula
_START_SECONDS = 60.0  # the process imports sympy, on a machine that may be busy
_LONGEST = 2_000  # characters; a longer text is not a formula worth comparing
_CACHE_SIZE = 4_096  # results: a group's completions repeat the same few answers


def is_available() -> bool:
    """Return whether `math-verify` is installed."""
    return importlib.util.find_spec("math_verify") is not None


def require() -> None:
    """Raise `ConfigError` if `math-verify` is not installed."""
    if not is_available():
        raise ConfigError("questions of kind math need the package math-verify: pip install 'mlxvr[math]'")


def are_equal(answer: str, truth: str, *, seconds: float = _LIMIT_SECONDS) -> bool:
    r"""Return whether an answer equals the true one; False also if that cannot be computed in time, or at all.

    Args:
        answer, truth: in the form that `math_verify.parse` takes: numbers, fractions and percentages as they are,
            formulas in `$..$` or `\boxed{..}`. (Of other text it takes the last number.)
        seconds: the limit of processor time for parsing and comparing both.

    Raises `ConfigError` if `math-verify` is not installed, does not start, or gets no processor time for minutes.
    """
    require()
    if max(len(answer), len(truth)) > _LONGEST:
        return False
    with _LOCK:
        try:
            return _ask(answer, truth, seconds)
        except _CutOff:
            return False


class _CutOff(Exception):
    """The process ended before it answered: its time was up, or the formula crashed it."""


class _VerifierProcess:
    """The process that compares formulas: it reads a line of JSON for each and writes a line."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask(self, answer: str, truth: str, seconds: float) -> bool:
        process = self._process
        if process is None or process.poll() is not None:
            self.stop()
            process = self._start()
        assert process.stdin is not None, "it was opened with a pipe"
        try:
            process.stdin.write(json.dumps([answer, truth, seconds]) + "\n")
            process.stdin.flush()
            reply = self._lines.get(timeout=_STALLED_SECONDS)
        except queue.Empty:
            self.stop()
            raise ConfigError(
                f"math-verify gave no answer in {_STALLED_SECONDS:.0f} s: is the machine suspended, or out of memory?"
            ) from None
        except OSError:
            reply = ""
        if not reply:
            self.stop()
            raise _CutOff
        return reply == "True\n"

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        assert process.stdin is not None, "it was opened with a pipe"
        with suppress(OSError):  # the pipe is broken: unsent bytes are lost with the process
            process.stdin.close()

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            process_group=0,  # Ctrl-C then reaches the main program alone, which may want to finish its step
        )
        self._process, self._lines = process, queue.SimpleQueue()
        threading.Thread(target=_read, args=(process, self._lines), daemon=True).start()
        try:
            ready = self._lines.get(timeout=_START_SECONDS)
        except queue.Empty:
            ready = ""
        if not ready:
            self.stop()
            raise ConfigError("math-verify is installed but does not start: run `import math_verify` to see the reason")
        return process


def _read(process: "subprocess.Popen[str]", lines: "queue.SimpleQueue[str]") -> None:
    """Pass on the lines that the process writes, and an empty one when it has ended."""
    assert process.stdout is not None, "it was opened with a pipe"
    with process.stdout as stream:
        for line in stream:
            lines.put(line)
    lines.put("")


_PROCESS = _VerifierProcess()
_LOCK = threading.Lock()
_ask = lru_cache(_CACHE_SIZE)(_PROCESS.ask)
atexit.register(_PROCESS.stop)


def _serve() -> None:
    """Compare formulas until the input ends; this runs in the other process."""
    import faulthandler
    import signal

    import math_verify

    replies, sys.stdout = sys.stdout, sys.stderr
    math_verify.verify(math_verify.parse("$1$", parsing_timeout=None), [], timeout_seconds=None)  # loads all of sympy
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, truth, seconds = json.loads(line)
        # The system counts the processor time and ends the process by a signal that is not handled, whatever is being
        # computed. If the process hangs and its parent is gone, the watchdog thread of faulthandler ends it.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        faulthandler.dump_traceback_later(_STALLED_SECONDS, exit=True)
        try:
            gold, target = (math_verify.parse(text, parsing_timeout=None) for text in (truth, answer))
            equal = bool(math_verify.verify(gold, target, timeout_seconds=None))
        except Exception:  # a formula that math-verify cannot handle: anything from SympifyError to RecursionError
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        faulthandler.cancel_dump_traceback_later()
        print(equal, file=replies, flush=True)


if __name__ == "__main__":
    _serve()
