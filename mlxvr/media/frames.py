"""The frames of a clip as the model sees them: resized pixels, and when each was shown."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Frames"]


@dataclass(frozen=True, eq=False)
class Frames:
    """Sampled frames at their target size.

    `seconds` are `index / fps` where the stream runs at a constant rate. Where it does not, they are the moments that
    were sampled (by time) or the real times of the frames (by index). They count from where a player's clock starts:
    the first frame, or a track of sound that starts earlier.
    """

    pixels: np.ndarray  # uint8 (n, height, width, 3), RGB
    seconds: np.ndarray  # float64 (n,): source time of each frame
    sampled_fps: float  # frames per second of source time
    indices: np.ndarray  # int64 (n,): index of each frame in presentation order (in the part of a large file that was
    # read, if its rate varies)
    source_size: tuple[int, int]  # (height, width) as displayed, before resizing
    duration: float  # seconds of the whole clip, on the same clock

    def __len__(self) -> int:
        return len(self.pixels)
