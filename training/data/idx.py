"""IDX files, as MNIST and its kin come, and what other sets of small pictures in one file share with them."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.config import DataConfig
from training.data.dataset import Dataset, Split


def find_idx(root: Path, name: str) -> Path | None:
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
    if body.size != math.prod(shape):  # of Python's integers, which do not wrap around
        raise ValueError(f"{path} says {shape} but holds {body.size} values")
    return body.reshape(shape)


def load_idx(root: Path, config: DataConfig) -> Dataset:
    splits = []
    for part in ("train", "t10k"):
        paths = [find_idx(root, f"{part}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if not paths[0] or not paths[1]:
            raise ValueError(f"{root} lacks {part}-images-idx3-ubyte or {part}-labels-idx1-ubyte (each may end in .gz)")
        images, labels = read_idx(paths[0]), read_idx(paths[1])
        if images.ndim != 3 or labels.ndim != 1 or not len(images):
            raise ValueError(f"{paths[0]} holds {images.shape} and {paths[1]} {labels.shape}: (N, h, w) and (N,) are needed")
        if len(images) != len(labels):
            raise ValueError(f"{paths[0]} holds {len(images)} images but {paths[1]} {len(labels)} labels")
        size = images.shape[2], images.shape[1]
        tensor = torch.from_numpy(images.copy())[:, None].expand(-1, config.image_channels, -1, -1)
        splits.append(Split(pad_to(tensor, config.image_size), torch.from_numpy(labels.astype(np.int64))))
    names = class_names(int(max(s.labels.max() for s in splits)) + 1, config)
    told = f"IDX files {root}: {len(splits[0])} training and {len(splits[1])} test images"
    return Dataset(splits[0], splits[1], names, told, sizes=(size, size))


def class_names(classes: int, config: DataConfig) -> tuple[str, ...]:
    """The recipe's, for a source that knows numbers only. ValueError if it has more or fewer."""
    names = config.labels or tuple(str(i) for i in range(classes))
    if len(names) != classes:
        raise ValueError(f"the recipe names {len(names)} labels, the data has {classes} classes")
    return names


def pad_to(images: Tensor, size: int) -> Tensor:
    """Centre (N, C, h, w) on black; ValueError if the images are larger than `size`."""
    height, width = images.shape[-2:]
    if height > size or width > size:
        raise ValueError(f"the images are {height}×{width}, more than the recipe's image_size {size}")
    top, left = (size - height) // 2, (size - width) // 2
    return torch.nn.functional.pad(images, (left, size - width - left, top, size - height - top)).contiguous()
