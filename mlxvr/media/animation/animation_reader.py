"""Animated GIF, PNG, WebP and AVIF files as clips, with their own frame times.

Pillow decodes them; formats that say only what changes from frame to frame (GIF, PNG) are put together in `canvas`.
Frames lie on white, like still pictures.

A frame's time is the sum of the delays before it. Delays of 10 ms or less are shown as 100 ms, as browsers and FFmpeg
do: files that ask for them were drawn for programs that could not be so fast. An animation is shown once, however often
it asks to be repeated.
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
from mlxvr.media.frames import Frames
from mlxvr.media.image import open_image, to_rgb
from mlxvr.media.resize import resize
from mlxvr.media.sampling import frame_size
from mlxvr.media.selection import select
from mlxvr.media.spec import VisionSpec
from mlxvr.media.video.timeline import Timeline
from mlxvr.runtime.hooks import Progress, ShouldStop

__all__ = ["is_animation", "read_animation"]

_FORMATS = frozenset({"AVIF", "GIF", "PNG", "WEBP"})
_OUTLINES = {"GIF": read_gif, "PNG": read_apng}
_HARDLY_ANY = 10  # ms: delays up to this are not meant
_USUAL = 100  # ms: what is shown instead


def is_animation(path: Path) -> bool:
    """Whether a picture file has several frames that are meant to be shown one after another.

    The pages of a TIFF, the pictures of an HEIC collection and the sizes of an icon are not.

    Raises `MediaError` if it cannot be read.
    """
    if is_heic(path):
        return False
    with open_image(path) as image:
        moves = image.format in _FORMATS and bool(getattr(image, "is_animated", False))
        read = _OUTLINES.get(str(image.format))
        return moves and (read is None or len(read(path.read_bytes()).patches) > 1)


def read_animation(
    path: Path,
    spec: VisionSpec,
    *,
    nframes: int | None = None,
    start: float | None = None,
    end: float | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Frames:
    """Sample the frames of an animation; arguments and errors are `read_video`'s.

    WebP and AVIF are decoded twice: once for the delays, which Pillow knows with each frame, once for the frames.
    """
    delays = np.array([delay if delay > _HARDLY_ANY else _USUAL for delay in _delays(path, should_stop)]) / 1000
    chosen = select(_timeline(delays), spec, nframes=nframes, start=start, end=end)
    pixels, shape = np.empty((0, 0, 0, 3), dtype=np.uint8), (0, 0)
    slot, index = 0, -1
    for index, frame in enumerate(_frames(path, should_stop)):
        if index != chosen.frames[slot]:
            continue
        picture = to_rgb(frame)
        if slot == 0:
            shape = picture.shape[:2]
            pixels = np.empty((len(chosen), *frame_size(*shape, len(chosen), spec), 3), dtype=np.uint8)
        again = int((chosen.frames == index).sum())  # sampled by time, a frame is seen as often as it is long
        pixels[slot : slot + again] = resize(picture, pixels.shape[1:3])
        slot += again
        if progress is not None:
            progress("decoding", slot, len(chosen))
        if slot == len(chosen):
            break
    if slot < len(chosen):
        raise MediaError(f"{path} is a damaged animation: it holds {index + 1} of {len(delays)} frames; copy it again")
    return Frames(pixels, chosen.seconds, chosen.sampled_fps, chosen.indices, shape, float(delays.sum()))


def _timeline(delays: np.ndarray) -> Timeline:
    """The timeline of frames that are shown for so many seconds each."""
    rates = (1 / float(delays[0]),) if np.all(delays == delays[0]) else ()
    none = np.empty(0, dtype=np.int64)
    return Timeline(
        seconds=np.concatenate([[0.0], np.cumsum(delays)[:-1]]),
        fps=rates[0] if rates else len(delays) / float(delays.sum()),
        is_variable=not rates,
        duration=float(delays.sum()),
        offset=0.0,
        rates=rates,
        can_skip=False,
        pts=none,
        positions=none,
        packet_pts=none,
        key_positions=none,
        key_pts=none,
    )


def _delays(path: Path, should_stop: ShouldStop | None) -> Iterator[float]:
    """Milliseconds that each frame asks to be shown."""
    with open_image(path) as image:
        if read := _OUTLINES.get(str(image.format)):
            yield from (patch.delay for patch in read(path.read_bytes()).patches)
        else:
            yield from (float(frame.info.get("duration") or 0) for frame in _walk(image, should_stop))


def _frames(path: Path, should_stop: ShouldStop | None) -> Iterator[Image.Image]:
    """What is seen during each frame; an image is good until the next is asked for."""
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
