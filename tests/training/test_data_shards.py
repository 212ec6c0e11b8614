"""WebDataset shards: pictures and labels are found by their members' names, nothing is unpacked, and a spoilt shard is refused."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.config import DataConfig
from training.data import Dataset, load_dataset
from training.data.shards import read_shard

GREY = DataConfig(image_size=8, image_channels=1)


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), level).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes], **header: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def samples(labels: list[object], start: int = 0) -> dict[str, bytes]:
    return {
        f"{i:04}.{kind}": raw
        for i, label in enumerate(labels, start)
        for kind, raw in (("png", png(i)), ("cls", str(label).encode()), ("txt", b"a caption"))
    }


def load(root: Path, kept_in: Path) -> Dataset:
    return load_dataset(root, GREY, kept_in)


def test_pictures_of_several_shards_are_one_set(tmp_path: Path) -> None:
    shard(tmp_path / "data" / "a-000.tar", samples([0, 1] * 6))
    shard(tmp_path / "data" / "a-001.tar", samples([0, 1] * 4, start=12))
    dataset = load(tmp_path / "data", tmp_path / "kept")
    assert (len(dataset.train), len(dataset.test), dataset.class_names) == (18, 2, ("0", "1"))
    assert dataset.test.read(torch.arange(2))[:, 0, 0, 0].tolist() == [18, 19]  # the tenth of each class
    assert dataset.test.labels.tolist() == [0, 1] and "WebDataset shards" in dataset.described


def test_shards_called_train_and_test_keep_their_parts(tmp_path: Path) -> None:
    shard(tmp_path / "set-train-000.tar", samples([0, 1, 1]))
    shard(tmp_path / "set-test-000.tar", samples([1, 0]))
    dataset = load(tmp_path, tmp_path / "kept")
    assert dataset.train.labels.tolist() == [0, 1, 1] and dataset.test.labels.tolist() == [1, 0]
    shard(tmp_path / "set-val-000.tar", samples([1, 0]))
    with pytest.raises(ValueError, match=r"set-val-000\.tar is of neither part"):
        load(tmp_path, tmp_path / "kept")


def test_labels_may_be_words_and_lie_in_json(tmp_path: Path) -> None:
    members = {
        f"{i}.{kind}": raw for i in range(20) for kind, raw in (("png", png(i)), ("json", json.dumps({"label": "dc"[i % 2]}).encode()))
    }
    shard(tmp_path / "a.tar", members)
    dataset = load(tmp_path, tmp_path / "kept")
    assert dataset.class_names == ("c", "d") and dataset.train.labels[:4].tolist() == [1, 0, 1, 0]


def test_members_names_lead_nowhere(tmp_path: Path) -> None:
    """Links and devices are no pictures, and ../ is a part of a name."""
    path = shard(tmp_path / "a.tar", {"../../etc/x.png": png(1), "../../etc/x.cls": b"0", "/abs/y.png": png(2), "/abs/y.cls": b"0"})
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert [sample.key for sample in read_shard(path)] == ["../../etc/x", "/abs/y"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": png(1)}, "a has no label"),
        ({"a.png": png(1), "a.jpg": png(2), "a.cls": b"0"}, "a has two pictures"),
        ({"a.png": png(1), "a.cls": b"\xff"}, "cannot be read as a shard"),
        ({"a.png": png(1), "a.json": b'{"label": [1]}'}, "is no label"),
        ({"a.png": png(1), "a.json": b"["}, "cannot be read as a shard"),
        ({"a.png": png(1), "a.cls": b"9" * (2**20 + 1)}, "too large for a label"),
        ({"a.png": png(1), "a.cls": b"70"}, "labels from 70 to 70 on 1 pictures"),
        ({"a.png": png(1), "a.cls": b"-1"}, "labels from -1 to -1"),
        ({"a.png": png(1), "a.cls": b"0", "b.png": png(1), "b.cls": b"cat"}, "both numbers and words"),
        ({"a.txt": b"x"}, "no pictures with labels"),
    ],
    ids=["no label", "two pictures", "not text", "list", "not json", "long", "large", "negative", "mixed", "none"],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    shard(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, tmp_path / "kept")


def test_a_shard_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    raw = shard(tmp_path / "a.tar", samples([0] * 4)).read_bytes()
    end = len(raw.rstrip(b"\0"))
    for length in (1, 511, 700, end - 600, end - 1):
        (tmp_path / "a.tar").write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"a\.tar"):
            load(tmp_path, tmp_path / "kept")


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    raw = bytearray(shard(tmp_path / "a.tar", samples([0] * 12)).read_bytes())
    raw[1024 * 6 + 3] ^= 1  # in the name of the seventh member; the checksum tells
    (tmp_path / "a.tar").write_bytes(raw)
    with pytest.raises(ValueError, match="damaged at byte 6144"):
        load(tmp_path, tmp_path / "kept")


@pytest.mark.parametrize("size", [b"77777777777\0", b"\xff" * 11 + b"\0", b"\x80" + b"\xff" * 11], ids=["8 GiB", "below zero", "base 256"])
def test_a_claimed_size_is_not_believed(tmp_path: Path, size: bytes) -> None:
    raw = bytearray(shard(tmp_path / "a.tar", samples([0] * 2)).read_bytes())
    raw[124:136] = size
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
    (tmp_path / "a.tar").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.tar cannot be read as a shard"):
        load(tmp_path, tmp_path / "kept")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_are_samples_or_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = shard(Path(folder) / "a.tar", samples([0, 1]))
        raw = bytearray(path.read_bytes()[:6144])
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, 1535))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)
        try:
            found = list(read_shard(path))
        except ValueError:
            return
        assert all(0 <= sample.offset <= len(raw) - sample.size for sample in found)
