"""CIFAR's binary files: what is in them arrives unchanged, and what is not theirs is refused by name."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.config import DataConfig
from training.data import Dataset, load_dataset
from training.data.cifar import read_cifar

COLOUR = DataConfig(image_size=32, image_channels=3)
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def records(labels: list[int], coarse: bool = False, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return b"".join(bytes([7] * coarse + [label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(records([i, i + 4], seed=i))
    (tmp_path / "test_batch.bin").write_bytes(records([9, 0, 3]))
    (tmp_path / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return tmp_path


def load(root: Path, config: DataConfig = COLOUR) -> Dataset:
    return load_dataset(root, config)


def test_pixels_labels_and_names_arrive_unchanged(cifar: Path) -> None:
    dataset = load(cifar)
    assert dataset.class_names == NAMES and dataset.train.labels.tolist() == [1, 5, 2, 6, 3, 7, 4, 8, 5, 9]
    raw = np.frombuffer(records([9, 0, 3]), dtype=np.uint8).reshape(3, 3073)
    assert dataset.test.labels.tolist() == [9, 0, 3]
    assert torch.equal(dataset.test.read(torch.tensor([2, 0])).flatten(1), torch.from_numpy(raw[[2, 0], 1:].copy()))
    assert dataset.sizes == ((32, 32), (32, 32)) and "10 training and 3 test images" in dataset.described


def test_grey_is_what_pillow_calls_grey(cifar: Path) -> None:
    colour, grey = load(cifar).test.images, load(cifar, DataConfig(32, 1)).test.images
    by_pillow = [np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in colour]
    assert np.array_equal(grey[:, 0].numpy(), np.stack(by_pillow))


def test_cifar_100_is_known_by_its_fine_labels(tmp_path: Path) -> None:
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(records([99, 4], coarse=True))
    dataset = load(tmp_path)
    assert dataset.train.labels.tolist() == [99, 4] and len(dataset.class_names) == 100 and "CIFAR-100" in dataset.described


def test_a_missing_file_is_named(cifar: Path) -> None:
    (cifar / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks data_batch_3\.bin of CIFAR-10"):
        load(cifar)


def test_names_must_be_as_many_as_classes(cifar: Path) -> None:
    (cifar / "batches.meta.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"batches\.meta\.txt names 2 classes; CIFAR-10 has 10"):
        load(cifar)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "holds 0 bytes"),
        (records([1])[:-1], "holds 3072 bytes, which is no whole number of records of 3073"),
        (records([1, 10]), "has a label 10; 10 classes"),
    ],
    ids=["empty", "cut short", "label"],
)
def test_a_broken_file_is_refused_by_name(cifar: Path, raw: bytes, message: str) -> None:
    (cifar / "test_batch.bin").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"test_batch\.bin {message}"):
        load(cifar)


@settings(max_examples=50, deadline=None)
@given(raw=st.binary(max_size=200) | st.builds(records, st.lists(st.integers(0, 255), max_size=3)), label_bytes=st.sampled_from([1, 2]))
def test_any_bytes_are_records_or_refused(raw: bytes, label_bytes: int) -> None:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(raw)
        try:
            images, labels = read_cifar(Path(file.name), label_bytes=label_bytes, classes=10)
        except ValueError:
            return
    assert len(images) == len(labels) == len(raw) // (3072 + label_bytes) and labels.max() < 10
