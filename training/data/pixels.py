"""One picture file → pixels of the recipe's size and channels, as ADM crops them, whatever it was made by."""

import struct
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # no others: Pillow's rarer decoders are not for files of strangers
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Size = tuple[int, int]  # width and height
_MAX_PIXELS = 100_000_000  # a square of 10,000; also of what a narrow strip would be enlarged to
# What Pillow raises for spoilt files, by decoder.
_SPOILT = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


class Unreadable(Exception):
    """A picture that cannot be used, and why."""


def decode(file: BinaryIO, channels: int, size: int) -> tuple[np.ndarray, Size]:
    """Pixels (C, size, size) uint8, and what size the picture had. Unreadable if it is broken, too large or no picture."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            _require_modest(image.size, size)
            image.load()
            upright = _upright(image)
            pixels = centre_crop(_flat(upright, channels), size)
    except UnidentifiedImageError as error:  # whose own words name an object in memory
        raise Unreadable(f"cannot be read as an image: it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from error
    except _SPOILT as error:
        raise Unreadable(f"cannot be read as an image: {error or type(error).__name__}") from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), upright.size


def _require_modest(found: Size, size: int) -> None:
    width, height = found
    enlarged = width * height * max(1.0, size / min(found)) ** 2
    if enlarged > _MAX_PIXELS:
        raise ValueError(f"{width}×{height} pixels are too many, or too narrow a strip, to crop to {size}×{size}")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the camera's EXIF says; spoilt EXIF says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except (*_SPOILT, UserWarning):
        return image


def _flat(image: Image.Image, channels: int) -> Image.Image:
    """8 bits, no palette, grey or RGB; what is transparent shows white, as on a page."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
        image = Image.fromarray(((np.asarray(image).clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The shorter side to `size`, then the centre: halving with a box filter while that is possible, then bicubic, as ADM does."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
