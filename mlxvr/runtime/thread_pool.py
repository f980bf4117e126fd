"""Run decoders on a thread pool while the calling thread reports progress and checks whether to stop.

An app's callbacks are only ever called on the thread that called mlxvr.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from mlxvr.errors import Cancelled
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["core_count", "run_together"]

_POLL_SECONDS = 0.05


def core_count() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_together(
    functions: Sequence[Callable[[ShouldStop], None]],
    *,
    report: Callable[[], None] = lambda: None,
    should_stop: ShouldStop | None = None,
) -> None:
    """Run all functions at once, each on a thread of its own, and wait for them.

    Args:
        functions: each gets a `should_stop` function, which it must call often.
        report: called on the calling thread, several times a second.
        should_stop: called on the calling thread; True stops all functions.

    Raises `Cancelled` if asked to stop, else the first error that a function raised; the others are stopped then.
    """
    stopping = threading.Event()
    with ThreadPoolExecutor(len(functions), thread_name_prefix="mlxvr-decode") as pool:
        futures = [pool.submit(function, stopping.is_set) for function in functions]
        try:
            while wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION).not_done:
                failed = [future for future in futures if future.done() and future.exception()]
                if failed:
                    failed[0].result()
                report()
                if should_stop is not None and should_stop():
                    raise Cancelled("stopped while the video was decoded")
        finally:
            stopping.set()
    for future in futures:
        future.result()
