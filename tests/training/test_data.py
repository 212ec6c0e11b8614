"""IDX files and image folders, at the recipe's size, with errors that name the file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import DataConfig
from training.data import batch_indices, load_dataset, to_float
from training.data.idx import pad_to, read_idx
from training.data.pixels import centre_crop

GREY = DataConfig(image_size=16, image_channels=1)
COLOUR = DataConfig(image_size=16, image_channels=3)


def picture(path: Path, size: tuple[int, int] = (16, 16), colour: tuple[int, int, int] = (200, 100, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


# --- IDX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"], ids=["plain", "gzipped"])
def test_idx_files_are_read_plain_or_gzipped(tmp_path: Path, make_idx_folder: Callable[..., Path], suffix: str) -> None:
    dataset = load_dataset(make_idx_folder(tmp_path, train=9, test=5, suffix=suffix), GREY)
    assert dataset.train.images.shape == (9, 1, 16, 16) and dataset.train.images.dtype == torch.uint8
    assert dataset.train.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0] and dataset.train.labels.dtype == torch.int64
    assert len(dataset.test) == 5 and dataset.class_names == ("0", "1", "2", "3")
    assert "9 training and 5 test images" in dataset.described


def test_idx_pixels_arrive_unchanged_in_a_black_border(tmp_path: Path, make_idx_folder: Callable[..., Path]) -> None:
    make_idx_folder(tmp_path, size=12)
    raw = torch.from_numpy(read_idx(tmp_path / "train-images-idx3-ubyte.gz").copy())
    images = load_dataset(tmp_path, GREY).train.images
    assert torch.equal(images[:, 0, 2:14, 2:14], raw)
    assert int(images.sum(dtype=torch.int64)) == int(raw.sum(dtype=torch.int64))  # nothing but black outside


def test_grey_idx_pictures_can_fill_three_channels(tmp_path: Path, make_idx_folder: Callable[..., Path]) -> None:
    images = load_dataset(make_idx_folder(tmp_path), COLOUR).train.images
    assert images.shape[1] == 3 and torch.equal(images[:, 0], images[:, 2])


def test_the_recipes_names_are_the_classes(tmp_path: Path, make_idx_folder: Callable[..., Path]) -> None:
    make_idx_folder(tmp_path)
    names = ("a", "b", "c", "d")
    assert load_dataset(tmp_path, DataConfig(16, 1, labels=names)).class_names == names
    with pytest.raises(ValueError, match="names 3 labels, the data has 4 classes"):
        load_dataset(tmp_path, DataConfig(16, 1, labels=names[:3]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"PNG", "not an IDX file"),
        (b"\0\0\x0d\1\0\0\0\1\0\0\0\0", "not an IDX file of unsigned bytes"),  # floats
        (b"\0\0\x08\3\0\0\0\1", ""),  # a header cut short
        (b"\0\0\x08\1\0\0\0\5abcd", r"says \(5,\) but holds 4 values"),
        (b"\0\0\x08\1\0\0\0\3abcd", r"says \(3,\) but holds 4 values"),
    ],
)
def test_a_broken_idx_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte.*{message}"):
        read_idx(path)


@pytest.mark.parametrize("keep", [0, 5, 12, 200, -9, -1])
def test_a_gzip_file_cut_short_is_refused_by_name(tmp_path: Path, make_idx_folder: Callable[..., Path], keep: int) -> None:
    path = make_idx_folder(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz"):
        load_dataset(tmp_path, GREY)


def test_as_many_labels_as_images_are_needed(tmp_path: Path, make_idx_folder: Callable[..., Path]) -> None:
    make_idx_folder(tmp_path / "a", train=8)
    make_idx_folder(tmp_path / "b", train=7)
    (tmp_path / "b" / "train-labels-idx1-ubyte.gz").rename(tmp_path / "a" / "train-labels-idx1-ubyte.gz")
    with pytest.raises(ValueError, match=r"holds 8 images but .* 7 labels"):
        load_dataset(tmp_path / "a", GREY)


def test_a_missing_idx_file_is_named(tmp_path: Path, make_idx_folder: Callable[..., Path]) -> None:
    (make_idx_folder(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="lacks t10k-images-idx3-ubyte or t10k-labels-idx1-ubyte"):
        load_dataset(tmp_path, GREY)


def test_images_and_labels_swapped_are_refused(tmp_path: Path, make_idx_folder: Callable[..., Path]) -> None:
    make_idx_folder(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes((tmp_path / "train-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        load_dataset(tmp_path, GREY)


def test_idx_images_larger_than_the_recipe_are_refused(tmp_path: Path, make_idx_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="20×20, more than the recipe's image_size 16"):
        load_dataset(make_idx_folder(tmp_path, size=20), GREY)


def test_padding_centres_odd_differences_too() -> None:
    padded = pad_to(torch.ones(2, 1, 3, 4, dtype=torch.uint8), 6)
    assert padded.shape == (2, 1, 6, 6) and padded.sum(dtype=torch.int64) == 24
    assert torch.equal(padded[0, 0, 1:4, 1:5], torch.ones(3, 4, dtype=torch.uint8))


# --- image folders -----------------------------------------------------------------------------------------------------


def test_an_image_folder_holds_out_every_tenth_of_a_class(tmp_path: Path) -> None:
    for name, count in (("zebra", 20), ("ape", 11)):
        for i in range(count):
            picture(tmp_path / name / f"{i:02}.png", colour=(i, i, i))
    dataset = load_dataset(tmp_path, GREY)
    assert dataset.class_names == ("ape", "zebra")
    assert (len(dataset.train), len(dataset.test)) == (28, 3)
    assert dataset.test.labels.tolist() == [0, 1, 1] and dataset.test.images[:, 0, 0, 0].tolist() == [9, 9, 19]


def test_an_image_folder_with_train_and_test_keeps_them(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name in ("a", "b"):
            for i in range(count):
                picture(tmp_path / part / name / f"{i}.jpg")
    dataset = load_dataset(tmp_path, COLOUR)
    assert (len(dataset.train), len(dataset.test), dataset.class_names) == (6, 4, ("a", "b"))
    assert dataset.train.images.shape == (6, 3, 16, 16)


def test_colours_and_classes_arrive_where_they_belong(tmp_path: Path) -> None:
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        for i in range(10):
            picture(tmp_path / name / f"{i}.png", colour=colour)
    split = load_dataset(tmp_path, COLOUR).test
    assert split.images[:, :, 8, 8].tolist() == [[0, 0, 255], [255, 0, 0]] and split.labels.tolist() == [0, 1]
    assert to_float(split.images)[0, :, 0, 0].tolist() == [-1, -1, 1]


def test_train_and_test_need_the_same_classes(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "0.png")
    picture(tmp_path / "test" / "b" / "0.png")
    with pytest.raises(ValueError, match="different classes"):
        load_dataset(tmp_path, GREY)


def test_train_beside_val_is_not_taken_for_two_classes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("a", "b"):
            for i in range(10):
                picture(tmp_path / part / name / f"{i}.png")
    with pytest.raises(ValueError, match="test"):
        load_dataset(tmp_path, GREY)


def test_a_class_without_pictures_is_refused_by_name(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / "full" / f"{i}.png")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match="hollow"):
        load_dataset(tmp_path, GREY)


def test_too_few_pictures_for_a_test_set_are_refused(tmp_path: Path) -> None:
    for i in range(9):
        picture(tmp_path / "a" / f"{i}.png")
    with pytest.raises(ValueError, match="9 training and 0 test images; at least 10 a class"):
        load_dataset(tmp_path, GREY)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"], ids=["empty", "text", "header only"])
def test_a_broken_picture_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    picture(tmp_path / "a" / "good.png")
    (tmp_path / "a" / "spoilt.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"spoilt\.png cannot be read as an image"):
        load_dataset(tmp_path, GREY)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_a_picture_cut_short_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a" / f"cut{suffix}"
    path.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cut\{suffix} cannot be read as an image"):
        load_dataset(tmp_path, GREY)


def test_a_picture_of_absurd_size_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a" / "bomb.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses more than twice this
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read as an image"):
        load_dataset(tmp_path, GREY)


def test_a_folder_without_data_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data folder at"):
        load_dataset(tmp_path / "missing", GREY)
    with pytest.raises(ValueError, match=r"neither IDX files \(train-images-idx3-ubyte.* nor one sub-folder"):
        load_dataset(tmp_path, GREY)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"no images \(\.bmp, \.jpeg"):
        load_dataset(tmp_path, GREY)


@pytest.mark.parametrize(
    "size", [(16, 16), (17, 16), (16, 100), (100, 16), (31, 33), (32, 32), (1000, 33), (5, 7), (1, 40), (33, 1000)], ids=str
)
def test_a_centre_crop_has_the_size_asked_for(size: tuple[int, int]) -> None:
    assert centre_crop(Image.new("RGB", size), 16).shape == (16, 16, 3)
    assert centre_crop(Image.new("L", size), 16).shape == (16, 16)


def test_a_centre_crop_takes_the_centre() -> None:
    wide = Image.new("L", (48, 16), 0)
    wide.paste(255, (16, 0, 32, 16))
    assert int(centre_crop(wide, 16).min()) == 255
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert int(centre_crop(tall, 16).min()) == 255


def test_a_centre_crop_of_the_right_size_changes_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    assert np.array_equal(centre_crop(Image.fromarray(noise), 16), noise)


# --- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "batch"), [(12, 4), (10, 4), (7, 3), (5, 8), (3, 10), (1, 1)])
def test_batches_cover_every_sample_once_an_epoch(length: int, batch: int) -> None:
    epochs = 3
    steps = -(-epochs * length // batch)
    stream = torch.cat([batch_indices(length, batch, step, seed=1) for step in range(steps)])
    assert len(stream) == steps * batch
    orders = stream[: epochs * length].view(epochs, length)
    assert all(sorted(order.tolist()) == list(range(length)) for order in orders)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = batch_indices(50, 50, 0, seed=0), batch_indices(50, 50, 1, seed=0)
    assert not torch.equal(first, second) and not torch.equal(first, batch_indices(50, 50, 0, seed=1))
    assert not torch.equal(first, torch.arange(50))


def test_a_batch_depends_on_its_step_alone() -> None:
    forward = [batch_indices(10, 4, step, seed=0) for step in range(6)]
    torch.manual_seed(99)
    backward = [batch_indices(10, 4, step, seed=0) for step in reversed(range(6))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
