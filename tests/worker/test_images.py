"""PNGs with their request inside, whose bytes depend on the request, the index and the checkpoint, and on nothing else."""

import hashlib
import io
import json
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from worker.images import encode_png
from worker.picture_text import KEYWORD, PictureText
from worker.protocol import GenerationRequest

HASH = "cd" * 32


@pytest.fixture
def request_of_three(make_request: Callable[..., GenerationRequest]) -> GenerationRequest:
    return make_request(class_labels=(2, None, 1), seed=40, guidance_interval=(0.1, 0.9))


def pixels(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, channels), dtype=np.uint8)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")], ids=["grey", "RGB"])
def test_pixels_survive_exactly(request_of_three: GenerationRequest, channels: int, mode: str) -> None:
    data, digest = encode_png(pixels(channels), request_of_three, 0, HASH)
    assert digest == hashlib.sha256(data).hexdigest()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert (image.format, image.mode, image.size) == ("PNG", mode, (16, 16))
        assert np.array_equal(np.asarray(image).reshape(16, 16, channels), pixels(channels))


@pytest.mark.parametrize(("index", "label"), [(0, 2), (1, None), (2, 1)])
def test_the_request_is_inside(request_of_three: GenerationRequest, index: int, label: int | None) -> None:
    data, _ = encode_png(pixels(1), request_of_three, index, HASH)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        document = json.loads(image.text[KEYWORD])
    assert GenerationRequest.parse(json.dumps(document.pop("request"))) == request_of_three
    assert document == {"version": 1, "checkpoint": HASH, "index": index, "seed": 40 + index, "class_label": label}


def test_how_the_picture_was_made_is_inside(make_request: Callable[..., GenerationRequest]) -> None:
    choices = {"spacing": "log-snr", "eta": 0.25, "shift": 3.0, "guidance_channels": "first-three", "guidance_rescale": 0.7}
    data, _ = encode_png(pixels(1), make_request(**choices), 0, HASH)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        inside = json.loads(image.text[KEYWORD])["request"]
    assert choices.items() <= inside.items()
    assert {"spacing": None, "eta": 0.0, "shift": 1.0}.items() <= json.loads(PictureText(make_request(), 0, HASH).dump())["request"].items()


def test_nothing_else_is_inside(request_of_three: GenerationRequest) -> None:
    """No time, no id, no software: a PNG of these chunks holds what is drawn and the request."""
    data, _ = encode_png(pixels(3), request_of_three, 0, HASH)
    chunks, position = [], 8
    while position < len(data):
        length = int.from_bytes(data[position : position + 4])
        chunks.append(data[position + 4 : position + 8].decode())
        position += 12 + length
    assert [kind for kind in chunks if kind != "IDAT"] == ["IHDR", "iTXt", "IEND"]
    inside = json.loads(PictureText(request_of_three, 0, HASH).dump())
    assert sorted(inside) == ["checkpoint", "class_label", "index", "request", "seed", "version"]
    assert {*inside["request"], "block_cache"} == set(request_of_three.__dataclass_fields__), "block_cache where there is one"


def test_the_bytes_are_the_same_for_the_same_input_at_any_time(request_of_three: GenerationRequest) -> None:
    first = encode_png(pixels(1), request_of_three, 0, HASH)
    time.sleep(1.1)  # PNG's own time chunk counts seconds
    assert encode_png(pixels(1).copy(), GenerationRequest.parse(request_of_three.dump()), 0, HASH) == first


def test_the_bytes_tell_index_checkpoint_and_request_apart(
    request_of_three: GenerationRequest, make_request: Callable[..., GenerationRequest]
) -> None:
    variants = [(request_of_three, 0, HASH), (request_of_three, 1, HASH), (request_of_three, 0, "ef" * 32), (make_request(), 0, HASH)]
    assert len({encode_png(pixels(1), *variant)[1] for variant in variants}) == len(variants)
