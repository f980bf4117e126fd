"""Read the stamps and marks of a stream's packets, and the few bits of a coded frame that matter before decoding.

- VP8 (RFC 6386, 9.1): whether the frame is shown, or only kept as a reference.
- HEVC (ITU-T H.265, 7.3.1.2 and ISO/IEC 14496-15, 8.3.3): its temporal layer. A picture marked as "not referred to" is
  so within its own layer; pictures of higher layers may still refer to it.
"""

import logging
from typing import Any

import numpy as np

from mlxvr.media.video.timestamps import FAR_SECONDS

__all__ = ["PacketTable"]

logger = logging.getLogger(__name__)

# Codecs whose mark "no other frame refers to this one" holds unconditionally.
_SKIPPABLE = frozenset({"h264", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9"})

_FIRST_NON_PICTURE = 32  # NAL unit types below are slices of pictures


class PacketTable:
    """The stamps and marks of a stream's packets, in the order of decoding."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.pts: list[int] = []
        self.shown: list[bool] = []
        self.keys: list[int] = []  # positions of keyframes
        self.durations: list[int] = []  # in ticks
        self._dts: list[int | None] = []
        self._stream = stream
        self._has_own_stamps = container.format.name != "avi"  # the demuxer makes up those of AVI
        self._codec = stream.codec_context.name
        self._length_size = _hevc_length_size(stream.codec_context.extradata) if self._codec == "hevc" else None
        self.can_skip = self._codec in _SKIPPABLE or self._length_size is not None

    def __len__(self) -> int:
        return len(self.pts)

    def add(self, packet: Any) -> bool:
        """Add the next packet; return False if it has no reliable stamp."""
        if not self._has_own_stamps or packet.pts is None:
            return False
        if packet.is_keyframe:
            self.keys.append(len(self.pts))
        if self.can_skip and self._length_size is not None:
            self.can_skip = not _hevc_layer(packet, self._length_size)  # while all are in the base layer
        hidden = self._codec == "vp8" and not _is_shown_vp8(packet)
        self.shown.append(not (packet.is_discard or packet.is_corrupt or hidden))
        self.pts.append(packet.pts)
        self.durations.append(packet.duration or 0)
        self._dts.append(packet.dts)
        return True

    def shown_positions(self) -> np.ndarray:
        """Return the positions of the packets that are shown, in the order of showing: int64 (n,)."""
        positions = np.flatnonzero(self.shown)
        return positions[np.argsort(np.array(self.pts, dtype=np.int64)[positions], kind="stable")]

    def is_in_order(self, positions: np.ndarray) -> bool:
        """Return whether all frames have different stamps, and keyframes are stored in the order of showing."""
        pts = np.array(self.pts, dtype=np.int64)
        return bool(self.keys) and bool(np.all(np.diff(pts[positions]) > 0) and np.all(np.diff(pts[self.keys]) > 0))

    def corrected_stamps(self, positions: np.ndarray) -> np.ndarray:
        """Return the stamps of frames, with those corrected that their decoding stamps refute: int64 (n,).

        If frames are stored in the order of showing, the two stamps of a packet differ by a constant. This
        distinguishes a wrong stamp of the last frame from a pause before it.
        """
        pts = np.array(self.pts, dtype=np.int64)[positions]
        known = [dts for dts in self._dts if dts is not None]
        if self._stream.codec_context.has_b_frames or len(known) < len(self._dts):
            return pts
        dts = np.array(known, dtype=np.int64)[positions]
        distance = int(np.median(pts - dts))
        is_wrong = np.abs(pts - dts - distance) * float(self._stream.time_base) > FAR_SECONDS
        mended = np.where(is_wrong, dts + distance, pts)
        if not np.any(is_wrong) or np.any(np.diff(mended) <= 0):
            return pts
        logger.warning("%d of the video's time stamps are far out: its decoding stamps replace them", is_wrong.sum())
        return mended


def _is_shown_vp8(packet: Any) -> bool:
    """Return whether a VP8 packet is shown (the fifth bit of its first byte)."""
    return bool(memoryview(packet)[0] & 0x10)


def _hevc_length_size(extradata: bytes | None) -> int | None:
    """Return the bytes of the length before each unit of a packet; None if start codes separate the units instead."""
    if not extradata or len(extradata) < 22 or extradata[0] != 1:
        return None
    return (extradata[21] & 3) + 1


def _hevc_layer(packet: Any, length_size: int) -> int | None:
    """Return the temporal layer of an HEVC packet's picture, 0 for the base; None if it holds no picture."""
    data = memoryview(packet)
    position = 0
    while position + length_size + 2 <= len(data):
        start = position + length_size
        if data[start] >> 1 & 0x3F < _FIRST_NON_PICTURE:
            return (data[start + 1] & 7) - 1
        position = start + int.from_bytes(data[position:start], "big")
    return None
