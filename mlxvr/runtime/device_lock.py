"""A lock on the device: only one thread of a process evaluates MLX arrays at a time.

Two threads that evaluate MLX arrays at once have crashed processes, with nothing but MLX involved: on Metal
(ml-explore/mlx issue 3078) and on CUDA. So all reasoners share one thread (`mlxvr.runtime.worker`), and all other work
that evaluates (loading a model, converting, verifying, training) holds the device meanwhile. An app that evaluates
arrays of its own can do the same:

    with use_device():
        mx.eval(...)

Threads get the device in the order in which they asked for it. A thread that holds it may acquire it again. A thread
that waits for another thread's result lends the device (`lent`), so that a reward function can ask a reasoner while a
training step holds the device.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

__all__ = ["acquire", "hand_over", "is_wanted", "lent", "release", "use_device"]


class _Turns:
    """The thread that holds the device, and the threads that wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held for a few instructions only
        self.owner: int | None = None
        self.depth = 0
        self.waiting: deque[tuple[threading.Event, int]] = deque()

    def pass_on(self) -> None:
        """Give the device to the first thread that waits; the caller holds `lock`."""
        self.owner, self.depth = None, 0
        if self.waiting:
            turn, self.owner = self.waiting.popleft()
            self.depth = 1
            turn.set()


_turns = _Turns()


def acquire(timeout: float | None = None) -> bool:
    """Wait for the device, at most `timeout` seconds; return whether the calling thread has it now."""
    thread = threading.get_ident()
    with _turns.lock:
        if _turns.owner == thread:
            _turns.depth += 1
            return True
        turn = threading.Event()
        _turns.waiting.append((turn, thread))
        if _turns.owner is None:
            _turns.pass_on()
    granted = False
    try:
        granted = turn.wait(timeout)
    finally:
        if not granted:
            with _turns.lock:
                if turn.is_set():  # the device arrived just after the timeout
                    granted = True
                else:
                    _turns.waiting.remove((turn, thread))
    return granted


def release() -> None:
    """Undo the calling thread's innermost `acquire`; undoing the outermost first waits for the thread's MLX work."""
    if _turns.depth == 1:
        _wait_for_queue()
    with _turns.lock:
        _turns.depth -= 1
        if _turns.depth == 0:
            _turns.pass_on()


def is_wanted() -> bool:
    """Return whether another thread waits for the device."""
    return bool(_turns.waiting)


@contextmanager
def use_device() -> Iterator[None]:
    """Hold the device: no other thread evaluates within the block. Also works as a decorator."""
    acquire()
    try:
        yield
    finally:
        release()


@contextmanager
def lent() -> Iterator[None]:
    """Let other threads have the device within the block, then take it back; a no-op if the caller does not hold it."""
    if _turns.owner != threading.get_ident():
        yield
        return
    _wait_for_queue()
    depth = _turns.depth
    with _turns.lock:
        _turns.pass_on()
    try:
        yield
    finally:
        acquire()
        _turns.depth = depth


def hand_over() -> None:
    """Let the threads that wait have the device now, then take it back; for use between the steps of long work."""
    if is_wanted():
        with lent():
            pass


def _wait_for_queue() -> None:
    """Wait for the operations that the calling thread has queued: they must not overlap with the next thread's work."""
    try:
        mx.synchronize()
    except RuntimeError as error:
        if "no Stream" not in str(error):  # a thread whose streams were given back has nothing queued
            raise
