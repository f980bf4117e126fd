"""Read animated GIF, PNG, WebP and AVIF files as clips, with their own frame times.

Pillow decodes them. For the formats that store only the changes from frame to frame (GIF, PNG), `canvas` composes the
frames. Transparent parts become white, as in still pictures.

A frame's time is the sum of the delays before it. Delays of 10 ms or less become 100 ms, as in browsers and FFmpeg:
files with such delays were drawn for programs that were not that fast. An animation is shown once, however often it
asks to be repeated.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlxvr.errors import Cancelled, MediaError
from mlxvr.media.animation.apng import read_apng
from mlxvr.media.animation.canvas import composite
from mlxvr.media.animation.gif import read_gif
from mlxvr.media.container import is_heic
from mlxvr.media.frame_options import ALL_FRAMES, FrameSelection
from mlxvr.media.image import open_image, to_rgb
from mlxvr.media.patches import Frames
from mlxvr.media.resize import resize
from mlxvr.media.sampling import frame_size
from mlxvr.media.selection import select
from mlxvr.media.spec import VisionSpec
from mlxvr.media.video.timeline import Clock, Timeline
from mlxvr.runtime.hooks import NO_HOOKS, Hooks, ShouldStop

__all__ = ["is_animation", "read_animation"]

_FORMATS = frozenset({"AVIF", "GIF", "PNG", "WEBP"})
_OUTLINES = {"GIF": read_gif, "PNG": read_apng}
_TOO_SHORT_MS = 10  # delays up to this are replaced
_USUAL_MS = 100  # by this delay


def is_animation(path: Path) -> bool:
    """Return whether a picture file has several frames to be shown one after another.

    The pages of a TIFF, the pictures of an HEIC collection and the sizes of an icon are not such frames.

    Raises `MediaError` if it cannot be read.
    """
    if is_heic(path):
        return False
    with open_image(path) as image:
        moves = image.format in _FORMATS and bool(getattr(image, "is_animated", False))
        read = _OUTLINES.get(str(image.format))
        return moves and (read is None or len(read(path.read_bytes()).patches) > 1)


def read_animation(
    path: Path, spec: VisionSpec, selection: FrameSelection = ALL_FRAMES, hooks: Hooks = NO_HOOKS
) -> Frames:
    """Sample the frames of an animation; takes and raises the same as `read_video`.

    WebP and AVIF are decoded twice: once for the delays, which Pillow gives only with each frame, and once for the
    frames.
    """
    should_stop = hooks.should_stop
    delays = np.array([delay if delay > _TOO_SHORT_MS else _USUAL_MS for delay in _delays(path, should_stop)]) / 1000
    chosen = select(_timeline(delays), spec, nframes=selection.frames, start=selection.start, end=selection.end)
    pixels, shape = np.empty((0, 0, 0, 3), dtype=np.uint8), (0, 0)
    slot, index = 0, -1
    for index, frame in enumerate(_frames(path, should_stop)):
        if index != chosen.frames[slot]:
            continue
        picture = to_rgb(frame)
        if slot == 0:
            shape = picture.shape[:2]
            pixels = np.empty((len(chosen), *frame_size(*shape, len(chosen), spec), 3), dtype=np.uint8)
        repeats = int((chosen.frames == index).sum())  # sampling by time repeats a frame that is shown for long
        pixels[slot : slot + repeats] = resize(picture, pixels.shape[1:3])
        slot += repeats
        if hooks.progress is not None:
            hooks.progress("decoding", slot, len(chosen))
        if slot == len(chosen):
            break
    if slot < len(chosen):
        raise MediaError(f"{path} is a damaged animation: it holds {index + 1} of {len(delays)} frames; copy it again")
    return Frames(pixels, chosen.seconds, chosen.sampled_fps, chosen.indices, shape, float(delays.sum()))


def _timeline(delays: np.ndarray) -> Timeline:
    """Return the timeline of frames from the seconds for which each is shown."""
    rates = (1 / float(delays[0]),) if np.all(delays == delays[0]) else ()
    clock = Clock(
        seconds=np.concatenate([[0.0], np.cumsum(delays)[:-1]]),
        fps=rates[0] if rates else len(delays) / float(delays.sum()),
        is_variable=not rates,
        duration=float(delays.sum()),
    )
    return Timeline.without_packets(clock, 0.0, rates)


def _delays(path: Path, should_stop: ShouldStop | None) -> Iterator[float]:
    """Yield the milliseconds for which each frame asks to be shown."""
    with open_image(path) as image:
        if read := _OUTLINES.get(str(image.format)):
            yield from (patch.delay for patch in read(path.read_bytes()).patches)
        else:
            yield from (float(frame.info.get("duration") or 0) for frame in _walk(image, should_stop))


def _frames(path: Path, should_stop: ShouldStop | None) -> Iterator[Image.Image]:
    """Yield the whole picture at each frame; an image is valid until the next one is requested."""
    with open_image(path) as image:
        read = _OUTLINES.get(str(image.format))
        for frame in composite(read(path.read_bytes())) if read else _walk(image, should_stop):
            _check(should_stop)
            yield frame


def _walk(image: Any, should_stop: ShouldStop | None) -> Iterator[Image.Image]:
    for number in range(image.n_frames):
        _check(should_stop)
        image.seek(number)
        image.load()
        yield image


def _check(should_stop: ShouldStop | None) -> None:
    if should_stop is not None and should_stop():
        raise Cancelled("stopped while the animation was decoded")
