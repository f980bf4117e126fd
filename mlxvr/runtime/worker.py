"""One thread for the MLX work of all reasoners in a process.

MLX's streams belong to the thread that made them, and two threads that evaluate at once may crash the process (see
`mlxvr.runtime.device_lock`). An app that calls from a GUI callback, a thread pool and a notebook would trip over both,
so all workers of a process share one thread. Each `Worker` is a queue of its own: its pieces of work run in order, and
the workers take turns, a call or one item of a stream at a time. Callers wait for the result (`Worker.call`) or read
items as they come (`Worker.stream`). Cancelling or closing a worker concerns its own work only.

Each piece of work is handed a `should_stop` callable and looks at it between steps; when it says yes the work raises
`Cancelled`. It says yes once the caller is gone (interrupted, or its stream was closed or forgotten), after `cancel`,
or after `close`.

The thread starts with the first worker and ends with the last. It is a daemon that is ended at the interpreter's exit,
not an executor's: an executor's thread is joined before that, and MLX aborts the process if a thread has ended without
releasing its streams. Finalizers may run anywhere, also inside this module, so they take no lock and wait for nothing:
they set flags and put messages in a queue.
"""

import atexit
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar
from weakref import finalize

from mlxvr.errors import Cancelled, ConfigError
from mlxvr.runtime import device_lock, device_memory
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["Worker"]

T = TypeVar("T")

_END = object()
_POLL_SECONDS = 0.05  # how often cancelled work is looked for while another thread holds the device


class Worker:
    """Runs pieces of work one after another, on the thread that all workers share."""

    def __init__(self, *, release: Callable[[], None] | None = None):
        """Join the thread, or start it.

        Args:
            release: called on the thread as the worker's last act: when it is closed or forgotten, or at the
                interpreter's exit.
        """
        self._line = _Line(release)
        self._lock = threading.Lock()  # nothing is handed in after `close`
        self._thread = _join(self._line)
        self._end = finalize(self, _leave, self._line, self._thread)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._end.alive

    def call(self, work: Callable[[ShouldStop], T]) -> T:
        """Run `work(should_stop)` on the thread and return what it returns, or raise what it raises.

        Raises `ConfigError` when it is called on the thread itself, which would wait for itself for ever.
        """
        self._refuse_own_thread()
        job: _Job[T] = _Job(work, self._line)
        self._hand_in(job)
        try:
            with device_lock.lent():
                return job.future.result()
        except BaseException:
            job.stop.set()  # an interrupt here must not leave the thread working for nobody
            raise

    def stream(self, work: Callable[[ShouldStop], Iterator[T]]) -> Generator[T, None, None]:
        """Run `work(should_stop)` on the thread and yield its items as they come.

        The work starts now, not at the first `next`. Closing the generator, from any thread and also before its first
        item, stops the work and waits until it has ended, so that what it worked on is in a known state; a thread that
        waits in `next` then gets `Cancelled`. A generator that is dropped stops its work without waiting.

        Raises `ConfigError` when it is called on the thread itself.
        """
        self._refuse_own_thread()
        job = _StreamJob(work, self._line)
        self._hand_in(job)
        return _Stream(job, self._thread)

    def run_here(self, work: Callable[[ShouldStop], T]) -> T:
        """Run `work(should_stop)` on the calling thread; `cancel` and `close` stop it too. For work without MLX."""
        stop = _Flag()
        with self._lock:
            self._refuse_closed()
            self._line.pending.add(stop)
        try:
            return work(stop.is_set)
        finally:
            self._line.pending.discard(stop)

    def cancel(self) -> None:
        """Ask all work of this worker that runs or waits to stop: its callers get `Cancelled`."""
        self._line.stop_all()

    def close(self, last: Callable[[], None] | None = None) -> None:
        """Stop all work, run `last` on the thread, release what the worker owns; idempotent, from any thread.

        Waits for the end, except on the thread itself.
        """
        with self._lock:
            if last is not None and self._end.alive:
                self._line.stop_all()
                self._thread.inbox.put(_Job(lambda _: last(), self._line, is_internal=True))
            self._end()
        if not self._thread.is_current:
            with device_lock.lent():
                self._line.ended.wait()
                if self._thread.ending:
                    self._thread.thread.join()

    def _hand_in(self, job: "_Job[Any]") -> None:
        with self._lock:
            self._refuse_closed()
            self._line.pending.add(job.stop)
            self._thread.inbox.put(job)

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ConfigError("this reasoner is closed: load it again with mlxvr.load(...)")

    def _refuse_own_thread(self) -> None:
        if self._thread.is_current:
            raise ConfigError(
                "this was called from a callback that runs on the thread of all reasoners (such as progress): it would "
                "wait for itself for ever; call it once the callback has returned, or from another thread"
            )


