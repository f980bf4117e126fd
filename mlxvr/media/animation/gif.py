"""Split an animated GIF (GIF89a) into its frames, each as a GIF of its own."""

from mlxvr.media.animation.canvas import Animation, Disposal, Patch

__all__ = ["read_gif"]

_TRAILER, _IMAGE, _EXTENSION, _GRAPHIC_CONTROL = 0x3B, 0x2C, 0x21, 0xF9
_DISPOSALS = {2: Disposal.CLEAR, 3: Disposal.RESTORE}
_NO_CONTROL = bytes(4)  # flags, delay (two bytes), transparent colour


def read_gif(data: bytes) -> Animation:
    """Find the frames of a GIF; raises `ValueError` if the file is damaged."""
    reader = _ByteReader(data)
    reader.take(6)  # GIF87a or GIF89a
    screen = reader.take(7)
    palette = reader.take(_palette_size(screen[4]))
    patches: list[Patch] = []
    control = _NO_CONTROL
    while not reader.at_end:  # many files lack the trailer
        kind = reader.take(1)[0]
        if kind == _TRAILER:
            break
        if kind == _EXTENSION:
            label = reader.take(1)[0]
            blocks = reader.blocks()
            if label == _GRAPHIC_CONTROL and len(blocks) >= 6:
                control = blocks[1:5]
        elif kind == _IMAGE:
            place = reader.take(9)
            left, top, width, height = (int.from_bytes(place[start : start + 2], "little") for start in range(0, 8, 2))
            body = reader.take(_palette_size(place[8])) + reader.take(1) + reader.blocks()
            file = b"GIF89a" + place[4:8] + screen[4:] + palette
            file += bytes([_EXTENSION, _GRAPHIC_CONTROL, 4, control[0] & 1, 0, 0, control[3], 0])
            file += bytes([_IMAGE]) + bytes(4) + place[4:] + body + bytes([_TRAILER])
            if width and height:
                delay = 10.0 * int.from_bytes(control[1:3], "little")
                disposal = _DISPOSALS.get(control[0] >> 2 & 7, Disposal.KEEP)
                patches.append(Patch(left, top, (width, height), delay, disposal, blends=True, file=file))
            control = _NO_CONTROL
        else:
            raise ValueError(f"byte {kind:#x} does not begin a block of a GIF")
    return Animation((int.from_bytes(screen[:2], "little"), int.from_bytes(screen[2:4], "little")), patches)


def _palette_size(flags: int) -> int:
    """Return the bytes of a palette, by the flags before it."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


class _ByteReader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    @property
    def at_end(self) -> bool:
        return self.position >= len(self.data)

    def take(self, count: int) -> bytes:
        part = self.data[self.position : self.position + count]
        if len(part) < count:
            raise ValueError("the file ends within a frame")
        self.position += count
        return part

    def blocks(self) -> bytes:
        """Take a chain of blocks, each after its length, including the empty one at its end."""
        start = self.position
        while length := self.take(1)[0]:
            self.take(length)
        return self.data[start : self.position]
