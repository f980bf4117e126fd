"""Read the media of a dataset's rows from disk, one row ahead of the caller."""

import threading
import time
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from mlxvr.data.rows import Row
from mlxvr.media.frame_options import FrameSelection
from mlxvr.media.patches import VisionInput
from mlxvr.media.spec import VisionSpec
from mlxvr.media.vision import load_vision
from mlxvr.runtime.hooks import Hooks, ShouldStop

__all__ = ["load_row", "read_ahead"]


def load_row(row: Row, spec: VisionSpec, *, should_stop: ShouldStop | None = None) -> VisionInput | None:
    """Read the clip, the frames or the image of a row; None for text alone.

    Args:
        row: a row of a dataset; its `frames_fps` replaces the fps of `spec`.
        spec: how frames are sampled and sized.
        should_stop: called between frames.

    Raises:
        MediaError: the file cannot be read as a video or an image, or the range is empty.
        DataError: a folder of frames holds none.
        Cancelled: `should_stop` returned True.
    """
    source: Any = row.source()
    if source is None:
        return None
    return load_vision(
        source,
        spec.with_overrides(fps=row.frames_fps),
        FrameSelection(start=row.start, end=row.end),
        Hooks(should_stop=should_stop),
    )


def read_ahead(
    rows: Iterable[Row], spec: VisionSpec
) -> Generator[tuple[VisionInput | Exception | None, float], None, None]:
    """Yield each row's vision input and the seconds that reading it took, while another thread reads the next row.

    An error is yielded instead of raised, since it concerns that row alone. Close the generator to stop the thread.
    """
    stop = threading.Event()

    def read(row: Row) -> tuple[VisionInput | Exception | None, float]:
        started = time.perf_counter()
        vision: VisionInput | Exception | None
        try:
            vision = load_row(row, spec, should_stop=stop.is_set)
        except Exception as error:  # a decoder may raise anything about a broken file
            vision = error
        return vision, time.perf_counter() - started

    with ThreadPoolExecutor(1, thread_name_prefix="mlxvr-frames") as pool:
        try:
            coming = None
            for row in chain(rows, [None]):
                ready, coming = coming, None if row is None else pool.submit(read, row)
                if ready is not None:
                    yield ready.result()
        finally:
            stop.set()
