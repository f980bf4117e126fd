"""One thread that owns all of a reasoner's MLX work.

MLX's streams belong to the thread that made them: an array built on one thread cannot be evaluated on another. An app
that calls from a GUI callback, a thread pool and a notebook would trip over that, so a `Worker` runs every piece of
work, in order, on one thread of its own; callers wait for the result (`call`) or read items as they come (`stream`).

Each piece of work is handed a `should_stop` callable and looks at it between steps; when it says yes the work raises
`Cancelled`. It says yes once the caller is gone (interrupted, or its iterator was closed), after `cancel`, or after
`close`.

The thread is a daemon that a finalizer ends, not an executor's: an executor's thread is joined before finalizers
run at the interpreter's exit, and MLX aborts the process if a thread has ended without releasing its streams.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar
from weakref import finalize

from mlxvr.callbacks import ShouldStop
from mlxvr.errors import Cancelled, ConfigError

__all__ = ["Worker"]

T = TypeVar("T")
_Job = Callable[[], None]

_END = object()


class Worker:
    """Runs work on one thread that it owns, one piece after another."""

    def __init__(self, name: str = "mlxvr", *, release: _Job | None = None):
        """Start the thread.

        Args:
            name: the thread's name.
            release: called on the thread as its last act: when the worker is closed or forgotten, or at the
                interpreter's exit.
        """
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending: set[threading.Event] = set()  # the stop flags of work that waits or runs
        self._thread = threading.Thread(target=_serve, args=(self._jobs, release), name=name, daemon=True)
        self._thread.start()
        self._end = finalize(self, _end, self._jobs, self._lock, self._pending, self._thread)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._end.alive

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
            for item in work(should_stop):
                items.put(item)

        stop, future = self._submit(produce)
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
            future.exception()  # waits for the end; an error of abandoned work has no reader

    def cancel(self) -> None:
        """Ask all work that runs or waits to stop: its callers get `Cancelled`."""
        with self._lock:
            for stop in self._pending:
                stop.set()

    def close(self, last: _Job | None = None) -> None:
        """Stop all work, run `last` on the thread, release what it owns and end it; idempotent, from any thread."""
        with self._lock:
            if last is not None and self._end.alive:
                self._jobs.put(last)
        self._end()

    def _submit(self, work: Callable[[ShouldStop], T]) -> tuple[threading.Event, "Future[T]"]:
        stop = threading.Event()
        future: Future[T] = Future()

        def run() -> None:
            try:
                if stop.is_set():
                    raise Cancelled("the work was cancelled before it began")
                result = work(stop.is_set)
            except BaseException as error:  # whatever it is, it belongs to the caller
                self._forget(stop)
                future.set_exception(error)
            else:
                self._forget(stop)
                future.set_result(result)

        with self._lock:
            if self.closed:
                raise ConfigError("this reasoner is closed: load it again with mlxvr.load(...)")
            self._pending.add(stop)
            self._jobs.put(run)
        return stop, future

    def _forget(self, stop: threading.Event) -> None:
        with self._lock:
            self._pending.discard(stop)


def _serve(jobs: "queue.SimpleQueue[_Job | None]", release: _Job | None) -> None:
    """The thread: one job after another until there is None. Holds no reference to the worker between jobs."""
    try:
        while (job := jobs.get()) is not None:
            job()
            del job
    finally:
        if release is not None:
            release()


def _end(
    jobs: "queue.SimpleQueue[_Job | None]",
    lock: threading.Lock,
    pending: set[threading.Event],
    thread: threading.Thread,
) -> None:
    """Stop all work, and wait for the thread to end."""
    with lock:
        for stop in pending:
            stop.set()
        jobs.put(None)
    if thread is not threading.current_thread():  # a forgotten worker may be collected on its own thread
        thread.join()
