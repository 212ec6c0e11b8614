"""Picture files of every kind become the recipe's pixels; what is broken says why."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.data.pixels import Unreadable, decode

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def pixels(raw: bytes, channels: int = 3, size: int = 16) -> np.ndarray:
    return decode(io.BytesIO(raw), channels, size)[0]


def flat(mode: str, colour: object, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new(mode, size, colour)


def test_what_is_transparent_shows_white() -> None:
    half = pixels(encoded(flat("RGBA", (0, 0, 200, 128))))
    assert half[:, 0, 0].tolist() == pytest.approx([127, 127, 227], abs=1)
    assert pixels(encoded(flat("RGBA", (9, 9, 9, 0)))).min() == 255
    assert pixels(encoded(flat("LA", (10, 0))), channels=1).min() == 255
    assert pixels(encoded(flat("RGB", (1, 2, 3)), transparency=(1, 2, 3))).min() == 255  # one colour stands for nothing
    assert pixels(encoded(flat("RGBA", (9, 9, 9, 0)), "WEBP", lossless=True)).min() == 255


def test_palettes_are_looked_up_and_their_transparency_kept() -> None:
    paletted = flat("RGB", (250, 20, 30)).quantize(4)
    assert paletted.mode == "P"
    assert pixels(encoded(paletted))[:, 3, 3].tolist() == [250, 20, 30]
    assert pixels(encoded(paletted, transparency=bytes([0] * 4))).min() == 255


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped() -> None:
    values = (np.arange(256, dtype=np.uint32) * 257).astype(np.uint16).reshape(16, 16)
    assert np.array_equal(pixels(encoded(Image.fromarray(values)), channels=1)[0], np.arange(256).reshape(16, 16))
    assert pixels(encoded(Image.fromarray(values))).shape == (3, 16, 16)


def test_a_cmyk_jpeg_has_its_colours() -> None:
    red = pixels(encoded(flat("RGB", (255, 0, 0)).convert("CMYK"), "JPEG", quality=95))
    assert red[:, 8, 8].tolist() == pytest.approx([255, 0, 0], abs=12)


def test_black_and_white_are_grey_levels() -> None:
    assert pixels(encoded(flat("1", 1)), channels=1).min() == 255


def test_a_picture_lies_as_its_camera_says() -> None:
    wide = flat("RGB", "black", (32, 16))
    wide.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: what was left is above
    turned, size = decode(io.BytesIO(encoded(wide, "PNG", exif=exif)), 1, 16)
    assert size == (16, 32) and turned[0, 0].min() > 200 and turned[0, -1].max() < 50


def test_spoilt_exif_says_nothing() -> None:
    raw = encoded(flat("RGB", (10, 200, 10)), "JPEG", exif=b"Exif\0\0not a TIFF header")
    assert pixels(raw)[:, 8, 8].tolist() == pytest.approx([10, 200, 10], abs=6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_gives_the_form_asked_for(kind: str, channels: int) -> None:
    found, size = decode(io.BytesIO(encoded(NOISE, kind)), channels, 16)
    assert (found.shape, found.dtype, size) == ((channels, 16, 16), np.uint8, (24, 20))


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "no PNG, JPEG, WEBP or BMP file"),
        (encoded(NOISE, "GIF"), "no PNG, JPEG, WEBP or BMP file"),
        (encoded(NOISE)[:300], "cannot be read as an image"),
        (encoded(flat("1", 0, (65000, 1)), optimize=True), "65000×1 pixels are too many, or too narrow a strip"),
    ],
    ids=["empty", "gif", "cut short", "strip"],
)
def test_what_cannot_be_used_says_why(raw: bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        pixels(raw, size=64)


def test_a_claim_of_absurd_size_is_refused_before_anything_is_decoded() -> None:
    raw = bytearray(encoded(flat("1", 0)))
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    with pytest.raises(Unreadable, match="cannot be read as an image"):
        pixels(bytes(raw))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_are_a_picture_or_unreadable(kind: str, data: st.DataObject) -> None:
    raw = bytearray(encoded(NOISE, kind))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    try:
        found = pixels(bytes(raw))
    except Unreadable:
        return
    assert found.shape == (3, 16, 16)
