"""Identify a file by its first bytes and its outline, so that an error can name what is wrong with it.

FFmpeg reports "invalid data" for a text file and for a video that was cut off in the middle, and reads a cut mkv, webm
or avi file as if it were whole. The outlines of the three common containers (ISO base media, Matroska, RIFF) state how
long the file should be, which reveals a cut: ISO/IEC 14496-12 section 4.2 (boxes), RFC 8794 section 4 to 6 (EBML), and
Microsoft's RIFF (chunks).
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from mlxvr.errors import MediaError
from mlxvr.storage.paths import explain_missing

__all__ = ["check_file", "is_heic", "is_image", "missing_bytes", "unreadable"]

_HEIC_BRANDS = {b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevm", b"hevs", b"hevx"}  # ISO/IEC 23008-12, annex B
_AVIF_BRANDS = {b"avif", b"avis"}
_IMAGE_BRANDS = _HEIC_BRANDS | _AVIF_BRANDS | {b"mif1", b"msf1"}
_IMAGE_BEGINNINGS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*"),  # JPEG, PNG, GIF, BMP, TIFF
    *(b"\0\0\1\0", b"icns", b"8BPS", b"qoif", b"DDS "),  # icons, Photoshop, QOI, DDS
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),  # JPEG 2000
)
RAW_PHOTO = "a raw photo, of which only a small preview can be read: export it as HEIC or JPEG"
_JPEG_XL = "a JPEG XL picture, which Pillow cannot read: convert it to PNG or JPEG"
_FOREIGN = {
    b"\x00\x05\x16\x07": "an AppleDouble file, which macOS puts beside a file: give the file without `._`",  # RFC 1740
    b"%PDF-": "a PDF document: export the page as an image",
    b"\xff\x0a": _JPEG_XL,
    b"\0\0\0\x0cJXL ": _JPEG_XL,
    b"version https://git-lfs.github.com/spec/": "a pointer of Git LFS, not the file itself: run `git lfs pull`",
}
_RAW_SUFFIXES = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"}
_SHOWN_CHARACTERS = 200  # the most characters of a path in a message
_UNKNOWN_SIZE = -1


def check_file(path: Path) -> None:
    """Raise `MediaError` unless the path is a file that can be read and is not empty."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(f"{path} {explain_missing(path)}") from None
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a folder that may not be entered
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{str(path)[:_SHOWN_CHARACTERS]} cannot be looked up ({reason}): check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(f"{path} is a folder: give the path of a video or image file")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path} is not a regular file: give the path of a video or image file")
    if status.st_size == 0:
        raise MediaError(f"{path} is empty (0 bytes): copy or download it again")
    try:
        head = _head(path)
    except PermissionError:
        raise MediaError(
            f"{path} may not be read: check its permissions, on a Mac also System Settings > Privacy & Security > "
            "Files and Folders"
        ) from None
    except OSError as error:  # for example, a file in iCloud while the Mac is offline
        raise MediaError(f"{path} cannot be read ({error.strerror}): copy or download it again") from None
    if nature := _foreign(path, head):
        raise MediaError(f"{path} is {nature}")


def is_image(path: Path) -> bool:
    """Return whether the file's first bytes are those of a still or animated picture (not of a video)."""
    head = _head(path)
    if head.startswith(_IMAGE_BEGINNINGS):
        return True
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return True
    return head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS


def is_heic(path: Path) -> bool:
    """Return whether a picture file belongs to the HEIF family, like the photos of phones, and is not AVIF."""
    head = _head(path)
    if head[4:8] != b"ftyp" or head[8:12] not in _IMAGE_BRANDS:
        return False
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12], *(head[place : place + 4] for place in range(16, end, 4))}
    return not brands & _AVIF_BRANDS


def missing_bytes(path: Path) -> int:
    """Return how many bytes the file is shorter than its outline states; 0 if it is whole, or has no known outline."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        file.seek(0)
        if head[4:8] in (b"ftyp", b"styp", b"moov", b"mdat", b"free", b"wide", b"skip"):
            end, _ = _walk_boxes(file, size)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            end = _matroska_end(file)
        elif head[:4] == b"RIFF":
            end = 8 + int.from_bytes(head[4:8], "little")
        else:
            return 0
    return max(0, end - size)


def unreadable(path: Path) -> MediaError:
    """Return the error for a file that no demuxer accepts, with a description of what it looks like."""
    size, head = path.stat().st_size, _head(path)
    with path.open("rb") as file:
        _, boxes = _walk_boxes(file, size) if head[4:8] == b"ftyp" else (0, set())
    if missing := missing_bytes(path):
        index = " and its index (moov), written last, is missing" if boxes and b"moov" not in boxes else ""
        return MediaError(f"{path} is cut short: {missing:,} bytes are missing{index}; copy or download it again")
    if boxes and b"moov" not in boxes:
        return MediaError(f"{path} is cut short: its index (moov) is missing; copy or download it again")
    kind = "text" if _is_text(head) else "an image" if is_image(path) else "an unknown or damaged format"
    return MediaError(f"{path} is not a video: it holds {kind}; give an mp4, mov, mkv, webm, avi or ts file")


def _foreign(path: Path, head: bytes) -> str:
    """Return what a file is if it is known to be no video or image, and what to do about it; else ""."""
    for beginning, nature in _FOREIGN.items():
        if head.startswith(beginning):
            return nature
    if path.suffix.lower() in _RAW_SUFFIXES:
        return RAW_PHOTO
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file that was to be downloaded: download it again"
    if start.startswith((b"<svg", b"<?xml", b"<!doctype svg")) and b"<svg" in start:
        return "an SVG drawing: export it as PNG"
    return ""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _is_text(head: bytes) -> bool:
    return not any(byte < 9 or 13 < byte < 32 for byte in head)


def _walk_boxes(file: BinaryIO, size: int) -> tuple[int, set[bytes]]:
    """Return (the end of the last box by its stated length, the types of the boxes at the top level)."""
    position, types = 0, set()
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        types.add(header[4:8])
        if length == 1:  # the length did not fit 32 bits
            length = int.from_bytes(header[8:16], "big")
        if length == 0:  # the box reaches to the end of the file
            return size, types
        if length < 8:  # not a box: the outline cannot be trusted from here on
            return size, types
        position += length
    return position, types


def _matroska_end(file: BinaryIO) -> int:
    """Return the end of the segment by its stated length; 0 if it states none (a live recording)."""
    file.seek(4)
    header_size = _read_vint(file)
    if header_size == _UNKNOWN_SIZE:
        return 0
    file.seek(header_size, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    segment_size = _read_vint(file)
    return 0 if segment_size == _UNKNOWN_SIZE else file.tell() + segment_size


def _read_vint(file: BinaryIO) -> int:
    """Read an EBML number of 1 to 8 bytes: the place of the first set bit gives its length; all ones mean "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return _UNKNOWN_SIZE
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big") & ((1 << 7 * length) - 1)
    return _UNKNOWN_SIZE if value == (1 << 7 * length) - 1 else value
