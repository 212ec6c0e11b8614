"""Weights that others made, from a file, a folder or the hub: mapped into memory, never trusted.

A `.pt` is a zip archive of one pickle and raw numbers. The pickle may name a few harmless things and nothing else; it is never unpickled in
any other way. No tensor may claim more numbers than the file holds. So a file costs no more memory than it is long, and runs no code.
"""

import argparse
import hashlib
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HTTPError, XetDownloadError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SAFETENSORS = "diffusion_pytorch_model.safetensors"
INDEX = f"{SAFETENSORS}.index.json"
SHARDS = "diffusion_pytorch_model-*.safetensors"
BIN = "diffusion_pytorch_model.bin"
_FOLDERS = ("", "transformer/", "vae/", "scheduler/")  # of a hub repository
_JSON = ("config.json", "model_index.json", "scheduler_config.json")

_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage|argparse Namespace")
_PICKLE_BYTES = 2**26  # the official XL/2's has 40 kB
# What torch.load raises for a pickle that somebody bent, besides UnpicklingError.
_BENT = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    EOFError,
    OSError,
    struct.error,
    MemoryError,
)


class ConversionError(ValueError):
    """One line for who imports or exports: the file, and the first thing in it that is wrong."""


@dataclass(frozen=True)
class Weights:
    """Floating-point tensors by the names of their file, mapped and not yet read."""

    path: Path  # the file, or the index of several
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]

    def require_keys(self, expected: list[str]) -> None:
        """The first key that is missing, in the order given, else the first that is unknown."""
        for key in expected:
            if key not in self.tensors:
                raise ConversionError(f"{self.path}: lacks key {key!r}")
        for key in sorted(self.tensors.keys() - set(expected)):
            raise ConversionError(f"{self.path}: has an unknown key {key!r}")

    def require_sizes(self, expected: dict[str, tuple[int, ...]]) -> None:
        for key, size in expected.items():
            if tuple(self.tensors[key].shape) != size:
                raise ConversionError(f"{self.path}: {key} has size {tuple(self.tensors[key].shape)}, not {size}")

    def require_held(self, keys: list[str]) -> None:
        """The tensors of these keys do not share bytes, so that copying them costs no more than the file is long."""
        claimed, held = sum(self.tensors[key].nbytes for key in keys), sum(file.stat().st_size for file in self.files)
        if claimed > held:
            raise ConversionError(f"{self.path}: its tensors claim {claimed} bytes and share them, for it holds {held}")

    def sha256(self) -> dict[str, str]:
        def digest(path: Path) -> str:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return {file.name: digest(file) for file in self.files}


def read_weights(path: Path) -> Weights:
    """A `.safetensors`, the index of several, or what torch.save wrote: flat, or a training checkpoint, whose `ema` is taken."""
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_archive(path)
    for key, value in tensors.items():
        _require_tensor(path, key, value)
    return Weights(path, (path,), {key: value.detach() for key, value in tensors.items()})


def find_weights(folder: Path) -> Path:
    """Of a diffusers model: safetensors before shards before `.bin`."""
    for name in (SAFETENSORS, INDEX, BIN):
        if (folder / name).is_file():
            return folder / name
    raise ConversionError(f"{folder} holds no weights: neither {SAFETENSORS}, nor {INDEX}, nor {BIN}")


def _require_tensor(path: Path, key: Any, value: Any) -> None:
    if not isinstance(key, str):
        raise ConversionError(f"{path}: its key {key!r} is no string")
    if not isinstance(value, Tensor):
        raise ConversionError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor")
    if value.dtype not in _FLOATING:
        raise ConversionError(f"{path}: {key!r} is of type {str(value.dtype).removeprefix('torch.')}, not of floating point")
    if value.nbytes > value.untyped_storage().nbytes():
        raise ConversionError(f"{path}: {key!r} claims {value.nbytes} bytes, of which it holds {value.untyped_storage().nbytes()}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ConversionError(f"{path} is no sound safetensors file: {error}") from error


def _read_shards(index: Path) -> Weights:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(name)) for name in names.values()):
        raise ConversionError(f"{index}: its weight_map does not name safetensors files beside it")
    shards = [read_weights(index.parent / name) for name in sorted(set(names.values()))]
    for key, count in Counter(key for shard in shards for key in shard.tensors).items():
        if count > 1:
            raise ConversionError(f"{index}: {key!r} is in {count} of its files")
    tensors = {key: value for shard in shards for key, value in shard.tensors.items()}
    return Weights(index, tuple(shard.path for shard in shards), tensors)


def _read_archive(path: Path) -> dict[Any, Any]:
    """What torch.save wrote, mapped: torch reads numbers from the file as they are used."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd pickles, which are refused
            _require_harmless(path)
            with torch.serialization.safe_globals([argparse.Namespace]):  # `args` of a training checkpoint
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except ConversionError:
        raise
    except (pickle.UnpicklingError, *_BENT) as error:
        raise ConversionError(f"{path} is damaged: {(str(error).strip() or repr(error)).splitlines()[0]}") from error
    if isinstance(content, dict) and isinstance(content.get("ema"), dict):
        content = content["ema"]
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _require_harmless(path: Path) -> None:
    """No compressed or overlapping records, which could be a bomb, and no pickle that names more than tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            for record in records:
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                    raise ConversionError(f"{path}: its record {record.filename!r} is compressed, which torch.save never does")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ConversionError(f"{path}: its records claim more bytes than it has")
            for record in records:
                if record.filename.endswith(".pkl"):
                    _require_harmless_pickle(path, archive, record)
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise ConversionError(f"{path} is no archive of torch.save, or it is cut short: {error}") from error


def _require_harmless_pickle(path: Path, archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    if record.file_size > _PICKLE_BYTES:
        raise ConversionError(f"{path}: its record {record.filename!r} has {record.file_size} bytes")
    try:
        for operation, argument, _ in pickletools.genops(archive.read(record)):
            if operation.name == "PROTO" and argument != 2:
                raise ConversionError(f"{path} was pickled with protocol {argument}; weights alone are read with torch.save's own, 2")
            if operation.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
                name = str(argument).replace(" ", ".")
                raise ConversionError(f"{path} holds more than weights: {name!a}, which could run code, so it is not unpickled")
    except ValueError as error:
        raise error if isinstance(error, ConversionError) else ConversionError(f"{path} is damaged: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ConversionError if the file is missing or holds something else."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return document


def locate(source: str) -> Path:
    """A path, or a hub id such as `facebook/DiT-XL-2-256` → what is on this disk, fetched if it must be."""
    path = Path(source)
    if path.exists():
        return path
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII):
        return _fetch(source)
    raise ConversionError(f"there is no file or folder {source}, nor can it be a hub id such as facebook/DiT-XL-2-256")


def _fetch(repository: str) -> Path:
    """The files of it that are read here, from the hub or its cache; `.bin` only where there is no safetensors."""
    folder = _snapshot(repository, (*_JSON, SAFETENSORS, INDEX, SHARDS))
    models = [path.parent for path in folder.glob("**/config.json")]
    if any(not (model / SAFETENSORS).exists() and not (model / INDEX).exists() for model in models):
        _snapshot(repository, (BIN,))
    return folder


def _snapshot(repository: str, names: tuple[str, ...]) -> Path:
    patterns = [folder + name for folder in _FOLDERS for name in names]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError, HTTPError, XetDownloadError) as error:  # no network, no such repository, one that is not public
        said = str(error).strip().splitlines()[0]
        where = f"{constants.ENDPOINT}/{repository}"
        raise ConversionError(f"there is no file or folder {repository}, and as a hub id {where} could not be fetched: {said}") from error
