"""Memory on the accelerator: what was used at most, what may be wired, and giving it back.

The one place that asks which backend runs: wiring memory exists on Metal alone, where it keeps a large model's weights
from being paged out between tokens (mlx-lm does the same).
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlxvr.errors import OutOfMemoryError

__all__ = [
    "avoid_cpu_compiler",
    "backend",
    "fast_dtype",
    "limited",
    "physical_memory",
    "release_thread",
    "track_peak",
    "wired",
]


class Peak:
    """The most bytes that MLX's allocator held at once since `track_peak` began."""

    @property
    def bytes(self) -> int:
        """The peak so far."""
        return int(mx.get_peak_memory())


@contextmanager
def track_peak() -> Iterator[Peak]:
    """Reset the allocator's high-water mark and report it; turns an allocation failure into `OutOfMemoryError`."""
    mx.reset_peak_memory()
    try:
        yield Peak()
    except RuntimeError as error:
        if "allocate" not in str(error).lower():
            raise
        held = mx.get_peak_memory() / 2**30
        raise OutOfMemoryError(
            f"the model ran out of memory after holding {held:.1f} GiB: use fewer video tokens, a smaller "
            "prefill step, quantized keys and values, or fewer bits per weight"
        ) from error


@contextmanager
def wired() -> Iterator[None]:
    """Keep what is allocated inside in physical memory, as far as the system recommends; a no-op off Metal."""
    if not mx.metal.is_available():
        yield
        return
    limit = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(limit)


@contextmanager
def limited(gigabytes: float | None) -> Iterator[None]:
    """Let MLX wait for work in line before it takes more memory than this; None: its own limit.

    MLX prepares work ahead of the device, and what waits in line has its memory already. Near the limit it waits,
    which costs a little time; beyond it the work goes on.
    """
    if gigabytes is None:
        yield
        return
    limit = mx.set_memory_limit(int(gigabytes * 1e9))
    try:
        yield
    finally:
        mx.set_memory_limit(limit)


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


def release_thread() -> None:
    """Free the allocator's cache and the calling thread's streams; the last MLX call that a thread makes."""
    gc.collect()  # modules hold each other in cycles
    mx.clear_cache()
    mx.clear_streams()
