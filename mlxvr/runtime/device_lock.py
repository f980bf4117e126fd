"""Whose turn it is to evaluate: MLX work of one process happens on one thread at a time.

Two threads that evaluate MLX arrays at once have crashed processes: on Metal (ml-explore/mlx issue 3078) and on CUDA,
with MLX alone. All reasoners therefore share one thread (`mlxvr.runtime.worker`), and whatever else evaluates (loading
a model, converting, verifying, training) holds the device while it does. So may an app that evaluates arrays of its
own:

    with use_device():
        mx.eval(...)

Turns are given in the order in which they were asked for. A thread that holds the device may ask again; one that waits
for another thread's result lends it (`lent`), so that a reward function may ask a reasoner while a training step holds
the device.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

__all__ = ["acquire", "hand_over", "is_wanted", "lent", "release", "use_device"]


class _Turns:
    """Who holds the device and who waits for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held for a few instructions only
        self.owner: int | None = None
        self.depth = 0
        self.waiting: deque[tuple[threading.Event, int]] = deque()

    def pass_on(self) -> None:
        """Give the device to the first that waits; the lock is held."""
        self.owner, self.depth = None, 0
        if self.waiting:
            turn, self.owner = self.waiting.popleft()
            self.depth = 1
            turn.set()


_turns = _Turns()


def acquire(timeout: float | None = None) -> bool:
    """Wait for the device, at most `timeout` seconds; whether the calling thread has it now."""
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
                if turn.is_set():  # it came while the wait ended
                    granted = True
                else:
                    _turns.waiting.remove((turn, thread))
    return granted


def release() -> None:
    """End the innermost `acquire` of the calling thread; the last one waits for the thread's MLX work first."""
    if _turns.depth == 1:
        _wait_for_queue()
    with _turns.lock:
        _turns.depth -= 1
        if _turns.depth == 0:
            _turns.pass_on()


def is_wanted() -> bool:
    """Whether another thread waits for the device."""
    return bool(_turns.waiting)


@contextmanager
def use_device() -> Iterator[None]:
    """Hold the device: no other thread evaluates inside. Also a decorator."""
    acquire()
    try:
        yield
    finally:
        release()


@contextmanager
def lent() -> Iterator[None]:
    """Leave the device to others while the calling thread waits for one of them; a no-op if it does not hold it."""
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
    """Let those that wait have their turn now, then go on; for long work, between its steps."""
    if is_wanted():
        with lent():
            pass


def _wait_for_queue() -> None:
    """Let what the calling thread has queued end: it must not run into the next thread's work."""
    try:
        mx.synchronize()
    except RuntimeError as error:
        if "no Stream" not in str(error):  # a thread whose streams were given back has nothing queued
            raise
