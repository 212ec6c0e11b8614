"""CIFAR-10 and CIFAR-100 as their binary versions come: records of a label byte (of CIFAR-100 two: coarse, fine) and 3·32·32 pixels.

Source of the layout: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.config import DataConfig
from training.data.dataset import Dataset, Split
from training.data.idx import class_names, pad_to

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Kind:
    title: str
    train: tuple[str, ...]
    test: str
    names: str
    classes: int
    label_bytes: int  # the last of them is the class


_KINDS = (
    _Kind("CIFAR-10", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", 10, 1),
    _Kind("CIFAR-100", ("train.bin",), "test.bin", "fine_label_names.txt", 100, 2),
)


def find_cifar(root: Path) -> _Kind | None:
    return next((kind for kind in _KINDS if (root / kind.train[0]).is_file()), None)


def load_cifar(root: Path, kind: _Kind, config: DataConfig) -> Dataset:
    missing = [name for name in (*kind.train, kind.test) if not (root / name).is_file()]
    if missing:
        raise ValueError(f"{root} lacks {', '.join(missing)} of {kind.title}")
    train, test = (_split([root / name for name in files], kind, config) for files in (kind.train, (kind.test,)))
    told = f"{kind.title} {root}: {len(train)} training and {len(test)} test images"
    return Dataset(train, test, _names(root / kind.names, kind, config), told, sizes=((_SIDE, _SIDE),) * 2)


def read_cifar(path: Path, *, label_bytes: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 3, 32, 32) uint8 and labels (N,) int64 of one file. ValueError on a wrong length or label."""
    raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    record = label_bytes + _PIXELS
    if not raw.size or raw.size % record:
        raise ValueError(f"{path} holds {raw.size} bytes, which is no whole number of records of {record}")
    records = raw.reshape(-1, record)
    labels = records[:, label_bytes - 1].astype(np.int64)
    if labels.max() >= classes:
        raise ValueError(f"{path} has a label {labels.max()}; {classes} classes are numbered from 0")
    return records[:, label_bytes:].reshape(-1, 3, _SIDE, _SIDE), labels


def _split(paths: list[Path], kind: _Kind, config: DataConfig) -> Split:
    read = [read_cifar(path, label_bytes=kind.label_bytes, classes=kind.classes) for path in paths]
    images, labels = (torch.from_numpy(np.concatenate(part)) for part in zip(*read, strict=True))
    return Split(pad_to(_grey(images) if config.image_channels == 1 else images, config.image_size), labels)


def _grey(images: Tensor) -> Tensor:
    """(N, 3, H, W) → (N, 1, H, W) by the weights of ITU-R 601, rounded as Pillow does for other files."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[:, None]


def _names(path: Path, kind: _Kind, config: DataConfig) -> tuple[str, ...]:
    """One a line, as the set itself names them; without that file the recipe's."""
    if not path.is_file():
        return class_names(kind.classes, config)
    names = tuple(line.strip() for line in path.read_text("utf-8", "replace").splitlines() if line.strip())
    if len(names) != kind.classes:
        raise ValueError(f"{path} names {len(names)} classes; {kind.title} has {kind.classes}")
    return names
