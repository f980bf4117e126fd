"""Runs the checks in a child process, so that a check that ends the process is one red line.

A GPU that runs out of memory, or a driver's fault, ends the whole process: no `except` catches it. The parent reads the
child's lines, so it knows which check was running, reports it, and starts another child for the remaining checks.
"""

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO

from mlxvr.diagnosis.findings import Finding

__all__ = ["CHILD", "run_checks"]

CHILD = (sys.executable, "-m", "mlxvr.diagnosis.child")
_REPORT = "please report it with this output"


def run_checks(
    names: Sequence[str], *, command: Sequence[str] = CHILD, seconds_per_check: float = 300.0
) -> Iterator[Finding]:
    """Run checks by name; yield their findings as they come.

    Args:
        names: see `checks.CHECKS`.
        command: the child's command; the names are its last arguments.
        seconds_per_check: a check without a line for so long counts as hanging, and its process is ended.
    """
    remaining = list(names)
    while remaining:
        with tempfile.TemporaryFile() as errors:
            yield from _run_child(remaining, command, seconds_per_check, errors)


def _run_child(
    remaining: list[str], command: Sequence[str], seconds_per_check: float, errors: IO[bytes]
) -> Iterator[Finding]:
    """Run one child; checks that it began are removed from `remaining`."""
    with subprocess.Popen([*command, *remaining], stdout=subprocess.PIPE, stderr=errors, text=True) as child:
        assert child.stdout is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
        running: str | None = None
        try:
            while True:
                try:
                    line = lines.get(timeout=seconds_per_check)
                except queue.Empty:
                    child.kill()
                    name = running or remaining.pop(0)
                    text = f"no result within {seconds_per_check:.0f} s"
                    yield Finding(check=name, status="red", text=text, advice=f"it hangs here: {_REPORT}")
                    return
                if line is None:
                    break
                message = json.loads(line)
                if "begin" in message:
                    running = remaining.pop(0)
                elif "finding" in message:
                    yield Finding(**message["finding"])
                else:
                    running = None
        finally:
            child.kill()
    if running is not None or (remaining and child.returncode != 0):  # it ended during a check, or before the first
        name = running or remaining.pop(0)
        yield Finding(
            check=name,
            status="red",
            text=f"the process ended: {_how_it_ended(child.returncode)}{_last_words(errors)}",
            advice=f"an app would have gone down with it: {_REPORT}",
        )


def _forward(source: IO[str], lines: "queue.SimpleQueue[str | None]") -> None:
    for line in source:
        lines.put(line)
    lines.put(None)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _last_words(errors: IO[bytes]) -> str:
    """The last line that the child wrote to stderr."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return f" ({lines[-1][:200]})" if lines else ""
