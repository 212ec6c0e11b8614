"""`dit show`: what a picture was made with is read from the picture; whatever else is a file is told in one line."""

import io
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app.cli import app
from app.picture_request import read_picture
from tests.bent import bent_bytes
from worker.images import encode_png
from worker.picture_text import KEYWORD, PictureText
from worker.protocol import GenerationRequest

REQUEST = GenerationRequest("tiny", (2, None, 1), 2.0, (0.1, 0.9), 25, "euler", 40)
TEXT = PictureText(REQUEST, 2, "cd" * 32)
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 1), dtype=np.uint8)
PNG, _ = encode_png(PIXELS, REQUEST, 2, "cd" * 32)
HEADER = 33  # bytes before the first chunk that may be ours: signature, IHDR


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack(">I", len(data) if length is None else length) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(*added: bytes) -> bytes:
    """A PNG that says nothing of itself, with these chunks before its pixels."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[..., 0]).save(buffer, "PNG")
    plain = buffer.getvalue()
    return plain[:HEADER] + b"".join(added) + plain[HEADER:]


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as raised:
        read_picture(path)
    assert type(raised.value) is ValueError
    told = str(raised.value)
    assert told.startswith(str(path)) and "\n" not in told and len(told) < 600
    return told


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        (tmp_path / "a.png").write_bytes(data)
        return tmp_path / "a.png"

    return write


def test_what_a_worker_wrote_is_read(file: Callable[[bytes], Path]) -> None:
    assert read_picture(file(PNG)) == TEXT


def test_the_command_tells_the_checkpoint_and_a_request_that_is_accepted(file: Callable[[bytes], Path], client: TestClient) -> None:
    done = CliRunner().invoke(app, ["show", str(file(PNG))])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["checkpoint"], told["index"]) == ("cd" * 32, 2)
    assert told["request"].items() >= {"class_label": 1, "seed": 42, "num_images": 1, "steps": 25, "model": "tiny"}.items()
    answer = client.post("/generate", json=told["request"])
    assert answer.status_code == 202 and answer.json()["request"] == told["request"]


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"GIF89a", PNG[:20], PNG[:HEADER], b"\xff\xd8\xff\xe0"], ids=repr)
def test_the_command_tells_what_is_no_picture_in_one_line(file: Callable[[bytes], Path], tmp_path: Path, data: bytes) -> None:
    for path in (file(data), tmp_path, tmp_path / "nothing.png"):
        done = CliRunner().invoke(app, ["show", str(path)])
        assert done.exit_code == 1 and done.stdout == "" and done.stderr.startswith("dit: ") and done.stderr.count("\n") == 1


def test_a_picture_that_says_nothing_is_told(file: Callable[[bytes], Path]) -> None:
    assert "does not say how it was made" in refused(file(with_chunk()))
    assert "does not say how it was made" in refused(file(with_chunk(chunk(b"tEXt", b"Software\0paint"))))


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
def test_a_text_in_any_of_pngs_three_chunks_is_read(file: Callable[[bytes], Path], kind: bytes) -> None:
    """As a program that saved it anew may have written it."""
    text = TEXT.dump().encode()
    data = {b"tEXt": text, b"zTXt": b"\0" + zlib.compress(text), b"iTXt": b"\1\0\0\0" + zlib.compress(text)}[kind]
    assert read_picture(file(with_chunk(chunk(kind, KEYWORD.encode() + b"\0" + data)))) == TEXT


BOMB = zlib.compress(b" " * (200 << 20), 9)  # 200 MiB in 200 kB


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_text_that_grows_without_bounds_is_refused_before_it_has(file: Callable[[bytes], Path], kind: bytes) -> None:
    prefix = {b"zTXt": b"dit\0\0", b"iTXt": b"dit\0\1\0\0\0", b"iCCP": b"dit\0\0"}[kind]
    path = file(with_chunk(*[chunk(kind, prefix + BOMB)] * 3))
    tracemalloc.start()
    refused(path)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most_bytes < 16 << 20


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0xFFFFFFFF, 1 << 20])
def test_a_chunk_that_claims_more_than_there_is_is_refused(file: Callable[[bytes], Path], length: int) -> None:
    refused(file(with_chunk(chunk(b"iTXt", b"dit\0\0\0\0\0{}", length))))


def test_a_picture_of_absurd_size_is_not_decoded(file: Callable[[bytes], Path]) -> None:
    size = struct.pack(">II", 2**31 - 1, 2**31 - 1) + PNG[24:29]
    refused(file(PNG[:8] + chunk(b"IHDR", size) + PNG[HEADER:]))


def test_a_file_larger_than_any_picture_is_not_read(tmp_path: Path) -> None:
    with (path := tmp_path / "a.png").open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    assert "more than any picture" in refused(path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bent") / "a.png"


@settings(max_examples=400)
@given(data=bent_bytes(PNG))
def test_a_png_with_bent_bytes_is_read_or_a_value_error(scratch: Path, data: bytes) -> None:
    check(scratch, data)


@settings(max_examples=200)
@given(data=bent_bytes(PNG[HEADER:]))
def test_bent_chunks_whose_checksums_fit_are_read_or_a_value_error(scratch: Path, data: bytes) -> None:
    """Pillow looks at a chunk's bytes only where its checksum fits."""
    fitting, at = b"", 0
    while at + 8 <= len(data):
        length = min(int.from_bytes(data[at : at + 4]), len(data) - at - 8)
        fitting += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    check(scratch, PNG[:HEADER] + fitting)


def check(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        found: Any = read_picture(path)
    except ValueError as error:
        assert type(error) is ValueError and str(error).startswith(str(path))
    else:
        assert PictureText.parse(found.dump()) == found
