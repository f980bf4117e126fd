"""Whether two formulas are equal, by the package `math-verify` (extra `math`), within a limit of processor time.

A formula can be anything that a model writes, and some of them are computed for ever, in code that no signal interrupts
(`9^{9^{9^9}}`); signals reach the main thread alone besides, and training need not run there. So another Python process
computes. It is stopped when the time is up, started anew when it is needed again, and ends with this one.

The limit is one of processor time, which the operating system counts, not of the clock on the wall: what else the
machine does makes no right answer wrong. What was cut off counts as unequal that once and is not remembered. So a
formula is judged alike in each run, except for one that takes just about the limit, or on a machine of another speed.
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

_LIMIT_SECONDS = 5.0  # of the processor; what math-verify itself allows for one step
_STALLED_SECONDS = 600.0  # of the clock; by then it is no formula that keeps the process from answering
_START_SECONDS = 60.0  # it imports sympy, on a machine that may be busy
_LONGEST = 2_000  # characters; a longer text is no formula that anybody compares
_KEPT = 4_096  # results: a group's completions repeat the same few answers


def is_available() -> bool:
    """Whether `math-verify` is installed."""
    return importlib.util.find_spec("math_verify") is not None


def require() -> None:
    """Raise `ConfigError` where `math-verify` is not installed."""
    if not is_available():
        raise ConfigError("questions of kind math need the package math-verify: pip install 'mlxvr[math]'")


def are_equal(said: str, truth: str, *, seconds: float = _LIMIT_SECONDS) -> bool:
    r"""Whether an answer is equal to the true one; False too when it cannot be computed, or not in time.

    Args:
        said, truth: as `math_verify.parse` takes them: numbers, fractions and percentages as they are, formulas in
            `$..$` or `\boxed{..}`. (Of other text it takes the last number.)
        seconds: of the processor, the limit for both and their comparison.

    Raises `ConfigError` where `math-verify` is not installed, does not start, or gets no processor for minutes.
    """
    require()
    if max(len(said), len(truth)) > _LONGEST:
        return False
    with _LOCK:
        try:
            return _ask(said, truth, seconds)
        except _CutOff:
            return False


class _CutOff(Exception):
    """The process ended before it answered: its time was up, or the formula brought it down."""


class _Worker:
    """The other process: a line of JSON in, a line out."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask(self, said: str, truth: str, seconds: float) -> bool:
        process = self._process
        if process is None or process.poll() is not None:
            self.stop()
            process = self._start()
        assert process.stdin is not None, "it was opened with a pipe"
        try:
            process.stdin.write(json.dumps([said, truth, seconds]) + "\n")
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
        with suppress(OSError):  # what was not sent is lost with it
            process.stdin.close()

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            process_group=0,  # Ctrl-C is for the program, which may finish what it does
        )
        self._process, self._lines = process, queue.SimpleQueue()
        threading.Thread(target=_read, args=(process, self._lines), daemon=True).start()
        try:
            ready = self._lines.get(timeout=_START_SECONDS)
        except queue.Empty:
            ready = ""
        if not ready:
            self.stop()
            raise ConfigError("math-verify is installed and does not start; see what `import math_verify` says")
        return process


def _read(process: "subprocess.Popen[str]", lines: "queue.SimpleQueue[str]") -> None:
    """Pass on what the other process says; an empty line when it has ended."""
    assert process.stdout is not None, "it was opened with a pipe"
    with process.stdout as stream:
        for line in stream:
            lines.put(line)
    lines.put("")


_WORKER = _Worker()
_LOCK = threading.Lock()
_ask = lru_cache(_KEPT)(_WORKER.ask)
atexit.register(_WORKER.stop)


def _serve() -> None:
    """What the other process does until its input ends."""
    import faulthandler
    import signal

    import math_verify

    replies, sys.stdout = sys.stdout, sys.stderr
    math_verify.verify(math_verify.parse("$1$", parsing_timeout=None), [], timeout_seconds=None)  # loads the rest of it
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        said, truth, seconds = json.loads(line)
        # The system counts the processor time and ends the process by a signal that nobody handles, whatever is being
        # computed. Should it stand still with nobody left to stop it, a thread of its own ends it.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        faulthandler.dump_traceback_later(_STALLED_SECONDS, exit=True)
        try:
            one, other = (math_verify.parse(text, parsing_timeout=None) for text in (truth, said))
            equal = bool(math_verify.verify(one, other, timeout_seconds=None))
        except Exception:  # a formula that it cannot handle: anything from SympifyError to RecursionError
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        faulthandler.cancel_dump_traceback_later()
        print(equal, file=replies, flush=True)


if __name__ == "__main__":
    _serve()
