"""What a row of a dataset shows, read from disk."""

from typing import Any

from mlxvr.callbacks import ShouldStop
from mlxvr.dataset import Row
from mlxvr.media.patches import VisionInput
from mlxvr.media.spec import VisionSpec
from mlxvr.media.vision import load_vision

__all__ = ["load_row"]


def load_row(row: Row, spec: VisionSpec, *, should_stop: ShouldStop | None = None) -> VisionInput | None:
    """Read the clip, the frames or the image of a row; None for text alone.

    Args:
        row: of a dataset; its `frames_fps` takes the place of the fps in `spec`.
        spec: how frames are sampled and sized.
        should_stop: asked between frames.

    Raises:
        MediaError: the file cannot be read as a video or an image, or the range is empty.
        DataError: a folder of frames holds none.
        Cancelled: `should_stop` said so.
    """
    source: Any = row.source()
    if source is None:
        return None
    return load_vision(
        source, spec.with_overrides(fps=row.frames_fps), start=row.start, end=row.end, should_stop=should_stop
    )
