"""Memory of the accelerator: measure its peak, set its limits, and free it.

This is the only module that asks which backend runs. Memory can be wired on Metal alone, where that keeps a large
model's weights from being paged out between tokens (mlx-lm does the same).
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
    "free_unused",
    "limited",
    "physical_memory",
    "refuse_over",
    "release_thread",
    "track_peak",
    "usable_memory",
    "wired",
]


class Peak:
    """The most bytes that MLX's allocator has held at once since `track_peak` began, for all threads together."""

    def __init__(self) -> None:
        self._before = 0  # the highest before another tracker reset the allocator's mark
        self._is_over = False

    @property
    def bytes(self) -> int:
        """The peak so far."""
        return self._before if self._is_over else max(self._before, int(mx.get_peak_memory()))

    def keep(self, *, is_over: bool = False) -> None:
        """Note the allocator's high-water mark before it is reset; with `is_over`, later marks do not count."""
        self._before, self._is_over = self.bytes, is_over


_lock = threading.Lock()
_peaks: list[Peak] = []  # the peaks that are being tracked; MLX has one high-water mark for all of them


@contextmanager
def track_peak() -> Iterator[Peak]:
    """Track the allocator's peak within the block; an allocation that fails there raises `OutOfMemoryError`.

    Any number of such blocks may overlap.
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
        clear_frames(error.__traceback__)  # frees the arrays of the failed work, which the error would keep alive
        raise OutOfMemoryError(
            f"the model ran out of memory after holding {held:.1f} GiB: use fewer video tokens, a smaller "
            "prefill step, quantized keys and values, or fewer bits per weight"
        ) from error
    finally:
        with _lock:
            peak.keep(is_over=True)
            _peaks.remove(peak)


class _SharedLimit:
    """A limit of the whole process that several users may set at once; the last of them restores the original."""

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
    """Keep arrays allocated within the block in physical memory, up to the system's recommendation; no-op off Metal."""
    if not mx.metal.is_available():
        yield
        return
    with _wired_limit(int(mx.device_info()["max_recommended_working_set_size"])):
        yield


@contextmanager
def limited(gigabytes: float | None) -> Iterator[None]:
    """Make MLX wait for queued operations before it allocates more memory than this; None: use MLX's own limit.

    MLX queues operations ahead of the device and allocates their outputs when it queues them. Near the limit it waits
    for earlier ones to end, which costs a little time. The limit is soft: an operation that needs more still runs.
    """
    if gigabytes is None:
        yield
        return
    with _memory_limit(int(gigabytes * 1e9)):
        yield


def backend() -> str:
    """Return the backend that MLX computes on: "cpu", "metal" or "cuda"."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def avoid_cpu_compiler() -> None:
    """Turn `mx.compile` off if MLX runs on the CPU; a no-op on Metal and CUDA.

    On the CPU, `mx.compile` writes C++ and calls the system's compiler while the program runs. That takes about eight
    seconds for the first answer on a fresh machine, fails on a machine without a compiler, and makes later answers no
    faster (Linux, mlx 0.32.4).
    """
    if backend() == "cpu":
        mx.disable_compile()


def fast_dtype() -> str | None:
    """Return the dtype to compute in if the model's own would be many times slower: float32 on the CPU, else None."""
    return "float32" if backend() == "cpu" else None


def physical_memory() -> int:
    """Return the bytes of memory that the device has, or the machine if MLX does not know the device's."""
    info = mx.device_info()
    known = info.get("memory_size") or info.get("total_memory") or 0
    return int(known) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_memory() -> int:
    """Return the most bytes of memory that MLX should use: on Metal the system's recommendation, elsewhere all of it.

    Metal ends the process if a kernel finds no memory, and no exception handler can catch that.
    """
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or 0) or physical_memory()


def active_memory() -> int:
    """Return the bytes that the MLX arrays of this process take."""
    return int(mx.get_active_memory())


def refuse_over(limit: int, weights: int) -> None:
    """Raise `OutOfMemoryError` if a model's weights (bytes) do not fit into `limit` beside this process's arrays."""
    held = active_memory()
    if held + weights > limit:
        free_unused()
        held = active_memory()
    if held + weights > limit:
        in_use = f" beside the {held / 1e9:.1f} GB that are in use" if held > limit / 100 else ""
        raise OutOfMemoryError(
            f"the model's weights take {weights / 1e9:.1f} GB{in_use}, and MLX may use {limit / 1e9:.1f} GB here: "
            "convert it to fewer bits (4 bits take about a quarter of bfloat16), or use a smaller model"
        )


def clear_cache() -> None:
    """Free the buffers that the allocator keeps for reuse."""
    mx.clear_cache()


def free_unused() -> None:
    """Free all memory that is no longer used; collects cycles, which may take half a second in a large process."""
    gc.collect()  # modules hold each other in cycles
    clear_cache()


def release_thread() -> None:
    """Free the allocator's cache and the calling thread's streams; it must be the thread's last MLX call."""
    clear_cache()
    mx.clear_streams()
