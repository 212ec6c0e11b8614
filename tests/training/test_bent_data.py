"""Data and recipes that anybody may have written are read, or are a ValueError with the file's name: no other error, no end of memory."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bent import DEEP, bent_bytes
from training.config import RECIPES, load_recipe
from training.data.idx import read_idx


def idx(*shape: int, values: bytes | None = None) -> bytes:
    body = bytes(int(np.prod(shape))) if values is None else values
    return b"\0\0\x08" + bytes([len(shape)]) + b"".join(struct.pack(">I", n) for n in shape) + body


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bent")


def read(path: Path, data: bytes) -> np.ndarray | None:
    path.write_bytes(data)
    try:
        return read_idx(path)
    except ValueError as error:
        assert type(error) is ValueError and str(error).startswith(str(path)) and len(str(error)) < 500
        return None


@settings(max_examples=300)
@given(data=bent_bytes(idx(3, 2, 2)) | st.binary(max_size=60), zipped=st.booleans())
def test_any_bytes_are_an_array_or_refused(folder: Path, data: bytes, zipped: bool) -> None:
    path = folder / ("a.gz" if zipped else "a")
    found = read(path, gzip.compress(data, 1) if zipped else data)
    if found is not None:
        assert idx(*found.shape, values=found.tobytes()) == data


@settings(max_examples=150)
@given(data=bent_bytes(gzip.compress(idx(3, 2, 2), mtime=0)))
def test_a_bent_archive_is_an_array_or_refused(folder: Path, data: bytes) -> None:
    found = read(folder / "a.gz", data)
    assert found is None or found.dtype == np.uint8


@pytest.mark.parametrize(
    "shape", [(2**32 - 1,), (2**32 - 1, 2**32 - 1), (2**31, 2**31, 2**31, 4), (0, 2**32 - 1), (1,) * 255, (2**16,) * 4], ids=str
)
def test_a_header_that_claims_any_size_costs_nothing(folder: Path, shape: tuple[int, ...]) -> None:
    for name in ("a", "a.gz"):
        data = idx(*shape, values=b"abc")
        tracemalloc.start()
        assert read(folder / name, gzip.compress(data) if name == "a.gz" else data) is None
        _, most_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most_bytes < 8 << 20


def test_an_archive_of_more_than_its_header_says_is_not_unpacked(folder: Path) -> None:
    bomb = gzip.compress(idx(3, values=bytes(200 << 20)), 1)  # 200 MiB in one
    tracemalloc.start()
    assert read(folder / "a.gz", bomb) is None
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most_bytes < 8 << 20


@settings(max_examples=150)
@given(data=bent_bytes((RECIPES / "fashion-mnist.toml").read_bytes()) | st.binary(max_size=60))
def test_a_bent_recipe_is_one_or_refused(folder: Path, data: bytes) -> None:
    path = folder / "a.toml"
    path.write_bytes(data)
    try:
        assert load_recipe(str(path)).name == "a"
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"data = {DEEP[:5000]}", "is not TOML"),
        ("data = 1\nvae = 1\ndit = 1\ndefaults = 1", "is no table"),
        ("vae.optimiser = 1\n[data]\n[dit]\n[defaults]", "vae.optimiser is no table"),
        ("[data]\n[[vae]]\n[dit]\n[defaults]", "vae is no table"),
        ("data = " + "9" * 5000, "is not TOML"),
    ],
    ids=lambda text: text[:16],
)
def test_toml_that_is_no_recipe_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError, match=told):
        load_recipe(str(tmp_path / "a.toml"))
