"""One thread does all the work, whoever asks; work can be cancelled, abandoned and closed."""

import asyncio
import collections.abc
import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import closing

import pytest

from mlxvr.errors import Cancelled, ConfigError
from mlxvr.runtime import device_lock
from mlxvr.runtime.worker import Worker


@pytest.fixture
def worker():
    made = Worker()
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


class Endless:
    """Work that yields numbers until it is stopped, and counts them."""

    def __init__(self):
        self.count = 0
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, should_stop):
        self.thread = threading.get_ident()
        self.begun.set()
        try:
            while not should_stop():
                yield self.count
                self.count += 1
                time.sleep(0.001)
            raise Cancelled("stopped")
        finally:
            self.ended.set()


def test_a_stream_closed_before_its_first_item_stops_its_work(worker):
    work = Endless()
    stream = worker.stream(work)
    assert work.begun.wait(5)
    stream.close()
    assert work.ended.is_set()
    assert list(stream) == []


def test_a_stream_dropped_before_its_first_item_stops_its_work(worker):
    work = Endless()
    stream = worker.stream(work)
    assert work.begun.wait(5)
    del stream
    gc.collect()
    assert work.ended.wait(5)
    assert worker.call(lambda _: 7) == 7


def test_a_stream_is_a_generator(worker):
    stream = worker.stream(lambda _: iter("ab"))
    assert isinstance(stream, collections.abc.Generator)
    with closing(stream) as items:
        assert iter(items) is items
        assert [*items, next(items, "end")] == ["a", "b", "end"]
    work = Endless()
    stream = worker.stream(work)
    assert next(stream) == 0
    with pytest.raises(KeyError, match="mine"):
        stream.throw(KeyError("mine"))
    assert work.ended.is_set()
    with pytest.raises(StopIteration):
        next(stream)


def test_another_thread_may_close_a_stream_that_is_waited_for(worker):
    """A generator would raise "generator already executing" here."""
    outcomes = []

    def silent(should_stop):
        wait_until_stopped(should_stop)
        yield

    def read(stream):
        try:
            outcomes.append(list(stream))
        except Cancelled as error:
            outcomes.append(str(error))

    blocked, busy = worker.stream(silent), worker.stream(Endless())
    reader = threading.Thread(target=read, args=(blocked,))
    reader.start()
    time.sleep(0.05)
    blocked.close()
    reader.join(5)
    assert next(busy) == 0  # what waited in line goes on
    reader = threading.Thread(target=read, args=(busy,))
    reader.start()
    time.sleep(0.05)
    busy.close()
    reader.join(5)
    assert outcomes == ["the stream was closed by another thread before its end"] * 2


def test_the_thread_does_not_wait_for_itself(worker):
    """A callback that asks its own thread for something gets the reason instead of waiting for ever."""
    second = Worker()
    for use in (
        lambda: worker.call(lambda _: 1),
        lambda: worker.stream(lambda _: iter([1])),
        lambda: second.call(lambda _: 1),
    ):
        with pytest.raises(ConfigError, match="callback"):
            worker.call(lambda _, use=use: use())

    stream = second.stream(Endless())
    with pytest.raises(ConfigError, match="callback"):
        worker.call(lambda _: [next(stream) for _ in range(100)])  # more than it has written so far
    stream.close()
    worker.call(lambda _: (worker.cancel(), second.close()))  # these ask for nothing
    with pytest.raises(ConfigError, match="closed"):
        second.call(lambda _: 1)
    assert worker.call(lambda _: 7) == 7


def test_workers_share_the_thread_and_take_turns(worker):
    """A long stream of one does not keep another waiting until its end."""
    second = Worker()
    work = Endless()
    stream = worker.stream(work)
    assert work.begun.wait(5)
    assert second.call(lambda _: threading.get_ident()) == work.thread
    assert [*second.stream(lambda _: iter("abc"))] == ["a", "b", "c"]
    assert not work.ended.is_set()
    stream.close()
    second.close()


def test_cancelling_or_closing_one_worker_leaves_the_others_work_alone(worker):
    second = Worker()
    mine, theirs = worker.stream(Endless()), second.stream(Endless())
    assert (next(mine), next(theirs)) == (0, 0)
    second.cancel()
    with pytest.raises(Cancelled):
        list(theirs)
    assert next(mine) == 1
    theirs = second.stream(Endless())
    assert next(theirs) == 0
    second.close()
    with pytest.raises(Cancelled):
        list(theirs)
    assert next(mine) == 2
    mine.close()


def test_a_release_that_fails_takes_no_other_worker_along(worker):
    def fails():
        raise ZeroDivisionError

    Worker(release=fails).close()
    assert worker.call(lambda _: 7) == 7


def test_finished_work_leaves_nothing_behind(worker):
    """A long-lived app asks for ever: neither stop flags nor what the work held may pile up."""
    held = {7}
    gone = weakref.ref(held)
    for _ in range(20):
        worker.call(lambda _: 1)
        list(worker.stream(lambda _: iter("ab")))
        worker.stream(Endless()).close()
        with pytest.raises(ZeroDivisionError):
            worker.call(lambda _: 1 / 0)
        worker.run_here(lambda _: 1)
    assert worker.call(lambda _, held=held: len(held)) == 1
    del held
    assert worker.call(lambda _: 1) == 1  # the one before is surely done with
    gc.collect()
    assert gone() is None
    assert worker._queue.pending == set()


