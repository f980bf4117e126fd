"""Run decoders on threads of their own while the caller's thread reports progress and listens for a stop.

Callbacks of an app are only ever called on the thread that called us.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from mlxvr.errors import Cancelled
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["core_count", "run_crew"]

_POLL_SECONDS = 0.05


def core_count() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_crew(
    works: Sequence[Callable[[ShouldStop], None]],
    *,
    report: Callable[[], None] = lambda: None,
    should_stop: ShouldStop | None = None,
) -> None:
    """Run all works at once and wait for them.

    Args:
        works: each gets a function that says whether to stop, and asks it often.
        report: called on this thread, several times a second.
        should_stop: asked on this thread; True stops the works.

    Raises `Cancelled` if asked to stop, else the first error that a work raised; the others are stopped then.
    """
    stopping = threading.Event()
    with ThreadPoolExecutor(len(works), thread_name_prefix="mlxvr-decode") as pool:
        futures = [pool.submit(work, stopping.is_set) for work in works]
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
