"""Files that others made: what is read, and every wrong one refused in one line that names the file and what is wrong in it."""

import argparse
import io
import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.sources import BIN, INDEX, SAFETENSORS, ConversionError, find_weights, locate, read_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "official-tiny-p2.pt"


def refused(read: Callable[[], Any]) -> str:
    """The message, which is one line."""
    with pytest.raises(ConversionError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def pickled(path: Path, payload: bytes, record: str = "archive/data.pkl", compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(record, payload)
        archive.writestr("archive/version", "3\n")
    return path


def pickles_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# --- what is read ------------------------------------------------------------------------------------------------------


def test_a_flat_state_dict_is_read_as_it_is() -> None:
    weights, plain = read_weights(GOLDEN), torch.load(GOLDEN, weights_only=True)
    assert list(weights.tensors) == list(plain) and all(torch.equal(weights.tensors[key], plain[key]) for key in plain)
    assert list(weights.sha256()) == [GOLDEN.name]


def test_of_a_training_checkpoint_the_moving_average_is_taken(tmp_path: Path) -> None:
    model, ema = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    torch.optim.AdamW(model.parameters()).step()
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, lr=1e-4, results_dir="results")
    content = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "opt": torch.optim.AdamW(model.parameters()).state_dict(),
        "args": args,
    }
    torch.save(content, tmp_path / "0400000.pt")
    tensors = read_weights(tmp_path / "0400000.pt").tensors
    assert torch.equal(tensors["weight"], ema.weight) and not tensors["weight"].requires_grad


def test_parameters_are_read_as_tensors(tmp_path: Path) -> None:
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "a.pt")
    assert not read_weights(tmp_path / "a.pt").tensors["w"].requires_grad


def test_safetensors_come_before_shards_and_shards_before_bin(tmp_path: Path) -> None:
    assert "holds no weights" in refused(lambda: find_weights(tmp_path))
    for name in (BIN, INDEX, SAFETENSORS):
        (tmp_path / name).touch()
        assert find_weights(tmp_path).name == name


def sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]], names: dict[str, str] | None = None) -> Path:
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    known = names or {key: name for name, tensors in shards.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": known}))
    return folder / INDEX


def test_shards_are_read_together(tmp_path: Path) -> None:
    weights = read_weights(sharded(tmp_path, {"a.safetensors": {"x": torch.ones(1)}, "b.safetensors": {"y": torch.zeros(2)}}))
    assert set(weights.tensors) == {"x", "y"} and set(weights.sha256()) == {"a.safetensors", "b.safetensors"}


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "a.bin", INDEX, 7], ids=str)
def test_an_index_names_safetensors_beside_it_and_nothing_else(tmp_path: Path, name: Any) -> None:
    assert "weight_map" in refused(lambda: read_weights(sharded(tmp_path, {}, {"x": name})))


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = sharded(
        tmp_path,
        {"a.safetensors": {"x": torch.ones(1)}, "b.safetensors": {"x": torch.ones(1)}},
        {"x": "a.safetensors", "y": "b.safetensors"},
    )
    assert "'x' is in 2 of its files" in refused(lambda: read_weights(index))


# --- code that would run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch.save", "legacy torch.save", "a bare pickle", "a zip of one"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, form: str) -> None:
    path, ran = tmp_path / "model.pt", tmp_path / "ran"
    content = {"pos_embed": torch.ones(1), "evil": Touch(ran)}
    if form == "a bare pickle":
        path.write_bytes(pickle.dumps(Touch(ran)))
    elif form == "a zip of one":
        pickled(path, pickle.dumps(Touch(ran), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch.save")
    message = refused(lambda: read_weights(path))
    assert str(path) in message and ("posix.system" in message or "no archive of torch.save" in message)
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "torch load", "torch._utils _rebuild_wrapper_subclass", "builtins bytearray", "argparse ArgumentParser"]
)
def test_a_pickle_may_name_tensors_and_a_namespace_and_nothing_else(tmp_path: Path, name: str) -> None:
    payload = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n."
    assert repr(name.replace(" ", ".")) in refused(lambda: read_weights(pickled(tmp_path / "a.pt", payload)))


