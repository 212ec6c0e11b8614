"""Hugging Face `datasets` on disk: what `save_to_disk` wrote, or the parquet files of a dataset's repository.

Both are read by pyarrow, of which `datasets` is a layer: the library itself would bring some thirty packages more for what is two columns.
Saved folders are memory-mapped Arrow streams already; parquet, which cannot be read row by row, is written as one once, as `datasets` does.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from training.config import DataConfig
from training.data.assemble import assemble
from training.data.dataset import Dataset
from training.data.once import once
from training.data.parts import numbered, parts_of, stamp_of
from training.data.pixels import Unreadable

SPLITS, STATE = "dataset_dict.json", "state.json"
_ROWS = 256  # pictures of a chunk that parquet is rewritten in


@dataclass(frozen=True)
class Columns:
    where: str
    pictures: list[Any]  # a pyarrow array of bytes per chunk
    starts: np.ndarray  # first row of each chunk
    labels: np.ndarray
    stamp: bytes

    def title(self, row: int) -> str:
        return f"{self.where}: row {row}"

    def open(self, row: int) -> BinaryIO:
        chunk = int(np.searchsorted(self.starts, row, side="right")) - 1
        raw = self.pictures[chunk][row - int(self.starts[chunk])].as_py()
        if raw is None:
            raise Unreadable("has no picture in it (one that is kept as a path only cannot be read)")
        return io.BytesIO(raw)


def _pyarrow() -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Hugging Face datasets on disk are read by pyarrow: pip install -e '.[arrow]'") from error
    return pyarrow


def load_saved(root: Path, config: DataConfig, kept_in: Path) -> Dataset:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    folders = [root]
    if (root / SPLITS).is_file():
        splits = set(_json(root / SPLITS).get("splits", []))
        if splits not in ({"train"}, {"train", "test"}):
            raise ValueError(f"{root} has the splits {', '.join(sorted(map(str, splits)))}: train and test are needed, or train alone")
        folders = [root / name for name in ("train", "test") if name in splits]
    parts = [[folder / name for name in _data_files(folder)] for folder in folders]
    return _load(root, parts, parts, config, kept_in)


def load_parquet(root: Path, paths: list[Path], config: DataConfig, kept_in: Path) -> Dataset:
    parts = parts_of(root, paths)
    return _load(root, parts, [[_rewritten(path, stamp_of(root, [path]), kept_in) for path in part] for part in parts], config, kept_in)


def _load(root: Path, parts: list[list[Path]], streams: list[list[Path]], config: DataConfig, kept_in: Path) -> Dataset:
    """`streams` are the Arrow files of each part; `parts` the files they were made of, for their stamp."""
    pa = _pyarrow()
    tables = [_table(pa, paths) for paths in streams]
    picture, label, known = _choose(pa, tables[0], root)
    labels = [table.column(label).to_pylist() for table in tables]
    if any(value is None for part in labels for value in part):
        raise ValueError(f"{root} has rows without a label in its column {label!r}")
    names, numbers = numbered(labels, config, root)
    if known:
        if max(int(part.max()) for part in numbers) >= len(known):
            raise ValueError(f"{root} names {len(known)} classes, and has larger labels")
        names = known
    sources = [
        _columns(pa, table.column(picture), str(paths[0].parent), values, stamp_of(root, paths))
        for table, paths, values in zip(tables, parts, numbers, strict=True)
    ]
    return assemble(sources, names, config, f"Hugging Face dataset {root}", kept_in)


def _columns(pa: Any, pictures: Any, where: str, labels: np.ndarray, stamp: bytes) -> Columns:
    chunks = [chunk.field("bytes") if pa.types.is_struct(chunk.type) else chunk for chunk in pictures.chunks if len(chunk)]
    starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])[:-1]
    return Columns(where, chunks, starts, labels, stamp)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _data_files(folder: Path) -> list[str]:
    files = _json(folder / STATE).get("_data_files")
    names: list[Any] = [entry.get("filename") for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / STATE} names the file {name!r}, which is not in the folder")
    if not names:
        raise ValueError(f"{folder / STATE} names no files")
    return names


def _table(pa: Any, paths: Sequence[Path]) -> Any:
    """Memory-mapped; whether its offsets lie inside it is checked, for a file may be anything."""
    tables = []
    for path in paths:
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())
            tables[-1].validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as an Arrow stream: {error}") from error
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise ValueError(f"{paths[0].parent} has files of different columns: {error}") from error


def _rewritten(path: Path, stamp: bytes, kept_in: Path) -> Path:
    pa, target = _pyarrow(), kept_in / f"{stamp.hex()[:16]}.arrow"

    def write(to: Path) -> None:
        try:
            file = pa.parquet.ParquetFile(path)
            with pa.ipc.new_stream(str(to), file.schema_arrow) as stream:
                for batch in file.iter_batches(_ROWS):
                    stream.write_batch(batch)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as parquet: {error}") from error

    once(target, write)
    return target


def _choose(pa: Any, table: Any, root: Path) -> tuple[str, str, tuple[str, ...]]:
    """The columns of pictures and of labels, and the classes' names where the dataset has them."""
    raw = (table.schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features: dict[str, Any] = json.loads(raw)["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    pictures = [field.name for field in table.schema if kinds.get(field.name) == "Image" or _holds_bytes(pa, field.type)]
    labels = [name for name in table.column_names if kinds.get(name) == "ClassLabel"] or [
        field.name for field in table.schema if pa.types.is_integer(field.type) or pa.types.is_string(field.type)
    ]
    labels = ["label"] if "label" in labels else labels
    if len(pictures) != 1 or len(labels) != 1:
        columns = ", ".join(f"{field.name} ({kinds.get(field.name) or field.type})" for field in table.schema)
        raise ValueError(f"{root} needs one column of pictures and one called label; it has {columns}")
    known = features.get(labels[0], {}).get("names") if kinds.get(labels[0]) == "ClassLabel" else None
    return pictures[0], labels[0], tuple(map(str, known or ()))


def _holds_bytes(pa: Any, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(pa, field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
