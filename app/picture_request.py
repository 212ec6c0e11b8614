"""`dit show`: the request inside a picture."""

import json
import struct
import zlib
from pathlib import Path

from PIL import Image

from app.views import public_request
from worker.picture_text import KEYWORD, PictureText

_LARGEST = 1 << 28  # bytes of a file that is looked at
# What Pillow raises for a PNG that somebody bent, besides ValueError: a text that grows beyond its bounds as it is unpacked is one.
_BENT = (OSError, SyntaxError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error, Image.DecompressionBombError)


def read_picture(path: Path) -> PictureText:
    """What the picture says of itself; its pixels are not decoded. ValueError if it is no PNG or says nothing, OSError for no file."""
    with path.open("rb") as file:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any picture")
        try:
            with Image.open(file, formats=["PNG"]) as image:
                text = image.info.get(KEYWORD)
        except (ValueError, *_BENT) as error:
            raise ValueError(f"{path} is no sound PNG: {ascii(error)[:200]}") from error
    if not isinstance(text, str):
        raise ValueError(f"{path} does not say how it was made: dit did not make it, or a program that saved it anew left that out")
    try:
        return PictureText.parse(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def shown(picture: PictureText) -> str:
    """JSON: the checkpoint, its place in its job, and the body for `POST /generate` that makes this picture again."""
    document = {"checkpoint": picture.checkpoint, "index": picture.index, "request": public_request(picture.alone)}
    return json.dumps(document, indent=2)