def test_another_pickle_protocol_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt", pickle_protocol=4)
    assert "protocol 4" in refused(lambda: read_weights(tmp_path / "a.pt"))


# --- files that would fill the memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ["archive/data.pkl", "archive/data/0"])
def test_a_compressed_record_is_refused_before_it_grows(tmp_path: Path, record: str) -> None:
    path = pickled(tmp_path / "bomb.pt", b"\0" * 2**26, record, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**18
    assert f"record '{record}' is compressed" in refused(lambda: read_weights(path))


def test_overlapping_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", b"\0" * 4096)
        for i in range(1, 100):
            record = zipfile.ZipInfo(f"archive/data/{i}")
            record.file_size = record.compress_size = 4096
            archive.filelist.append(record)
            record.header_offset, record.CRC, record.external_attr = 0, archive.filelist[0].CRC, 0
    assert "claim more bytes than it has" in refused(lambda: read_weights(path))


def test_a_tensor_that_claims_more_than_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"pos_embed": torch.ones(4), "x": torch.ones(1).expand(10**12)}, tmp_path / "a.pt")
    assert "'x' claims 4000000000000 bytes, of which it holds 4" in refused(lambda: read_weights(tmp_path / "a.pt"))


def test_tensors_that_share_their_bytes_are_refused_where_they_would_be_copied(tmp_path: Path) -> None:
    shared = torch.ones(1000)
    torch.save({str(i): shared[: 1000 - i] for i in range(100)}, tmp_path / "a.pt")
    weights = read_weights(tmp_path / "a.pt")
    weights.require_held(["0"])
    assert "share them" in refused(lambda: weights.require_held(list(weights.tensors)))


# --- files that are damaged or other things ----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    save_file(torch.load(GOLDEN, weights_only=True), tmp_path / "a.safetensors")
    for path in (GOLDEN, tmp_path / "a.safetensors"):
        content, cut = path.read_bytes(), tmp_path / f"cut{path.suffix}"
        cut.write_bytes(content[: int(kept * len(content))])
        assert str(cut) in refused(lambda cut=cut: read_weights(cut))


def test_a_bent_pickle_is_refused_in_one_line_or_read(tmp_path: Path) -> None:
    """Random bytes of the pickle are changed; whatever torch makes of it, nothing but our error comes out."""
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, tmp_path / "sound.pt")
    records, changes, path = pickles_of(tmp_path / "sound.pt"), random.Random(0), tmp_path / "bent.pt"
    name = next(name for name in records if name.endswith("data.pkl"))
    outcomes = set()
    for _ in range(300):
        payload = bytearray(records[name])
        for _ in range(changes.randint(1, 3)):
            payload[changes.randrange(len(payload))] = changes.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for record, content in {**records, name: bytes(payload)}.items():
                archive.writestr(record, content)
        try:
            read_weights(path)
            outcomes.add("read")
        except ConversionError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, not a state dict"),
        ({"x": 1.0}, "'x' is a float, not a tensor"),
        ({7: torch.ones(1)}, "key 7 is no string"),
        ({"x": torch.ones(1, dtype=torch.int64)}, "'x' is of type int64"),
        (OrderedDict(y=OrderedDict(x=torch.ones(1))), "'y' is a OrderedDict, not a tensor"),
    ],
    ids=["list", "number", "key", "integers", "nested"],
)
def test_what_is_no_dict_of_floating_tensors_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert message in refused(lambda: read_weights(tmp_path / "a.pt"))


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("holiday.txt", "sun")
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    assert "a.pt is damaged" in refused(lambda: read_weights(tmp_path / "a.pt"))


@pytest.mark.parametrize("source", ["nothing-here", "a/b/c", "/missing/x.pt", "two words/x", "-/x"])
def test_what_is_neither_here_nor_a_hub_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert "nor can it be a hub id" in refused(lambda: locate(source))
    assert locate(str(tmp_path)) == tmp_path
