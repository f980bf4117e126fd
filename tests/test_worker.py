"""One thread does all the work, whoever asks; work can be cancelled, abandoned and closed."""

import gc
import signal
import subprocess
import sys
import threading
import time

import pytest

from mlxvr.errors import Cancelled, ConfigError
from mlxvr.worker import Worker


@pytest.fixture
def worker():
    made = Worker("test")
    yield made
    made.close()


def wait_until_stopped(should_stop):
    for _ in range(1000):
        if should_stop():
            raise Cancelled("stopped")
        time.sleep(0.01)
    raise AssertionError("nobody asked this work to stop")


def test_all_work_runs_on_one_thread_that_is_not_the_callers(worker):
    seen = []
    callers = [
        threading.Thread(target=lambda: seen.append(worker.call(lambda _: threading.get_ident()))) for _ in range(8)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    streamed = list(worker.stream(lambda _: iter([threading.get_ident()])))
    inside = list(worker.stream(lambda _: (threading.get_ident() for _ in range(2))))
    assert len(set(seen + inside)) == 1
    assert threading.get_ident() not in seen + inside
    assert len(streamed) == 1


def test_errors_reach_the_caller(worker):
    def fails(_):
        raise ZeroDivisionError("work")

    def fails_late(_):
        yield 1
        raise ZeroDivisionError("late")

    with pytest.raises(ZeroDivisionError, match="work"):
        worker.call(fails)
    items = worker.stream(fails_late)
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError, match="late"):
        next(items)
    assert worker.call(lambda _: 7) == 7


def test_closing_a_stream_stops_its_work_and_waits(worker):
    ended = threading.Event()

    def endless(should_stop):
        try:
            number = 0
            while not should_stop():
                yield number
                number += 1
                time.sleep(0.001)
            raise Cancelled("stopped")
        finally:
            ended.set()

    items = worker.stream(endless)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert ended.is_set()


def test_cancel_stops_running_and_waiting_work_and_the_worker_goes_on(worker):
    begun = threading.Event()
    outcomes = []

    def run(work):
        try:
            outcomes.append(worker.call(work))
        except Cancelled as error:
            outcomes.append(str(error))

    def long(should_stop):
        begun.set()
        wait_until_stopped(should_stop)

    running = threading.Thread(target=run, args=(long,))
    running.start()
    assert begun.wait(5)
    waiting = threading.Thread(target=run, args=(lambda _: "ran",))
    waiting.start()
    while len(worker._pending) < 2:
        time.sleep(0.001)
    worker.cancel()
    running.join(5)
    waiting.join(5)
    assert sorted(outcomes) == ["stopped", "the work was cancelled before it began"]
    assert worker.call(lambda _: "still here") == "still here"


def test_close_stops_work_releases_on_the_thread_and_refuses_more():
    worker = Worker("test", release=lambda: outcome.append(threading.get_ident()))
    begun = threading.Event()
    outcome = []

    def long(should_stop):
        begun.set()
        try:
            wait_until_stopped(should_stop)
        finally:
            outcome.append(threading.get_ident())

    def run():
        with pytest.raises(Cancelled):
            worker.call(long)

    caller = threading.Thread(target=run)
    caller.start()
    assert begun.wait(5)
    worker.close(lambda: outcome.append(threading.get_ident()))
    caller.join(5)
    assert len(outcome) == 3
    assert len(set(outcome)) == 1
    worker.close(lambda: outcome.append(0))
    assert len(outcome) == 3
    with pytest.raises(ConfigError, match="closed"):
        worker.call(lambda _: 1)
    with pytest.raises(ConfigError, match="closed"):
        worker.stream(lambda _: iter([1]))


def test_an_interrupted_caller_does_not_leave_the_work_running(worker):
    stopped = threading.Event()

    def long(should_stop):
        try:
            wait_until_stopped(should_stop)
        finally:
            stopped.set()

    main = threading.main_thread().ident
    # A process that was started in the background may ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            worker.call(long)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.wait(5)


def test_a_forgotten_worker_releases_and_ends():
    outcome = []
    worker = Worker("test", release=lambda: outcome.append("released"))
    thread = worker.call(lambda _: threading.current_thread())
    del worker
    gc.collect()
    thread.join(5)
    assert outcome == ["released"]
    assert not thread.is_alive()


def test_the_interpreters_exit_releases_too():
    """MLX aborts the process when a thread has ended without releasing its streams."""
    script = """
import mlx.core as mx
from mlxvr.model.memory import release_thread
from mlxvr.worker import Worker

worker = Worker(release=release_thread)
def numbers(should_stop):
    while not should_stop():
        mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
        yield 1
stream = worker.stream(numbers)
next(stream)
print("left open")
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "left open\n", "")
