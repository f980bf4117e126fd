"""Test clips: real files, written by PyAV, in which every frame carries its own index.

The index is drawn as a board of 8 x 4 black and white cells over the whole frame: 16 bits in the upper two rows, the
same bits inverted in the lower two. It survives lossy coding and resizing to a few dozen pixels, and a frame that is
turned over, mirrored or mixed with another is not mistaken for any index.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

COLUMNS, ROWS = 8, 4


def draw_code(index: int, width: int, height: int, *, low: int = 40, high: int = 215) -> np.ndarray:
    """A frame that shows `index`: uint8 (height, width, 3)."""
    bits = (index >> np.arange(16)) & 1
    board = np.concatenate([bits, 1 - bits]).reshape(ROWS, COLUMNS)
    rows = np.arange(height) * ROWS // height
    columns = np.arange(width) * COLUMNS // width
    gray = np.where(board[rows][:, columns], high, low).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def read_code(pixels: np.ndarray) -> int | None:
    """The index that a frame (height, width, 3) shows, or None if it shows none."""
    gray = pixels.astype(np.float32).mean(axis=2)
    height, width = gray.shape
    board = np.empty((ROWS, COLUMNS))
    for row in range(ROWS):
        for column in range(COLUMNS):  # the middle half of each cell
            y = slice(int((row + 0.25) * height / ROWS), max(int((row + 0.75) * height / ROWS), 1))
            x = slice(int((column + 0.25) * width / COLUMNS), max(int((column + 0.75) * width / COLUMNS), 1))
            board[row, column] = gray[y, x].mean()
    if np.any(np.abs(board - 128) < 30):
        return None
    bits = (board > 128).reshape(2, 16)
    return int((bits[0] << np.arange(16)).sum()) if np.all(bits[0] != bits[1]) else None


def read_codes(pixels: np.ndarray) -> list[int | None]:
    """`read_code` of every frame of (n, height, width, 3)."""
    return [read_code(frame) for frame in pixels]


def write_clip(
    path: Path,
    *,
    frames: int = 60,
    fps: int | Fraction = 30,
    size: tuple[int, int] = (128, 96),
    codec: str = "libx264",
    gop: int = 12,
    bframes: int | None = None,
    times: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    rotation: int = 0,
    audio_seconds: float = 0.0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    images: Sequence[np.ndarray] | None = None,
    pix_fmt: str = "yuv420p",
) -> Path:
    """Write a clip whose k-th frame shows k.

    Args:
        path: the suffix chooses the container.
        frames, fps, size, codec, gop, bframes: the stream; size is (width, height).
        times: presentation time of every frame in units of `time_base` (default: constant rate).
        rotation: degrees counter-clockwise that a player has to turn the stored frames.
        audio_seconds: length of a silent sound track beside the video.
        options, container_options: for the encoder and for the muxer.
        images: frames to write instead of drawn codes, uint8 (height, width, 3).
    """
    width, height = size
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.gop_size = gop
        if bframes is not None:
            stream.codec_context.max_b_frames = bframes
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        sound = (
            container.add_stream("aac" if path.suffix != ".webm" else "libopus", rate=48_000) if audio_seconds else None
        )
        for index in range(len(images) if images is not None else frames):
            pixels = images[index] if images is not None else draw_code(index, width, height)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index if times is None else times[index]
            frame.time_base = time_base or 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _write_silence(container, sound, audio_seconds)
    return path


def write_sound(path: Path, seconds: float = 1.0) -> Path:
    """A file with a sound track and no picture."""
    with av.open(str(path), "w") as container:
        _write_silence(container, container.add_stream("aac", rate=48_000), seconds)
    return path


def _write_silence(container: Any, stream: Any, seconds: float) -> None:
    for start in range(0, int(seconds * 48_000), 960):
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 960), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48_000
        frame.pts = start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
