"""Read still pictures: upright, on white, as RGB."""

import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mlxvr.errors import MediaError
from mlxvr.media.container import check_file

__all__ = ["ImageSource", "read_image"]

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"


def read_image(source: ImageSource) -> np.ndarray:
    """Read one picture.

    Turned as its EXIF data says; transparent parts lie on white, as in the training code. Pictures of 16 bits
    a channel are scaled down to 8. Of an animation the first frame is taken.

    Args:
        source: a path, a Pillow image, or a uint8 array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4 with alpha).

    Returns:
        uint8 (h, w, 3), RGB.

    Raises `MediaError` if it is missing, is not an image, is damaged, or has another shape or dtype.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pillow(source)
    path = Path(source)
    check_file(path)
    try:
        with Image.open(path) as image:
            image.load()
            return _from_pillow(image)
    except UnidentifiedImageError as error:
        raise MediaError(f"{path} is not an image: give a jpeg, png, webp, gif, bmp or tiff file") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} has too many pixels ({error}): scale it down first") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's readers raise on damaged files
        raise MediaError(f"{path} is a damaged image ({error}): copy or download it again") from error


def _from_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or not pixels.size:
        raise MediaError(f"the array is {pixels.dtype} {pixels.shape}: expected uint8 (height, width, 3)")
    if pixels.shape[-1] == 4:
        return _from_pillow(Image.fromarray(pixels))
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _from_pillow(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _from_array(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGB", image.size, (255, 255, 255))
        paper.paste(image, mask=image.getchannel("A"))
        return np.asarray(paper)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _to_8_bits(values: np.ndarray[Any, Any]) -> np.ndarray:
    """Gray levels of 16 bits (Pillow's `I;16` and `I`) or floats; those that fit 8 bits stay as they are."""
    if values.dtype.itemsize == 2 or values.max(initial=0) > 255:
        values = values / 257.0
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)
