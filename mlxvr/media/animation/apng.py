"""Split an animated PNG (PNG third edition, sections 4.9 and 11.3.6) into its frames, each as a PNG of its own."""

import struct
import zlib
from collections.abc import Iterator

from mlxvr.media.animation.canvas import Animation, Disposal, Patch

__all__ = ["read_apng"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DISPOSALS = (Disposal.KEEP, Disposal.CLEAR, Disposal.RESTORE)
# After the sequence number: width, height, left, top, delay (numerator, denominator), disposal, blending.
_CONTROL = struct.Struct(">4xIIIIHHBB")


def read_apng(data: bytes) -> Animation:
    """Find the frames of a PNG; raises `ValueError` if the file is damaged.

    A still picture before the frames, for programs that cannot show animations, is not one of them.
    """
    header, shared = b"", b""
    controls: list[tuple[int, ...]] = []
    bodies: list[list[bytes]] = []
    for kind, content in _chunks(data):
        if kind == b"IHDR":
            header = content
        elif kind == b"fcTL":
            if len(content) != _CONTROL.size:
                raise ValueError("a frame's header has the wrong length")
            controls.append(_CONTROL.unpack(content))
            bodies.append([])
        elif kind in (b"IDAT", b"fdAT"):
            if bodies:
                bodies[-1].append(content[4:] if kind == b"fdAT" else content)
        elif kind not in (b"acTL", b"IEND") and not controls:
            shared += _chunk(kind, content)  # palette, transparent colour, gamma and the like
    if len(header) != 13:
        raise ValueError("the file has no header")
    patches: list[Patch] = []
    for (width, height, left, top, numerator, denominator, disposal, blending), parts in zip(controls, bodies):
        if disposal >= len(_DISPOSALS):
            raise ValueError(f"a frame's disposal {disposal} is unknown")
        file = _SIGNATURE + _chunk(b"IHDR", struct.pack(">II", width, height) + header[8:]) + shared
        file += _chunk(b"IDAT", b"".join(parts)) + _chunk(b"IEND", b"")
        delay = 1000 * numerator / (denominator or 100)
        patches.append(Patch(left, top, (width, height), delay, _DISPOSALS[disposal], bool(blending), file))
    width, height = struct.unpack(">II", header[:8])
    return Animation((width, height), patches)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(_SIGNATURE)
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind, content = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        if len(content) < length or len(kind) < 4:
            raise ValueError("the file ends within a frame")
        yield kind, content
        if kind == b"IEND":
            return
        position += 12 + length


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
