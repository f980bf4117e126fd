"""What is one for the whole process: limits that several want at once, and the allocator's high-water mark."""

import threading

import mlx.core as mx
import pytest

from mlxvr.errors import OutOfMemoryError
from mlxvr.runtime import device_memory


@pytest.fixture
def metal(monkeypatch):
    """A Metal device that notes the limits it is given."""
    limits = [7]

    def set_wired_limit(limit):
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1000, "memory_size": 1500})
    return limits


def test_memory_stays_wired_until_the_last_user_is_done(metal):
    """Two reasoners answer in turns: the end of one answer must not unwire the other's weights."""
    first, second = device_memory.wired(), device_memory.wired()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert metal[-1] == 1000
    with device_memory.wired():
        assert metal[-1] == 1000
    assert metal[-1] == 1000
    second.__exit__(None, None, None)
    assert metal[-1] == 7  # what was set before the first


def test_the_wired_limit_comes_back_after_an_error(metal):
    with pytest.raises(ZeroDivisionError), device_memory.wired(), device_memory.wired():
        raise ZeroDivisionError
    assert metal[-1] == 7


def test_what_may_be_used_is_what_metal_recommends(metal):
    assert device_memory.usable_memory() == 1000
    assert device_memory.physical_memory() == 1500


def test_the_lowest_of_several_memory_limits_holds():
    before = mx.set_memory_limit(10**12)
    mx.set_memory_limit(before)
    with device_memory.limited(3.0):
        with device_memory.limited(2.0), device_memory.limited(None):
            assert mx.set_memory_limit(2 * 10**9) == 2 * 10**9
        assert mx.set_memory_limit(3 * 10**9) == 3 * 10**9
    assert mx.set_memory_limit(before) == before


def test_peaks_that_overlap_do_not_hide_each_other():
    with device_memory.track_peak() as outer:
        large = mx.zeros(4_000_000)
        mx.eval(large)
        del large
        with device_memory.track_peak() as inner:
            small = mx.zeros(1_000_000)
            mx.eval(small)
        del small
        mx.clear_cache()
    assert outer.bytes > 16_000_000
    assert 4_000_000 <= inner.bytes < outer.bytes
    seen = inner.bytes
    mx.eval(mx.zeros(8_000_000))
    assert inner.bytes == seen  # what comes after the end does not count


def test_a_peak_of_one_thread_survives_the_reset_of_another():
    begun, go_on = threading.Event(), threading.Event()
    peaks = []

    def work():
        with device_memory.track_peak() as peak:
            mx.eval(mx.zeros(4_000_000))
            begun.set()
            go_on.wait(10)
            peaks.append(peak.bytes)
        device_memory.release_thread()

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(10)
    with device_memory.track_peak():
        pass
    go_on.set()
    thread.join()
    assert peaks[0] >= 16_000_000


def test_weights_that_do_not_fit_are_refused_with_the_numbers():
    held = device_memory.active_memory()
    device_memory.refuse_over(held + 3_000_000_000, 2_900_000_000)
    with pytest.raises(OutOfMemoryError, match=r"weights take 3\.1 GB.*may use 3\.0 GB here.*fewer bits"):
        device_memory.refuse_over(3_000_000_000, 3_100_000_000)
    kept = mx.zeros(5_000_000)
    mx.eval(kept)
    with pytest.raises(OutOfMemoryError, match=r"beside the 0\.0 GB that are in use"):
        device_memory.refuse_over(device_memory.active_memory() + 10, 20)
    del kept
