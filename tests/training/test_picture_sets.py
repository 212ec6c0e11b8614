"""Pictures as ADM's .npz and as PNGs: what is written is read again, numpy reads it too, and what is wrong is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from training import picture_sets
from training.picture_sets import open_pictures
from training.picture_writers import NpzWriter, PngWriter


def pictures(count: int, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 6, 5, channels), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def read(path: Path) -> Tensor:
    return torch.cat(list(open_pictures(path).batches()))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_is_adms_and_is_read_in_batches(tmp_path: Path, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, path = pictures(7, channels), tmp_path / "new" / "pictures.npz"
    writer = NpzWriter(path, 7)
    for part in images.split(3):
        assert not path.exists(), "not before the last picture"
        writer.add(part)
    with np.load(path) as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], images.expand(-1, -1, -1, 3).numpy())
    assert [p.name for p in path.parent.iterdir()] == ["pictures.npz"]
    monkeypatch.setattr(picture_sets, "_BATCH", 4)
    batches = list(open_pictures(path).batches())
    assert open_pictures(path).count == 7 and [len(batch) for batch in batches] == [4, 3]
    assert torch.equal(torch.cat(batches), images.expand(-1, -1, -1, 3).permute(0, 3, 1, 2))


def test_what_numpy_wrote_is_read_compressed_or_not(tmp_path: Path) -> None:
    images = pictures(5)
    np.savez(tmp_path / "plain.npz", images.numpy(), np.arange(5))
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images.numpy())
    for name in ("plain.npz", "packed.npz"):
        assert torch.equal(read(tmp_path / name), images.permute(0, 3, 1, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_pngs_is_numbered_and_read_in_order(tmp_path: Path, channels: int) -> None:
    images, folder = pictures(12, channels), tmp_path / "pngs"
    writer = PngWriter(folder)
    for part in images.split(5):
        writer.add(part)
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(12)]
    with Image.open(folder / "000003.png") as image:
        assert image.mode == ("L" if channels == 1 else "RGB")
    assert torch.equal(read(folder), images.expand(-1, -1, -1, 3).permute(0, 3, 1, 2)) and open_pictures(folder).count == 12


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "there.npz").touch()
    with pytest.raises(ValueError, match=r"there\.npz exists"):
        NpzWriter(tmp_path / "there.npz", 3)
    with pytest.raises(ValueError, match="no empty folder"):
        PngWriter(tmp_path)
    with pytest.raises(ValueError, match="no empty folder"):
        PngWriter(tmp_path / "there.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": np.zeros(3)}, r"holds no array arr_0, where ADM's files have their pictures; it has: other\.npy"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"arr_0 of .* is float64 \(2, 4, 4, 3\); pictures are uint8"),
        ({"arr_0": np.zeros((2, 4, 4, 4), np.uint8)}, r"is uint8 \(2, 4, 4, 4\)"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"is uint8 \(0, 4, 4, 3\)"),
    ],
)
def test_an_array_of_something_else_is_refused(tmp_path: Path, content: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "wrong.npz", **content)
    with pytest.raises(ValueError, match=message):
        open_pictures(tmp_path / "wrong.npz")


def test_files_that_hold_no_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file or folder .*nowhere\.npz"):
        open_pictures(tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match=r"text\.npz cannot be read as \.npz"):
        open_pictures(tmp_path / "text.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.png file"):
        open_pictures(tmp_path / "empty")
    broken = tmp_path / "empty" / "a.png"
    broken.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        read(tmp_path / "empty")
    Image.new("RGB", (4, 4)).save(broken)
    Image.new("RGB", (4, 5)).save(tmp_path / "empty" / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has \(5, 4\) pixels, and the pictures before it \(4, 4\)"):
        read(tmp_path / "empty")


def test_an_npz_that_was_never_finished_leaves_nothing(tmp_path: Path) -> None:
    writer = NpzWriter(tmp_path / "out" / "pictures.npz", 7)
    writer.close()
    assert not (tmp_path / "out").exists(), "stopped before the first picture"
    writer.add(pictures(3))
    writer.close()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_archive_is_named_or_read_as_it_was(tmp_path: Path) -> None:
    images, path, refused = pictures(20), tmp_path / "bent.npz", 0
    np.savez_compressed(path, images.numpy())
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        place, wrong = random.integers(len(whole)), random.integers(1, 256)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ wrong]) + whole[place + 1 :])
        try:
            found = read(path)
        except ValueError as error:
            assert "bent.npz" in str(error)
            refused += 1
        else:
            assert torch.equal(found, images.permute(0, 3, 1, 2)), place
    assert refused > 100
