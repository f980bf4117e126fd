"""Collect decoded frames: turn them upright, resize them on a few threads, and keep only the small ones."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from mlxvr.media.resize import resize

__all__ = ["FrameSink", "Orientation"]

_WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Orientation:
    """The turn from stored to displayed pixels: first a transposition, then mirroring."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Self:
        """Read the display matrix, which maps (x, y) to (a x + c y, b x + d y), rounded to a multiple of 90 degrees."""
        data: Any = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return cls()
        a, b, _, c, d = (int(value) for value in np.frombuffer(data, dtype=np.int32)[:5])
        transpose = abs(b) > abs(a)
        return cls(transpose, (c if transpose else a) < 0, (b if transpose else d) < 0)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) after turning; the function is its own inverse."""
        return (width, height) if self.transpose else (height, width)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turn (height, width, 3) pixels."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]


class FrameSink:
    """Takes decoded frames from any thread, resizes them on a few threads and keeps only the small ones.

    At most a few full-size frames wait at any time; `add` blocks while that many wait. `choose_size` maps the (height,
    width) of the first frame, as displayed, to the target size of all frames.
    """

    def __init__(self, count: int, choose_size: Callable[[int, int], tuple[int, int]]) -> None:
        self.count = count
        self.source_size = (0, 0)  # (height, width) as displayed
        self._choose_size = choose_size
        self._pixels: np.ndarray | None = None  # (count, height, width, 3)
        self._orientation = Orientation()
        self._futures: dict[tuple[int, ...], Future[None]] = {}
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(2 * _WORKERS)
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="mlxvr-resize")
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def done(self) -> int:
        """The number of places filled so far."""
        return sum(len(slots) for slots, future in tuple(self._futures.items()) if future.done())

    def add(self, slots: Sequence[int], frame: av.VideoFrame) -> None:
        """Put the frame into the places `slots`."""
        with self._lock:
            if self._pixels is None:
                self._orientation = Orientation.of(frame)
                self.source_size = self._orientation.size(frame.height, frame.width)
                self._pixels = np.empty((self.count, *self._choose_size(*self.source_size), 3), dtype=np.uint8)
            targets = [self._pixels[slot] for slot in slots]
        self._room.acquire()
        self._futures[tuple(slots)] = self._pool.submit(self._convert, targets, frame)

    def finish(self) -> np.ndarray:
        """Wait for the frames added so far and return them: uint8 (count, height, width, 3)."""
        for future in self._futures.values():
            future.result()
        assert self._pixels is not None, "finished before any frame came"
        return self._pixels

    def reset(self) -> None:
        """Forget the frames added so far; they will be added again."""
        wait(self._futures.values())
        self._futures.clear()

    def _convert(self, targets: Sequence[np.ndarray], frame: av.VideoFrame) -> None:
        try:
            if not hasattr(self._local, "reformatter"):
                self._local.reformatter = VideoReformatter()  # one per thread: it keeps its tables between frames
            rgb = self._local.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            stored = self._orientation.size(targets[0].shape[0], targets[0].shape[1])
            upright = self._orientation.apply(resize(rgb, stored))
            for target in targets:
                target[:] = upright
        finally:
            self._room.release()
