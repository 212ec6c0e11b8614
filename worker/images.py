"""Pixels → PNG with the request inside. The bytes depend on the request, the index and the checkpoint, and on nothing else."""

import base64
import hashlib
import io

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from worker.picture_text import KEYWORD, PictureText
from worker.protocol import GenerationRequest

SMALL = 64  # pixels


def encode_png(pixels: np.ndarray, request: GenerationRequest, index: int, checkpoint: str) -> tuple[bytes, str]:
    """uint8 pixels (H, W, 1 or 3) → PNG bytes and their sha256."""
    text = PngInfo()
    text.add_itxt(KEYWORD, PictureText(request, index, checkpoint).dump())
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG", pnginfo=text)
    data = buffer.getvalue()
    return data, hashlib.sha256(data).hexdigest()


def encode_preview(pixels: np.ndarray) -> str:
    """uint8 pixels (H, W, 1 or 3) → a small picture as a data: URL; JPEG where a PNG would be large."""
    buffer, kind = io.BytesIO(), "PNG" if pixels.shape[0] < SMALL else "JPEG"
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
