"""IDX files, as MNIST and its kin come, and what other sets of small pictures in one file share with them."""

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.config import DataConfig
from training.data.dataset import Dataset, Split

_MOST_VALUES = 1 << 33  # ten million pictures of 28 × 28
_MOST_DIMENSIONS = 8
_CHUNK = 1 << 20


def find_idx(root: Path, name: str) -> Path | None:
    return next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """One IDX file of unsigned bytes, gzipped or not. ValueError on a wrong header or length.

    What is zipped is unpacked as far as the header says and no further: a thousand times as much may be in it.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _shape(path, file.read(4), file)
            body = _read(file, math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unzipped: {error}") from error
    if len(body) != math.prod(shape):  # of Python's integers, which do not wrap around
        raise ValueError(f"{path} says {shape} but holds {len(body)} values" + " or more" * (len(body) > math.prod(shape)))
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _shape(path: Path, begin: bytes, file: io.BufferedIOBase) -> tuple[int, ...]:
    dimensions = file.read(4 * begin[3]) if len(begin) == 4 and begin[:3] == b"\0\0\x08" else b""
    if not dimensions or len(dimensions) < 4 * begin[3]:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = tuple(int.from_bytes(dimensions[i : i + 4], "big") for i in range(0, len(dimensions), 4))
    if len(shape) > _MOST_DIMENSIONS or math.prod(shape) > _MOST_VALUES:
        raise ValueError(f"{path} says {' × '.join(map(str, shape[:9]))}, more than {_MOST_VALUES} values or {_MOST_DIMENSIONS} dimensions")
    return shape


def _read(file: io.BufferedIOBase, most: int) -> bytearray:
    """Up to so many bytes, with memory for those that there are."""
    body = bytearray()
    while len(body) < most and (chunk := file.read(min(_CHUNK, most - len(body)))):
        body += chunk
    return body


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
