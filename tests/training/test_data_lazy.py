"""Sets that do not fit in memory give the same pictures as if they did, are looked through once, and name what is broken."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import DataConfig
from training.data import Dataset, assemble, encoded, load_dataset

COLOUR = DataConfig(image_size=8, image_channels=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "MEMORY_BYTES", 0)


def load(folder: Path) -> Dataset:
    return load_dataset(folder, COLOUR, folder.parent / "kept")


def test_pictures_read_from_disk_are_those_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = load(folder)
    monkeypatch.setattr(assemble, "MEMORY_BYTES", 0)
    from_disk = load(folder)
    assert isinstance(in_memory.train.images, torch.Tensor) and isinstance(from_disk.train.images, encoded.Pictures)
    assert from_disk.train.image_shape == in_memory.train.image_shape == (3, 8, 8)
    for a, b in ((in_memory.train, from_disk.train), (in_memory.test, from_disk.test)):
        assert torch.equal(a.labels, b.labels) and torch.equal(torch.cat(list(a.batches(7))), torch.cat(list(b.batches(7))))
    index = torch.tensor([30, 2, 2, 17])
    assert torch.equal(in_memory.train.read(index), from_disk.train.read(index))
    assert [len(part) for part in from_disk.train.batches(3, index)] == [3, 1]
    assert from_disk.sizes == in_memory.sizes == ((12, 9), (12, 48))


@pytest.mark.usefixtures("on_disk")
def test_a_set_is_looked_through_once_until_its_files_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder)
    decode = encoded.decode
    monkeypatch.setattr(encoded, "decode", lambda *_: pytest.fail("every picture was seen before"))
    assert load(folder).train.content_hash == first.train.content_hash
    monkeypatch.setattr(encoded, "decode", decode)
    os.utime(folder / "a" / "00.png", (1, 1))
    assert load(folder).train.content_hash != first.train.content_hash
    assert len(list((folder.parent / "kept").glob("*.json"))) == 2


@pytest.mark.usefixtures("on_disk")
def test_a_picture_that_breaks_later_is_named(folder: Path) -> None:
    split = load(folder).train
    (folder / "a" / "00.png").write_bytes(b"spoilt")
    with pytest.raises(ValueError, match=r"a/00\.png, which was fine before training began, cannot be read"):
        split.read(torch.tensor([0]))


@pytest.mark.parametrize("memory", [0, 2**30])
def test_a_broken_picture_is_skipped_and_named(folder: Path, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(assemble, "MEMORY_BYTES", memory)
    whole = load(folder)
    (folder / "b" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    (folder / "a" / "lost.png").symlink_to("nowhere.png")
    dataset = load(folder)
    assert len(dataset.train) + len(dataset.test) == 39 and "2 skipped" in dataset.described
    assert [Path(name).name for name in dataset.skipped] == ["lost.png", "03.png"]
    assert all(dataset.skipped.values()) and dataset.train.content_hash != whole.train.content_hash
    assert torch.equal(dataset.train.read(torch.arange(18)), whole.train.read(torch.arange(18)))  # class a


def test_too_many_broken_pictures_are_no_accident(folder: Path) -> None:
    for i in range(1, 11, 2):
        (folder / "b" / f"{i:02}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"5 of 40 pictures are broken, more than one in 10: .*b/01\.png cannot be read as an image"):
        load(folder)


def test_a_class_whose_pictures_are_all_broken_is_named(folder: Path) -> None:
    (folder / "c").mkdir()
    (folder / "c" / "only.png").write_bytes(b"")
    with pytest.raises(ValueError, match="class c has no picture that can be read"):
        load(folder)


def test_hidden_files_are_no_pictures(folder: Path) -> None:
    (folder / "a" / "._00.png").write_bytes(b"what a Mac leaves")
    assert load(folder).skipped == {}


def test_the_hash_of_a_set_in_memory_is_that_of_its_pixels_and_labels(folder: Path) -> None:
    split, again = load(folder).train, load(folder).train
    os.utime(folder / "a" / "00.png", (1, 1))  # which pixels do not know of
    assert split.content_hash == again.content_hash == load(folder).train.content_hash
    again.images[0, 0, 0, 0] += 1
    assert split.content_hash != again.content_hash
    digest = hashlib.sha256()
    split.hash_into(digest)
    assert digest.digest() == hashlib.sha256(split.images.numpy().tobytes() + split.labels.numpy().tobytes()).digest()


@pytest.mark.usefixtures("on_disk")
def test_what_is_kept_of_a_set_is_small_and_plain(folder: Path) -> None:
    (folder / "b" / "03.png").write_bytes(b"")
    load(folder)
    (kept,) = (folder.parent / "kept").glob("*.json")
    told = json.loads(kept.read_text())
    assert told["sizes"] == [[12, 9], [12, 48]] and list(told["broken"]) == ["21"]