class _Flag:
    """Says that work should stop. Not an `Event`, whose lock a finalizer must not take."""

    def __init__(self) -> None:
        self._value = False

    def set(self) -> None:
        self._value = True

    def is_set(self) -> bool:
        return self._value


class _Line:
    """A worker's work that waits or runs. Holds no reference to the worker, which may be forgotten."""

    def __init__(self, release: Callable[[], None] | None):
        self.pending: set[_Flag] = set()  # of all work that was handed in
        self.ended = threading.Event()
        self.jobs: deque[_Job[Any]] = deque()  # of the thread alone
        self._release = release

    def release_once(self) -> None:
        """Release what the worker owns."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def stop_all(self) -> None:
        for stop in tuple(self.pending):
            stop.set()


class _Job(Generic[T]):
    """A piece of work and its result."""

    def __init__(self, work: Callable[[ShouldStop], T], line: _Line, *, is_internal: bool = False):
        self.line = line
        self.is_internal = is_internal
        self.stop = _Flag()
        self.future: Future[T] = Future()
        self._work: Callable[[ShouldStop], T] | None = work

    @property
    def needs_device(self) -> bool:
        """Whether the next step may evaluate."""
        return not self.is_internal and not self.stop.is_set()

    def step(self) -> bool:
        """Do the next part, on the thread; whether that was the last. Never raises: an error belongs to the caller."""
        assert self._work is not None
        try:
            if self.stop.is_set():
                raise Cancelled("the work was cancelled before it began")
            result = self._work(self.stop.is_set)
        except BaseException as error:
            self._finish(error=error)
        else:
            self._finish(result)
        return True

    def _finish(self, result: Any = None, error: BaseException | None = None) -> None:
        self._work = None  # what it holds may be large, and the caller may keep the future
        self.line.pending.discard(self.stop)
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class _StreamJob(_Job[Any]):
    """Work that yields items; a step is one of them."""

    def __init__(self, work: Callable[[ShouldStop], Iterator[Any]], line: _Line):
        super().__init__(work, line)
        self.items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._iterator: Iterator[Any] | None = None

    @property
    def needs_device(self) -> bool:
        return self._iterator is not None or super().needs_device

    def step(self) -> bool:
        assert self._work is not None
        try:
            if self._iterator is None:
                if self.stop.is_set():
                    raise Cancelled("the work was cancelled before it began")
                self._iterator = iter(self._work(self.stop.is_set))
            item = next(self._iterator, _END)
            if item is not _END:
                self.items.put(item)
                return False
        except BaseException as error:
            self._finish(error=error)
        else:
            self._finish()
        return True

    def _finish(self, result: Any = None, error: BaseException | None = None) -> None:
        self._iterator = None
        super()._finish(result, error)
        self.items.put(_END)


class _Leave(_Job[None]):
    """The last of a worker's line."""

    def __init__(self, line: _Line):
        super().__init__(lambda _: line.release_once(), line, is_internal=True)


