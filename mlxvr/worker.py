"""One thread that owns all of a reasoner's MLX work.

MLX's streams belong to the thread that made them: an array built on one thread cannot be evaluated on another. An app
that calls from a GUI callback, a thread pool and a notebook would trip over that, so a `Worker` runs every piece of
work, in order, on one thread of its own; callers wait for the result (`call`) or read items as they come (`stream`).

Each piece of work is handed a `should_stop` callable and looks at it between steps; when it says yes the work raises
`Cancelled`. It says yes once the caller is gone (interrupted, or its iterator was closed), after `cancel`, or after
`close`.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from mlxvr.callbacks import ShouldStop
from mlxvr.errors import Cancelled, ConfigError

__all__ = ["Worker"]

T = TypeVar("T")
_END = object()


class Worker:
    """Runs work on one thread that it owns, one piece after another."""

    def __init__(self, name: str = "mlxvr"):
        """Start nothing yet: the thread begins with the first piece of work, and is called `name`."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._pending: set[threading.Event] = set()  # the stop flags of work that waits or runs
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def call(self, work: Callable[[ShouldStop], T]) -> T:
        """Run `work(should_stop)` on the thread and return what it returns, or raise what it raises."""
        stop, future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            stop.set()  # an interrupt here must not leave the thread working for nobody
            raise

    def stream(self, work: Callable[[ShouldStop], Iterator[T]]) -> Iterator[T]:
        """Run `work(should_stop)` on the thread and yield its items as they come.

        The work starts now, not at the first `next`. Closing the iterator stops the work and waits until it has ended,
        so that what it worked on is in a known state.
        """
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def produce(should_stop: ShouldStop) -> None:
            try:
                for item in work(should_stop):
                    items.put(item)
            finally:
                items.put(_END)

        stop, future = self._submit(produce)
        # A piece of work that is cancelled before it starts never puts its own end mark.
        future.add_done_callback(lambda _: items.put(_END))
        return self._consume(items, stop, future)

    @staticmethod
    def _consume(items: "queue.SimpleQueue[Any]", stop: threading.Event, future: "Future[None]") -> Iterator[Any]:
        try:
            while (item := items.get()) is not _END:
                yield item
            future.result()
        finally:
            stop.set()
            if not future.cancelled():
                future.exception()  # waits for the end; an error of abandoned work has no reader

    def cancel(self) -> None:
        """Ask all work that runs or waits to stop: its callers get `Cancelled`."""
        with self._lock:
            for stop in self._pending:
                stop.set()

    def close(self, release: Callable[[], None] | None = None) -> None:
        """Stop all work, call `release` on the thread as its last act, and end it; idempotent, from any thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for stop in self._pending:
                stop.set()
            if release is not None:
                # At the interpreter's exit the executor has already ended its thread: nothing is left to release.
                with suppress(RuntimeError):
                    self._executor.submit(release)
        self._executor.shutdown(wait=True)

    def _submit(self, work: Callable[[ShouldStop], T]) -> tuple[threading.Event, "Future[T]"]:
        stop = threading.Event()

        def run() -> T:
            try:
                if stop.is_set():
                    raise Cancelled("the work was cancelled before it began")
                return work(stop.is_set)
            finally:
                with self._lock:
                    self._pending.discard(stop)

        with self._lock:
            if self._closed:
                raise ConfigError("this reasoner is closed: load it again with mlxvr.load(...)")
            self._pending.add(stop)
            return stop, self._executor.submit(run)
