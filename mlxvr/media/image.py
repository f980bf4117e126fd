"""Read still pictures as RGB: upright, and with transparent parts on white."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from mlxvr.errors import MediaError
from mlxvr.media.container import RAW_PHOTO, check_file, is_heic, is_image
from mlxvr.storage.paths import local_path

__all__ = ["ImageSource", "open_image", "read_image", "to_rgb"]

_ORIENTATION = 0x0112  # EXIF 2.32, tag of the sides at which row 0 and column 0 are shown
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DNG_VERSION = 0xC612  # a TIFF with this tag is a raw photo, whose first picture is a small preview

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"


def read_image(source: ImageSource) -> np.ndarray:
    """Read one picture.

    It is turned as its EXIF data says (in HEIC and AVIF: its own transformations). Transparent parts become white, as
    in the training code. Pictures of 10 to 16 bits per channel are scaled to 8. Of an animation the first frame is
    read, of a TIFF the first page, of an HEIC file the primary picture.

    Args:
        source: a path or a `file:` URL, a Pillow image (its current frame), or a uint8 array (h, w), (h, w, 1),
            (h, w, 3) or (h, w, 4 with alpha).

    Returns:
        uint8 (h, w, 3), RGB.

    Raises `MediaError` if it is missing, is not an image, is damaged, or has another shape or dtype.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return to_rgb(source)
    with open_image(local_path(source)) as image:
        image.load()
        return to_rgb(image)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open a picture file; errors of Pillow within the block become a `MediaError` that names the file."""
    check_file(path)
    try:
        with _open_heic(path) if is_heic(path) else Image.open(path) as image:
            if _DNG_VERSION in getattr(image, "tag_v2", ()):
                raise MediaError(f"{path} is {RAW_PHOTO}")
            yield image
    except UnidentifiedImageError as error:
        if is_image(path):
            raise MediaError(f"{path} is an image that this Pillow cannot read: pip install -U pillow") from error
        raise MediaError(
            f"{path} is not an image: give a jpeg, png, webp, gif, heic, avif, bmp or tiff file"
        ) from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} has too many pixels ({error}): scale it down first") from error
    except (EOFError, OSError, SyntaxError, ValueError) as error:  # raised by Pillow's readers of damaged files
        raise MediaError(f"{path} is a damaged image ({error}): copy or download it again") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Return the pixels of a Pillow image as a viewer shows them: uint8 (h, w, 3)."""
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _from_array(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGB", image.size, (255, 255, 255))
        paper.paste(image, mask=image.getchannel("A"))
        return np.asarray(paper)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF data says; damaged data is ignored, as in browsers."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # SyntaxError, TypeError, struct.error and more: damaged data may raise anything
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _open_heic(path: Path) -> Image.Image:
    """Open the primary picture of an HEIC file, turned and cropped as the file says.

    FFmpeg opens these files too, but returns one of the tiles that a phone splits its photos into, and does not turn
    it.
    """
    try:
        import pillow_heif
    except ImportError:
        raise MediaError(
            f"{path} is an HEIC photo, and pillow-heif, which reads them, is not installed: pip install pillow-heif"
        ) from None
    try:
        image: Image.Image = pillow_heif.open_heif(path).to_pillow()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return image


def _from_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or not pixels.size:
        raise MediaError(f"the array is {pixels.dtype} {pixels.shape}: expected uint8 (height, width, 3)")
    if pixels.shape[-1] == 4:
        return to_rgb(Image.fromarray(pixels))
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _to_8_bits(values: np.ndarray[Any, Any]) -> np.ndarray:
    """Scale gray levels of 16 bits (Pillow's `I;16` and `I`) or floats to 8 bits; levels up to 255 stay as they are."""
    if values.dtype.itemsize == 2 or values.max(initial=0) > 255:
        values = values / 257.0
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)