def test_work_on_the_callers_thread_is_stopped_too(worker):
    begun = threading.Event()

    def work(should_stop):
        begun.set()
        wait_until_stopped(should_stop)

    assert worker.run_here(lambda _: threading.get_ident()) == threading.get_ident()
    canceller = threading.Thread(target=lambda: begun.wait(5) and worker.cancel())
    canceller.start()
    with pytest.raises(Cancelled, match="stopped"):
        worker.run_here(work)
    canceller.join()
    worker.close()
    with pytest.raises(ConfigError, match="closed"):
        worker.run_here(work)


def test_an_event_loop_goes_on_while_a_thread_waits(worker):
    """The loop's other tasks run during `to_thread`, and closing a stream ends its wait."""

    async def run():
        work = Endless()
        stream = worker.stream(work)
        ticks = 0
        reading = asyncio.create_task(asyncio.to_thread(list, stream))
        while not work.begun.is_set() or ticks < 20:
            ticks += 1
            await asyncio.sleep(0.001)
        await asyncio.to_thread(stream.close)
        with pytest.raises(Cancelled):
            await reading
        return work.ended.is_set()

    assert asyncio.run(asyncio.wait_for(run(), 10))


def test_cancel_stops_running_and_waiting_work_and_the_worker_goes_on(worker):
    begun = threading.Event()

    def long(should_stop):
        begun.set()
        wait_until_stopped(should_stop)
        yield

    running = worker.stream(long)
    waiting = worker.stream(lambda _: iter(["ran"]))
    assert begun.wait(5)
    worker.cancel()
    with pytest.raises(Cancelled, match=r"^stopped$"):
        next(running)
    with pytest.raises(Cancelled, match="cancelled before it began"):
        next(waiting)
    assert worker.call(lambda _: "still here") == "still here"


def test_close_stops_work_releases_on_the_thread_and_refuses_more():
    worker = Worker(release=lambda: outcome.append(threading.get_ident()))
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
    worker = Worker(release=lambda: outcome.append("released"))
    thread = worker.call(lambda _: threading.current_thread())
    del worker
    gc.collect()
    thread.join(5)
    assert outcome == ["released"]
    assert not thread.is_alive()


def test_a_thread_that_waits_for_the_device_lets_its_work_be_cancelled(worker):
    """Training in another thread holds the device for a step; a question waits, and can be called off meanwhile."""
    with device_lock.use_device():
        holder = threading.Thread(target=lambda: outcomes.append(ask()))
        outcomes = []

        def ask():
            try:
                return worker.call(lambda _: "ran")
            except Cancelled as error:
                return str(error)

        holder.start()
        time.sleep(0.1)
        assert outcomes == []
        worker.cancel()
        holder.join(5)
        assert outcomes == ["the work was cancelled before it began"]
        holder = threading.Thread(target=lambda: outcomes.append(ask()))
        holder.start()
        time.sleep(0.1)
        assert len(outcomes) == 1
        device_lock.hand_over()  # between two steps
        holder.join(5)
        assert outcomes[1] == "ran"
        assert worker.call(lambda _: "lent") == "lent"  # the holder itself waits, and lends the device meanwhile


def test_the_device_goes_round_in_order():
    order = []
    threads = []

    def use(number):
        with device_lock.use_device(), device_lock.use_device():
            order.append(number)

    with device_lock.use_device():
        for number in range(5):
            threads.append(threading.Thread(target=use, args=(number,)))
            threads[-1].start()
            while len(device_lock._turns.waiting) <= number:
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2, 3, 4]
    assert device_lock._turns.owner is None


def test_waiting_for_the_device_can_end():
    outcome = []
    with device_lock.use_device():
        thread = threading.Thread(target=lambda: outcome.append(device_lock.acquire(0.05)))
        thread.start()
        thread.join(5)
    assert outcome == [False]
    assert device_lock.acquire(0.05)
    device_lock.release()


def test_the_interpreters_exit_releases_too():
    """MLX aborts the process when a thread has ended without releasing its streams."""
    script = """
import mlx.core as mx
from mlxvr.runtime.device_memory import release_thread
from mlxvr.runtime.worker import Worker

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
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout, done.stderr) == (0, "left open\n", "")


def test_a_thread_that_gave_its_streams_back_may_end_its_turn(monkeypatch):
    """What MLX says then on a GPU."""

    def gone():
        raise RuntimeError("There is no Stream(gpu, 0) in current thread.")

    assert device_lock.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(device_lock.mx, "synchronize", gone)
        device_lock.release()
    assert device_lock.acquire(0.1), "the turn was passed on"
    device_lock.release()


def test_what_has_ended_is_not_kept():
    """A long-lived app asks for months: each question that left a flag behind would be memory lost."""
    worker = Worker()
    for _ in range(3):
        worker.call(lambda _: None)
        worker.run_here(lambda _: None)
        list(worker.stream(lambda _: iter([1, 2])))
        with pytest.raises(ZeroDivisionError):
            worker.call(lambda _: 1 / 0)
    worker.call(lambda _: None)
    assert worker._queue.pending == set()
    worker.close()