class _Stream(Generator[T, None, None]):
    """The caller's end of a stream; its methods may be called from any thread."""

    def __init__(self, job: _StreamJob, thread: "_Thread"):
        self._job = job
        self._thread = thread
        self._is_over = False
        self._closed_by: int | None = None
        finalize(self, job.stop.set).atexit = False

    def send(self, value: None, /) -> T:
        """The next item."""
        if value is not None:
            raise TypeError("this stream takes nothing in: use next()")
        if self._is_over:
            raise self._end()
        if self._thread.is_current and self._job.items.empty():
            raise ConfigError(
                "a stream cannot be read by a callback of the thread that writes it: it would wait for ever"
            )
        try:
            with device_lock.lent():
                item = self._job.items.get()
        except BaseException:  # an interrupt
            self.close()
            raise
        if item is not _END:
            return item
        self._job.items.put(_END)  # for another thread that may wait as well
        was_over, self._is_over = self._is_over, True
        error = self._job.future.exception()
        if error is not None and not was_over:
            raise error
        raise self._end()

    def throw(self, error: Any, value: Any = None, traceback: Any = None, /) -> T:
        """Close the stream, then raise the error."""
        self.close()
        if value is not None:
            raise value
        raise error

    def close(self) -> None:
        """Stop the work and wait until it has ended; on the thread that does it, without waiting."""
        if not self._is_over:
            self._is_over, self._closed_by = True, threading.get_ident()
        self._job.stop.set()
        if not self._thread.is_current:
            with device_lock.lent():
                self._job.future.exception()  # an error of abandoned work has no reader

    def _end(self) -> Exception:
        """What a reader gets after the end: told once when another thread has closed the stream."""
        closed_by, self._closed_by = self._closed_by, None
        if closed_by in (None, threading.get_ident()):
            return StopIteration()
        return Cancelled("the stream was closed by another thread before its end")


class _Thread:
    """The thread that all workers of a process share, while there are any."""

    def __init__(self, predecessor: "_Thread | None"):
        self.inbox: queue.SimpleQueue[_Job[Any]] = queue.SimpleQueue()
        self.lines: set[_Line] = set()
        self.ending = False
        self._predecessor = predecessor
        self._turns: deque[_Line] = deque()  # lines that have work
        self.thread = threading.Thread(target=self._run, name="mlxvr-device", daemon=True)

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on it."""
        return threading.current_thread() is self.thread

    def _run(self) -> None:
        """One turn after another, until the last line has left or the interpreter ends."""
        if self._predecessor is not None:
            self._predecessor.thread.join()
            self._predecessor = None
        holds_device = False
        try:
            while not self.ending:
                if not self._turns and holds_device:
                    device_lock.release()
                    holds_device = False
                self._take_in(wait=not self._turns)
                line = self._turns.popleft()
                if line.jobs[0].needs_device and not holds_device:
                    holds_device = device_lock.acquire(_POLL_SECONDS)
                    if not holds_device:
                        self._turns.append(line)
                        continue
                self._step(line)
                if holds_device and device_lock.is_wanted():
                    device_lock.release()
                    holds_device = False
        finally:
            if holds_device:
                device_lock.release()
            device_memory.release_thread()

    def _take_in(self, *, wait: bool) -> None:
        """Sort what was handed in into its lines."""
        while True:
            try:
                job = self.inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            job.line.jobs.append(job)
            if len(job.line.jobs) == 1:
                self._turns.append(job.line)

    def _step(self, line: _Line) -> None:
        job = line.jobs[0]
        if not job.step():
            self._turns.append(line)
            return
        line.jobs.popleft()
        if isinstance(job, _Leave):
            with _starting:
                self.lines.discard(line)
                self.ending = not self.lines
            line.ended.set()
        elif line.jobs:
            self._turns.append(line)


_starting = threading.Lock()
_thread: _Thread | None = None


def _join(line: _Line) -> _Thread:
    """Bring a line to the thread that runs, or start one once the one before has ended."""
    global _thread
    with _starting:
        if _thread is None or _thread.ending or not _thread.thread.is_alive():
            _thread = _Thread(_thread)
            _thread.lines.add(line)
            _thread.thread.start()
        else:
            _thread.lines.add(line)
        return _thread


def _leave(line: _Line, thread: _Thread) -> None:
    """Stop a line's work and let it leave; a finalizer."""
    line.stop_all()
    thread.inbox.put(_Leave(line))


@atexit.register
def _end_at_exit() -> None:
    """Stop all work, and wait for the thread to end."""
    thread = _thread
    if thread is None or not thread.thread.is_alive():
        return
    for line in tuple(thread.lines):
        line.stop_all()
        thread.inbox.put(_Leave(line))
    with device_lock.lent():
        thread.thread.join()
