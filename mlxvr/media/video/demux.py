"""Open a file with FFmpeg and choose its video stream; FFmpeg's errors become ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from mlxvr.errors import MediaError
from mlxvr.media.container import unreadable

__all__ = ["open_video"]

# Titles and comments are written in any encoding, and none of them matters here. PyAV 18 raises on bytes that are not
# UTF-8 unless it is told otherwise; PyAV 19 never raises and no longer takes the argument.
_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


@contextmanager
def open_video(path: Path, *, threads: int = 0) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, to be decoded on `threads` threads (0: FFmpeg's choice, all cores).

    Raises `MediaError` if the file cannot be read or holds no video, and for FFmpeg's errors within the
    block.
    """
    try:
        # Local files only: a playlist must not make us fetch anything. The prefix: a colon in a name ends no protocol.
        container = av.open(f"file:{path}", container_options={"protocol_whitelist": "file"}, **_METADATA)
    except av.error.FFmpegError as error:
        raise unreadable(path) from error
    with container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"  # FFmpeg's default, by slices, does nothing for most files
        stream.thread_count = threads
        try:
            yield container, stream
        except av.error.FFmpegError as error:
            raise MediaError(f"{path} is damaged ({error.strerror}): copy or download it again") from error


def _video_stream(container: Any, path: Path) -> Any:
    name = container.format.name
    if name in ("tty", "image2", "ico") or name.endswith("_pipe"):  # any .txt is ANSI art to FFmpeg; or a still picture
        raise unreadable(path)
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        found = "sound but no moving picture" if container.streams.audio else "no moving picture"
        raise MediaError(f"{path} holds {found}: give a file with a video track")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise MediaError(f"{path} is coded in a way that FFmpeg cannot decode: convert it to H.264")
    return stream
