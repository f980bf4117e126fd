"""The few bits of a coded frame that say something before it is decoded.

- VP8 (RFC 6386, 9.1): whether the frame is shown, or only kept as a reference.
- HEVC (ITU-T H.265, 7.3.1.2 and ISO/IEC 14496-15, 8.3.3): its temporal layer. A picture marked as "not
referred to" is
  so within its own layer; pictures of higher layers may still refer to it.
"""

from typing import Any

__all__ = ["SKIPPABLE", "hevc_layer", "hevc_length_size", "is_shown_vp8"]

# Codecs in which "no other frame refers to this one" holds without condition.
SKIPPABLE = frozenset({"h264", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9"})

_FIRST_NON_PICTURE = 32  # NAL unit types below are slices of pictures


def is_shown_vp8(packet: Any) -> bool:
    """Whether a VP8 packet gives a frame (the fifth bit of its first byte)."""
    return bool(memoryview(packet)[0] & 0x10)


def hevc_length_size(extradata: bytes | None) -> int | None:
    """Bytes of the length before each unit of a packet; None where units are told apart by start codes instead."""
    if not extradata or len(extradata) < 22 or extradata[0] != 1:
        return None
    return (extradata[21] & 3) + 1


def hevc_layer(packet: Any, length_size: int) -> int | None:
    """The temporal layer of an HEVC packet's picture, 0 for the base; None if it holds no picture."""
    data = memoryview(packet)
    position = 0
    while position + length_size + 2 <= len(data):
        start = position + length_size
        if data[start] >> 1 & 0x3F < _FIRST_NON_PICTURE:
            return (data[start + 1] & 7) - 1
        position = start + int.from_bytes(data[position:start], "big")
    return None
