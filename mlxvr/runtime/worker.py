"""One thread for the MLX work of all reasoners in a process.

MLX's streams belong to the thread that made them, and two threads that evaluate at once may crash the process (see
`mlxvr.runtime.device_lock`). An app that calls from a GUI callback, a thread pool and a notebook would meet both
problems, so all workers of a process share one thread. Each `Worker` has a task queue: its tasks run in order, and the
workers take turns, with one call or one item of a stream per turn. Callers wait for the result (`Worker.call`) or read
items as they come (`Worker.stream`). Cancelling or closing a worker stops only its own tasks.

Each task gets a `should_stop` function and calls it between its steps. If it returns True, the task raises `Cancelled`.
It returns True once the caller is gone (interrupted, or its stream was closed or garbage-collected), after `cancel`, or
after `close`.

The thread starts with the first worker and ends with the last. It is a daemon thread that an exit handler ends, not an
executor's thread: that is joined before exit handlers run, and MLX aborts the process if a thread ends without
releasing its streams. Finalizers may run anywhere, even inside this module, so they take no lock and wait for nothing:
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
_POLL_SECONDS = 0.05  # how often to look for cancelled tasks while another thread holds the device


class Worker:
    """Runs tasks one after another, on the thread that all workers share."""

    def __init__(self, *, release: Callable[[], None] | None = None):
        """Join the shared thread, or start it.

        Args:
            release: called on the thread as the worker's last action: when it is closed or garbage-collected, or at
                the interpreter's exit.
        """
        self._queue = _TaskQueue(release)
        self._lock = threading.Lock()  # so that no task is submitted after `close`
        self._thread = _join(self._queue)
        self._end = finalize(self, _leave, self._queue, self._thread)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._end.alive

    def call(self, work: Callable[[ShouldStop], T]) -> T:
        """Run `work(should_stop)` on the thread; return its result, or raise its error.

        Raises `ConfigError` if it is called on the thread itself, which would wait for itself for ever.
        """
        self._refuse_own_thread()
        task: _Task[T] = _Task(work, self._queue)
        self._submit(task)
        try:
            with device_lock.lent():
                return task.future.result()
        except BaseException:
            task.stop.set()  # after an interrupt here, nobody waits for the result
            raise

    def stream(self, work: Callable[[ShouldStop], Iterator[T]]) -> Generator[T, None, None]:
        """Run `work(should_stop)` on the thread and yield its items as they come.

        The work starts now, not at the first `next`. Closing the generator, from any thread and even before its first
        item, stops the work and waits until it has ended, so that the objects it used are in a known state. A thread
        that waits in `next` gets `Cancelled` then. A generator that is garbage-collected stops its work without
        waiting.

        Raises `ConfigError` if it is called on the thread itself.
        """
        self._refuse_own_thread()
        task = _StreamTask(work, self._queue)
        self._submit(task)
        return _Stream(task, self._thread)

    def run_here(self, work: Callable[[ShouldStop], T]) -> T:
        """Run `work(should_stop)`, which must not use MLX, on the calling thread; `cancel` and `close` stop it too."""
        stop = _Flag()
        with self._lock:
            self._refuse_closed()
            self._queue.pending.add(stop)
        try:
            return work(stop.is_set)
        finally:
            self._queue.pending.discard(stop)

    def cancel(self) -> None:
        """Ask all tasks of this worker, running or waiting, to stop; their callers get `Cancelled`."""
        self._queue.stop_all()

    def close(self, last: Callable[[], None] | None = None) -> None:
        """Stop all tasks, run `last` on the thread, then `release`; idempotent, from any thread.

        It waits until that is done, except on the thread itself.
        """
        with self._lock:
            if last is not None and self._end.alive:
                self._queue.stop_all()
                self._thread.inbox.put(_Task(lambda _: last(), self._queue, is_internal=True))
            self._end()
        if not self._thread.is_current:
            with device_lock.lent():
                self._queue.ended.wait()
                if self._thread.ending:
                    self._thread.thread.join()

    def _submit(self, task: "_Task[Any]") -> None:
        with self._lock:
            self._refuse_closed()
            self._queue.pending.add(task.stop)
            self._thread.inbox.put(task)

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ConfigError("this reasoner is closed: load it again with mlxvr.load(...)")

    def _refuse_own_thread(self) -> None:
        if self._thread.is_current:
            raise ConfigError(
                "this was called from a callback (such as progress) that runs on the thread of all reasoners, which "
                "would wait for itself for ever: call it after the callback has returned, or from another thread"
            )


class _Flag:
    """A flag that tells a task to stop. It is not an `Event`, whose lock a finalizer must not take."""

    def __init__(self) -> None:
        self._value = False

    def set(self) -> None:
        self._value = True

    def is_set(self) -> bool:
        return self._value


class _TaskQueue:
    """The running and waiting tasks of a worker. No reference to the worker, which can then be collected."""

    def __init__(self, release: Callable[[], None] | None):
        self.pending: set[_Flag] = set()  # the flags of all tasks that were submitted and have not ended
        self.ended = threading.Event()
        self.tasks: deque[_Task[Any]] = deque()  # used by the shared thread alone
        self._release = release

    def release_once(self) -> None:
        """Call the worker's `release`, the first time only."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def stop_all(self) -> None:
        for stop in tuple(self.pending):
            stop.set()


