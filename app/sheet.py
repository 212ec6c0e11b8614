"""Many pictures as one."""

import io
import math
from collections.abc import Sequence

from PIL import Image

GAP = 2  # pixels between two pictures and around them
BACKGROUND = 255


def contact_sheet(pictures: Sequence[bytes]) -> bytes:
    """PNGs of one size → a PNG of all of them, row by row, about as wide as high. ValueError for none."""
    if not pictures:
        raise ValueError("a contact sheet needs a picture")
    images = [Image.open(io.BytesIO(picture), formats=["PNG"]) for picture in pictures]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new(images[0].mode, (GAP + columns * (width + GAP), GAP + rows * (height + GAP)), _background(images[0].mode))
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        sheet.paste(image, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _background(mode: str) -> int | tuple[int, int, int]:
    return BACKGROUND if mode == "L" else (BACKGROUND,) * 3
