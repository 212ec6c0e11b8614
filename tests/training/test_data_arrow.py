"""Hugging Face datasets on disk, in the form that the library writes them: Arrow streams beside a state.json, or parquet."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from training.config import DataConfig
from training.data import Dataset, load_dataset

GREY = DataConfig(image_size=8, image_channels=1)
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), level).save(file, "PNG")
    return file.getvalue()


def table(labels: list[int | None], features: dict[str, object] | None = FEATURES, start: int = 0) -> pa.Table:
    images = pa.array(
        [{"bytes": png(i), "path": f"{i}.png"} for i in range(start, start + len(labels))],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    made = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})} if features else None)


def save(folder: Path, *tables: pa.Table, chunk: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05}-of-{len(tables):05}.arrow" for i in range(len(tables))]
    for name, rows in zip(names, tables, strict=True):
        with pa.ipc.new_stream(str(folder / name), rows.schema) as stream:
            stream.write_table(rows, max_chunksize=chunk)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def load(root: Path) -> Dataset:
    return load_dataset(root, GREY, root.parent / "kept")


def levels(split: object) -> list[int]:
    return split.read(torch.arange(len(split)))[:, 0, 0, 0].tolist()


def test_a_saved_dataset_is_read_over_files_and_chunks(tmp_path: Path) -> None:
    dataset = load(save(tmp_path / "data", table([0, 1] * 7), table([0, 1] * 4, start=14)))
    assert dataset.class_names == ("cat", "dog") and (len(dataset.train), len(dataset.test)) == (20, 2)
    assert levels(dataset.test) == [18, 19] and levels(dataset.train) == [*range(18), 20, 21]


def test_a_saved_dict_keeps_its_parts(tmp_path: Path) -> None:
    save(tmp_path / "data" / "train", table([0, 1, 1]))
    save(tmp_path / "data" / "test", table([1, 0], start=50))
    splits = tmp_path / "data" / "dataset_dict.json"
    splits.write_text(json.dumps({"splits": ["train", "test"]}))
    dataset = load(tmp_path / "data")
    assert levels(dataset.test) == [50, 51] and dataset.train.labels.tolist() == [0, 1, 1]
    splits.write_text(json.dumps({"splits": ["train", "validation"]}))
    with pytest.raises(ValueError, match="has the splits train, validation: train and test are needed, or train alone"):
        load(tmp_path / "data")


@pytest.mark.parametrize("folder", [".", "data"])
def test_parquet_files_are_rewritten_once_and_read(tmp_path: Path, folder: str) -> None:
    (tmp_path / "set" / folder).mkdir(parents=True)
    pq.write_table(table([0, 1, 1]), tmp_path / "set" / folder / "train-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(table([1, 0], start=50), tmp_path / "set" / folder / "test-00000-of-00001.parquet")
    dataset = load(tmp_path / "set")
    assert dataset.class_names == ("cat", "dog") and levels(dataset.train) == [0, 1, 2] and levels(dataset.test) == [50, 51]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.arrow")}
    assert len(written) == 2
    load(tmp_path / "set")
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.arrow")}


def test_plain_columns_without_the_librarys_notes_will_do(tmp_path: Path) -> None:
    rows = pa.table({"picture": pa.array([png(i) for i in range(20)], pa.large_binary()), "label": ["b", "a"] * 10})
    dataset = load(save(tmp_path / "data", rows))
    assert dataset.class_names == ("a", "b") and dataset.train.labels[:3].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table([0, None] * 10), "rows without a label in its column 'label'"),
        (table([0, -1] * 10), "labels from -1 to 0"),
        (table([0, 1, 2] * 10), "names 2 classes, and has larger labels"),
        (table([0, 1] * 10).drop_columns(["label"]), r"one column of pictures and one called label; it has image \(Image\)"),
        (table([0, 1] * 10).drop_columns(["image"]), r"it has label \(ClassLabel\)"),
        (table([0] * 20), "class dog has no picture"),
        (
            pa.table({"image": pa.array([None] * 20, pa.binary()), "label": [0] * 20}),
            "20 of 20 pictures are broken.*row 0 has no picture in it",
        ),
    ],
    ids=["null label", "no label", "large label", "no labels", "no pictures", "empty class", "no bytes"],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path: Path, rows: pa.Table, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(save(tmp_path / "data", rows))


@pytest.mark.parametrize("name", ["../other.arrow", "/etc/passwd", "absent.arrow", None])
def test_a_state_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "other.arrow").write_bytes(b"")
    folder = save(tmp_path / "data", table([0, 1]))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match="which is not in the folder"):
        load(folder)


def test_files_cut_short_are_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path / "data", table([0, 1] * 10))
    path = folder / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    for length in (0, 5, 300, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"data-00000-of-00001\.arrow cannot be read as an Arrow stream"):
            load(folder)
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / "train.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as parquet"):
        load(tmp_path / "parquet")
