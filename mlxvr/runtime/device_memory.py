"""Memory on the accelerator: what was used at most, what may be wired, and giving it back.

The one place that asks which backend runs: wiring memory exists on Metal alone, where it keeps a large model's weights
from being paged out between tokens (mlx-lm does the same).
"""

import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from traceback import clear_frames

import mlx.core as mx

from mlxvr.errors import OutOfMemoryError

__all__ = [
    "active_memory",
    "avoid_cpu_compiler",
    "backend",
    "clear_cache",
    "fast_dtype",
    "give_back",
    "limited",
    "physical_memory",
    "refuse_over",
    "release_thread",
    "track_peak",
    "usable_memory",
    "wired",
]


class Peak:
    """The most bytes that MLX's allocator held at once since `track_peak` began, whatever thread asked for them."""

    def __init__(self) -> None:
        self._before = 0  # the highest before another tracker reset the allocator's mark
        self._is_over = False

    @property
    def bytes(self) -> int:
        """The peak so far."""
        return self._before if self._is_over else max(self._before, int(mx.get_peak_memory()))

    def keep(self, *, is_over: bool = False) -> None:
        """Note the allocator's mark, which is about to be reset; `is_over`: nothing later counts."""
        self._before, self._is_over = self.bytes, is_over


_lock = threading.Lock()
_peaks: list[Peak] = []  # that are being tracked; there is one high-water mark for all


@contextmanager
def track_peak() -> Iterator[Peak]:
    """Reset the allocator's high-water mark and report it; turns an allocation failure into `OutOfMemoryError`.

    Any number of them may overlap.
    """
    peak = Peak()
    with _lock:
        for tracked in _peaks:
            tracked.keep()
        mx.reset_peak_memory()
        _peaks.append(peak)
    try:
        yield peak
    except RuntimeError as error:
        if "allocate" not in str(error).lower():
            raise
        held = peak.bytes / 2**30
        clear_frames(error.__traceback__)  # the arrays of the failed work go now, not with the error
        raise OutOfMemoryError(
            f"the model ran out of memory after holding {held:.1f} GiB: use fewer video tokens, a smaller "
            "prefill step, quantized keys and values, or fewer bits per weight"
        ) from error
    finally:
        with _lock:
            peak.keep(is_over=True)
            _peaks.remove(peak)


class _SharedLimit:
    """A limit of the whole process, wanted by any number of users at once; the last one puts back what was there."""

    def __init__(self, set_limit: Callable[[int], int], choose: Callable[[Iterable[int]], int]):
        self._set, self._choose = set_limit, choose
        self._wanted: list[int] = []
        self._original = 0

    @contextmanager
    def __call__(self, limit: int) -> Iterator[None]:
        with _lock:
            self._wanted.append(limit)
            before = self._set(self._choose(self._wanted))
            if len(self._wanted) == 1:
                self._original = before
        try:
            yield
        finally:
            mx.synchronize()
            with _lock:
                self._wanted.remove(limit)
                self._set(self._choose(self._wanted) if self._wanted else self._original)


_wired_limit = _SharedLimit(lambda limit: mx.set_wired_limit(limit), max)
_memory_limit = _SharedLimit(lambda limit: mx.set_memory_limit(limit), min)


@contextmanager
def wired() -> Iterator[None]:
    """Keep what is allocated inside in physical memory, as far as the system recommends; a no-op off Metal."""
    if not mx.metal.is_available():
        yield
        return
    with _wired_limit(int(mx.device_info()["max_recommended_working_set_size"])):
        yield


@contextmanager
def limited(gigabytes: float | None) -> Iterator[None]:
    """Let MLX wait for work in line before it takes more memory than this; None: its own limit.

    MLX prepares work ahead of the device, and what waits in line has its memory already. Near the limit it waits,
    which costs a little time; beyond it the work goes on.
    """
    if gigabytes is None:
        yield
        return
    with _memory_limit(int(gigabytes * 1e9)):
        yield


def backend() -> str:
    """What MLX computes on: "cpu", "metal" or "cuda"."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def avoid_cpu_compiler() -> None:
    """Turn `mx.compile` off where MLX runs on the CPU; a no-op on Metal and CUDA.

    There it writes C++ and calls the system's compiler while the program runs: some eight seconds for the first answer
    on a fresh machine, an error on one without a compiler, and no faster afterwards (Linux, mlx 0.32.4).
    """
    if backend() == "cpu":
        mx.disable_compile()


def fast_dtype() -> str | None:
    """The dtype to compute in where a model's own would be many times slower: float32 on the CPU; None: its own."""
    return "float32" if backend() == "cpu" else None


def physical_memory() -> int:
    """How many bytes of memory the device has; where MLX does not say, the machine."""
    info = mx.device_info()
    known = info.get("memory_size") or info.get("total_memory") or 0
    return int(known) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_memory() -> int:
    """How many bytes of memory MLX should use at most: on Metal what the system recommends, elsewhere all there is.

    Metal ends the process when a kernel finds no memory, which nothing can catch.
    """
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or 0) or physical_memory()


def active_memory() -> int:
    """How many bytes MLX's arrays of this process take."""
    return int(mx.get_active_memory())


def refuse_over(limit: int, weights: int) -> None:
    """Raise `OutOfMemoryError` when a model's weights do not fit beside what this process holds."""
    held = active_memory()
    if held + weights > limit:
        give_back()
        held = active_memory()
    if held + weights > limit:
        beside = f" beside the {held / 1e9:.1f} GB that are in use" if held > limit / 100 else ""
        raise OutOfMemoryError(
            f"the model's weights take {weights / 1e9:.1f} GB{beside}, and MLX may use {limit / 1e9:.1f} GB here: "
            "convert it to fewer bits (4 bits take about a quarter of bfloat16), or use a smaller model"
        )


def clear_cache() -> None:
    """Free the buffers that the allocator keeps for later."""
    mx.clear_cache()


def give_back() -> None:
    """Free all that is no longer used; looks for cycles, which takes a good part of a second in a large process."""
    gc.collect()  # modules hold each other in cycles
    clear_cache()


def release_thread() -> None:
    """Free the allocator's cache and the calling thread's streams; the last MLX call that a thread makes."""
    clear_cache()
    mx.clear_streams()