class _Task(Generic[T]):
    """A function to run on the thread, and its result."""

    def __init__(self, work: Callable[[ShouldStop], T], task_queue: _TaskQueue, *, is_internal: bool = False):
        self.task_queue = task_queue
        self.is_internal = is_internal
        self.stop = _Flag()
        self.future: Future[T] = Future()
        self._work: Callable[[ShouldStop], T] | None = work

    @property
    def needs_device(self) -> bool:
        """Whether the next step may evaluate MLX arrays."""
        return not self.is_internal and not self.stop.is_set()

    def step(self) -> bool:
        """Run the next part, on the thread; return whether it was the last. Never raises: the caller gets the error."""
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
        self._work = None  # it may hold large objects, and the caller may keep the future
        self.task_queue.pending.discard(self.stop)
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class _StreamTask(_Task[Any]):
    """A task that yields items; each step yields one."""

    def __init__(self, work: Callable[[ShouldStop], Iterator[Any]], task_queue: _TaskQueue):
        super().__init__(work, task_queue)
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


class _LastTask(_Task[None]):
    """The last task of a worker, which calls `release`."""

    def __init__(self, task_queue: _TaskQueue):
        super().__init__(lambda _: task_queue.release_once(), task_queue, is_internal=True)


class _Stream(Generator[T, None, None]):
    """The generator that a caller reads; its methods may be called from any thread."""

    def __init__(self, task: _StreamTask, thread: "_Thread"):
        self._task = task
        self._thread = thread
        self._is_over = False
        self._closed_by: int | None = None
        finalize(self, task.stop.set).atexit = False

    def send(self, value: None, /) -> T:
        """Return the next item."""
        if value is not None:
            raise TypeError("this stream takes no values: use next()")
        if self._is_over:
            raise self._end()
        if self._thread.is_current and self._task.items.empty():
            raise ConfigError(
                "a stream cannot be read by a callback on the thread that writes it, which would wait for ever: "
                "read it on another thread"
            )
        try:
            with device_lock.lent():
                item = self._task.items.get()
        except BaseException:  # an interrupt
            self.close()
            raise
        if item is not _END:
            return item
        self._task.items.put(_END)  # wakes another thread that may be waiting too
        was_over, self._is_over = self._is_over, True
        error = self._task.future.exception()
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
        """Stop the task and wait until it has ended; on the shared thread, do not wait."""
        if not self._is_over:
            self._is_over, self._closed_by = True, threading.get_ident()
        self._task.stop.set()
        if not self._thread.is_current:
            with device_lock.lent():
                self._task.future.exception()  # waits; the error of an abandoned task is dropped

    def _end(self) -> Exception:
        """Return the exception for a reader after the end; the first reader learns of a close by another thread."""
        closed_by, self._closed_by = self._closed_by, None
        if closed_by in (None, threading.get_ident()):
            return StopIteration()
        return Cancelled("the stream was closed by another thread before its end")


class _Thread:
    """The thread that all workers of a process share; it exists while there are any."""

    def __init__(self, predecessor: "_Thread | None"):
        self.inbox: queue.SimpleQueue[_Task[Any]] = queue.SimpleQueue()
        self.task_queues: set[_TaskQueue] = set()
        self.ending = False
        self._predecessor = predecessor
        self._turns: deque[_TaskQueue] = deque()  # the queues that have tasks, in the order of their turns
        self.thread = threading.Thread(target=self._run, name="mlxvr-device", daemon=True)

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this thread."""
        return threading.current_thread() is self.thread

    def _run(self) -> None:
        """Run one turn after another, until the last worker has left or the interpreter ends."""
        if self._predecessor is not None:
            self._predecessor.thread.join()
            self._predecessor = None
        holds_device = False
        try:
            while not self.ending:
                if not self._turns and holds_device:
                    device_lock.release()
                    holds_device = False
                self._sort_inbox(wait=not self._turns)
                task_queue = self._turns.popleft()
                if task_queue.tasks[0].needs_device and not holds_device:
                    holds_device = device_lock.acquire(_POLL_SECONDS)
                    if not holds_device:
                        self._turns.append(task_queue)
                        continue
                self._step(task_queue)
                if holds_device and device_lock.is_wanted():
                    device_lock.release()
                    holds_device = False
        finally:
            if holds_device:
                device_lock.release()
            device_memory.release_thread()

    def _sort_inbox(self, *, wait: bool) -> None:
        """Move submitted tasks from the inbox to the queues of their workers."""
        while True:
            try:
                task = self.inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            task.task_queue.tasks.append(task)
            if len(task.task_queue.tasks) == 1:
                self._turns.append(task.task_queue)

    def _step(self, task_queue: _TaskQueue) -> None:
        task = task_queue.tasks[0]
        if not task.step():
            self._turns.append(task_queue)
            return
        task_queue.tasks.popleft()
        if isinstance(task, _LastTask):
            with _starting:
                self.task_queues.discard(task_queue)
                self.ending = not self.task_queues
            task_queue.ended.set()
        elif task_queue.tasks:
            self._turns.append(task_queue)


_starting = threading.Lock()
_thread: _Thread | None = None


def _join(task_queue: _TaskQueue) -> _Thread:
    """Register a worker's queue with the shared thread; start a new one if there is none or it is ending."""
    global _thread
    with _starting:
        if _thread is None or _thread.ending or not _thread.thread.is_alive():
            _thread = _Thread(_thread)
            _thread.task_queues.add(task_queue)
            _thread.thread.start()
        else:
            _thread.task_queues.add(task_queue)
        return _thread


def _leave(task_queue: _TaskQueue, thread: _Thread) -> None:
    """Stop a worker's tasks and submit its last one; this is a finalizer."""
    task_queue.stop_all()
    thread.inbox.put(_LastTask(task_queue))


@atexit.register
def _end_at_exit() -> None:
    """Stop all tasks, and wait for the thread to end."""
    thread = _thread
    if thread is None or not thread.thread.is_alive():
        return
    for task_queue in tuple(thread.task_queues):
        task_queue.stop_all()
        thread.inbox.put(_LastTask(task_queue))
    with device_lock.lent():
        thread.thread.join()
