"""The pictures of an evaluation as files, for other tools: ADM's `.npz` and a folder of PNGs, written as they are drawn.

50,000 pictures of 256 pixels are 9.8 GB, so they are never in memory together. Shapes: B pictures of a batch.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from training.picture_sets import ARRAY


class NpzWriter:
    """Writes pictures as they come, under a temporary name until the last one is there."""

    def __init__(self, path: Path, count: int) -> None:
        if path.exists():
            raise ValueError(f"{path} exists; pictures are never written over anything")
        self.path, self.count = path, count
        self._written = 0
        self._file: Any = None

    def add(self, images: Tensor) -> None:
        """Pictures (B, H, W, C) uint8; grey ones get three equal channels, as ADM's evaluation wants."""
        if self._file is None:
            self._begin((self.count, *images.shape[1:3], 3))
        self._file.write(np.ascontiguousarray(images.expand(-1, -1, -1, 3).numpy()).tobytes())
        self._written += len(images)
        if self._written == self.count:
            self._file.close()
            self._archive.close()
            self._temporary.replace(self.path)

    def close(self) -> None:
        """No more will come: what was begun and has not all its pictures is removed."""
        if self._file is not None and self._written < self.count:
            self._file.close()
            self._archive.close()
            self._temporary.unlink()

    def _begin(self, shape: tuple[int, ...]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(f".{self.path.name}.new-{os.getpid()}")
        self._archive = zipfile.ZipFile(self._temporary, "w", zipfile.ZIP_STORED)
        self._file = self._archive.open(f"{ARRAY}.npy", "w", force_zip64=True)
        np.lib.format.write_array_header_1_0(self._file, {"descr": "|u1", "fortran_order": False, "shape": shape})


class PngWriter:
    """Writes `000000.png` and so on into a folder of their own."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is no empty folder; pictures are never written among others")
        self.folder = folder
        self._written = 0

    def add(self, images: Tensor) -> None:
        """Pictures (B, H, W, C) uint8."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for image in images.numpy():
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(self.folder / f"{self._written:06d}.png")
            self._written += 1

    def close(self) -> None:
        """Each picture is whole by itself, so those of an evaluation that was stopped stay."""
