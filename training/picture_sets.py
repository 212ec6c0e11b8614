"""Pictures of any model in files: ADM's `.npz` (`arr_0`, uint8 (N, H, W, 3)) or a folder of PNGs, read in batches.

Written by training/picture_writers.py. Shapes: B pictures of a batch.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

_BATCH = 100
_SPOILT = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)  # what zipfile raises for bent archives
ARRAY = "arr_0"


@dataclass(frozen=True)
class PictureSet:
    """What a path holds."""

    path: Path
    count: int

    def batches(self) -> Iterator[Tensor]:
        """Pictures (B, 3, H, W) uint8, in the array's order or by the files' names. ValueError names what cannot be read."""
        if self.path.is_dir():
            yield from _read_folder(self.path)
        else:
            with _open_array(self.path) as (file, shape):
                for first in range(0, shape[0], _BATCH):
                    yield _as_rgb(_read_array(self.path, file, (min(_BATCH, shape[0] - first), *shape[1:])))


def open_pictures(path: Path) -> PictureSet:
    """ValueError for what holds no pictures, before any is judged."""
    if path.is_dir():
        return PictureSet(path, len(_pngs(path)))
    with _open_array(path) as (_, shape):
        return PictureSet(path, shape[0])


def _pngs(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.png"))
    if not found:
        raise ValueError(f"{folder} holds no .png file")
    return found


def _read_folder(folder: Path) -> Iterator[Tensor]:
    paths, size = _pngs(folder), None
    for first in range(0, len(paths), _BATCH):
        batch = []
        for path in paths[first : first + _BATCH]:
            try:
                with Image.open(path, formats=("PNG",)) as image:
                    batch.append(np.asarray(image.convert("RGB")))
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"{path} cannot be read as an image: {error}") from error
            size = size or batch[0].shape
            if batch[-1].shape != size:
                raise ValueError(f"{path} has {batch[-1].shape[:2]} pixels, and the pictures before it {size[:2]}: all must have one size")
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A `.npz`. ValueError if it is none, or turns out to be damaged while it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError as error:
        raise ValueError(f"no file or folder {path}") from error
    except _SPOILT as error:
        raise ValueError(f"{path} cannot be read as .npz: {error or type(error).__name__}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What numpy says of bent arrays, with the file's name and in one line."""
    try:
        yield
    except (ValueError, TokenError) as error:
        raise ValueError(f"{path} cannot be read as .npz: {str(error).splitlines()[0]}") from error


@contextmanager
def _open_array(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The array of pictures, behind its header, and its shape."""
    with open_archive(path) as archive:
        if f"{ARRAY}.npy" not in archive.namelist():
            raise ValueError(
                f"{path} holds no array {ARRAY}, where ADM's files have their pictures; it has: {', '.join(archive.namelist())}"
            )
        with archive.open(f"{ARRAY}.npy") as file:
            with naming(path):
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, in_columns, dtype = read(file)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not shape[0] or in_columns:
                raise ValueError(f"{ARRAY} of {path} is {dtype} {shape}; pictures are uint8 (N, height, width, 3 or 1)")
            yield file, shape


def _read_array(path: Path, file: IO[bytes], shape: tuple[int, ...]) -> Tensor:
    """A part of the array → (B, C, H, W)."""
    wanted = int(np.prod(shape))
    raw = file.read(wanted)
    if len(raw) != wanted:
        raise ValueError(f"{path} ends before its last picture")
    return torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(shape).copy()).permute(0, 3, 1, 2)


def _as_rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)
