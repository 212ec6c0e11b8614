"""Images and labels from IDX files or from a folder with one sub-folder per class, as uint8 in memory."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from training.config import DataConfig

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
HELD_OUT = 10  # of an image folder without train/ and test/, every tenth image of a class is the test set


@dataclass(frozen=True)
class Split:
    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return self.images.shape[0]


@dataclass(frozen=True)
class Dataset:
    train: Split
    test: Split
    class_names: tuple[str, ...]
    described: str  # for the run log and the model card


def to_float(images: Tensor) -> Tensor:
    """uint8 0…255 → float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def load_dataset(folder: str | Path, config: DataConfig) -> Dataset:
    """Read both splits at the recipe's size. ValueError says what was looked for and what was found."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"no data folder at {root}")
    if _find(root, "train-images-idx3-ubyte"):
        return _load_idx(root, config)
    if any(p.is_dir() for p in root.iterdir()):
        return _load_folder(root, config)
    raise ValueError(f"{root} holds neither IDX files (train-images-idx3-ubyte[.gz] …) nor one sub-folder of images per class")


def _find(root: Path, name: str) -> Path | None:
    return next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """One IDX file of unsigned bytes, gzipped or not. ValueError on a wrong header or length."""
    raw = path.read_bytes()
    try:
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unzipped: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    dimensions = data[3]
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    body = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions)
    if body.size != int(np.prod(shape)):
        raise ValueError(f"{path} says {shape} but holds {body.size} values")
    return body.reshape(shape)


def _load_idx(root: Path, config: DataConfig) -> Dataset:
    splits = []
    for part in ("train", "t10k"):
        paths = [_find(root, f"{part}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if not paths[0] or not paths[1]:
            raise ValueError(f"{root} lacks {part}-images-idx3-ubyte or {part}-labels-idx1-ubyte (each may end in .gz)")
        images, labels = read_idx(paths[0]), read_idx(paths[1])
        if images.ndim != 3 or labels.ndim != 1 or not len(images):
            raise ValueError(f"{paths[0]} holds {images.shape} and {paths[1]} {labels.shape}: (N, h, w) and (N,) are needed")
        if len(images) != len(labels):
            raise ValueError(f"{paths[0]} holds {len(images)} images but {paths[1]} {len(labels)} labels")
        tensor = torch.from_numpy(images.copy())[:, None].expand(-1, config.image_channels, -1, -1)
        splits.append(Split(pad_to(tensor, config.image_size), torch.from_numpy(labels.astype(np.int64))))
    classes = int(max(s.labels.max() for s in splits)) + 1
    names = config.labels or tuple(str(i) for i in range(classes))
    if len(names) != classes:
        raise ValueError(f"the recipe names {len(names)} labels, the data has {classes} classes")
    return Dataset(splits[0], splits[1], names, f"IDX files {root}: {len(splits[0])} training and {len(splits[1])} test images")


def pad_to(images: Tensor, size: int) -> Tensor:
    """Centre (N, C, h, w) on black; ValueError if the images are larger than `size`."""
    height, width = images.shape[-2:]
    if height > size or width > size:
        raise ValueError(f"the images are {height}×{width}, more than the recipe's image_size {size}")
    top, left = (size - height) // 2, (size - width) // 2
    return torch.nn.functional.pad(images, (left, size - width - left, top, size - height - top)).contiguous()


def _load_folder(root: Path, config: DataConfig) -> Dataset:
    split = [part for part in ("train", "test") if _holds_folders(root / part)]
    if len(split) == 1:
        raise ValueError(f"{root} has {split[0]}/ with one sub-folder per class: both train/ and test/ are needed, or neither")
    if split:
        names = _class_names(root / "train")
        if _class_names(root / "test") != names:
            raise ValueError(f"{root}/train and {root}/test have different classes")
        train, test = (_read_classes(root / part, names, config) for part in ("train", "test"))
    else:
        names = _class_names(root)
        everything = _read_classes(root, names, config)
        held_out = torch.zeros(len(everything), dtype=torch.bool)
        for label in range(len(names)):
            held_out[(everything.labels == label).nonzero()[HELD_OUT - 1 :: HELD_OUT]] = True
        train = Split(everything.images[~held_out], everything.labels[~held_out])
        test = Split(everything.images[held_out], everything.labels[held_out])
    if not len(train) or not len(test):
        raise ValueError(f"{root} gives {len(train)} training and {len(test)} test images; at least {HELD_OUT} a class are needed")
    return Dataset(train, test, names, f"image folder {root}: {len(train)} training and {len(test)} test images")


def _holds_folders(folder: Path) -> bool:
    return folder.is_dir() and any(p.is_dir() for p in folder.iterdir())


def _class_names(root: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _read_classes(root: Path, names: tuple[str, ...], config: DataConfig) -> Split:
    images, labels = [], []
    for label, name in enumerate(names):
        for path in sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
            try:
                with Image.open(path) as image:
                    images.append(centre_crop(image.convert("L" if config.image_channels == 1 else "RGB"), config.image_size))
            except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
                raise ValueError(f"{path} cannot be read as an image: {error}") from error
            labels.append(label)
    empty = [name for label, name in enumerate(names) if label not in labels]
    if empty or not images:
        raise ValueError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) below {root / empty[0] if empty else root}")
    stack = torch.from_numpy(np.stack(images))
    return Split(stack[:, None] if stack.ndim == 3 else stack.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The shorter side to `size`, then the centre: halving with a box filter while that is possible, then bicubic, as ADM does."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def batch_indices(length: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which samples step `step` trains on: shuffled epochs end to end, a function of the step alone, so that a resume goes on in place."""
    parts: list[Tensor] = []
    position, needed = step * batch_size, batch_size
    while needed:
        epoch, offset = divmod(position, length)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        parts.append(order[offset : offset + needed])
        position, needed = position + len(parts[-1]), needed - len(parts[-1])
    return torch.cat(parts)
