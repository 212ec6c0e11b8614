"""What `dit up --model` serves: a checkpoint as it is, or an import that is made once."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from app.imports import checkpoint_folder, imported_folder
from model.checkpoint import Checkpoint, load
from model.export import export_diffusers

GOLDEN = Path(__file__).parents[1] / "golden" / "official-tiny-p2.pt"


def choose(model: str, data: Path) -> tuple[Path, list[str]]:
    """The folder, and what was said on the way."""
    said: list[str] = []
    return checkpoint_folder(model, data, threading.Event(), said.append), said


@pytest.fixture
def exported(build_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> Path:
    export_diffusers(build_checkpoint("diffusion", frequency_shift=1), tmp_path / "exported")
    return tmp_path / "exported"


def test_a_checkpoint_and_a_registry_entry_are_served_as_they_are(
    tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "entry", name="111111111111")
    (tmp_path / "entry" / "latest").write_text("111111111111")
    monkeypatch.chdir(tmp_path)
    assert choose(str(folder), tmp_path / "data") == (folder, [])
    assert choose("entry", tmp_path / "data") == (tmp_path / "entry", [])
    assert not (tmp_path / "data").exists()


def test_a_folder_is_imported_once_and_again_when_it_has_changed(tmp_path: Path, exported: Path) -> None:
    first, said = choose(str(exported), tmp_path / "data")
    assert first.parent == tmp_path / "data" / "imported" and first.name.startswith("exported-") and load(first).vae
    assert said == [f"importing {exported} to {first}"]
    assert choose(str(exported), tmp_path / "data") == (first, [])
    os.utime(exported / "vae" / "config.json", ns=(0, 0))
    second, said = choose(str(exported), tmp_path / "data")
    assert second != first and len(said) == 1


def test_every_source_has_a_folder_of_its_own_with_a_plain_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = ["facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512", "other/DiT-XL-2-256", str(GOLDEN), "./.hidden name"]
    folders = [imported_folder(source, tmp_path).name for source in sources]
    assert len(set(folders)) == len(sources)
    assert [name.rpartition("-")[0] for name in folders] == ["DiT-XL-2-256", "DiT-XL-2-512", "DiT-XL-2-256", GOLDEN.stem, "hidden-name"]


def test_a_failed_import_says_why_itself_and_ends_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        choose(str(GOLDEN), tmp_path / "data")
    assert ended.value.code == 1
    assert capfd.readouterr().err == f"dit: {GOLDEN}: no preset has depth 2 and width 64, so --heads must tell the number of heads\n"
    assert not list((tmp_path / "data").glob("imported/*"))


def test_what_has_no_vae_is_refused_with_the_command_that_gives_it_one(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(ValueError, match=r"has no VAE, so it cannot be served; give it one with: dit import .*transformer DEST --vae"):
        choose(str(exported / "transformer"), tmp_path / "data")


def test_an_interrupted_import_leaves_nothing_behind(tmp_path: Path, exported: Path) -> None:
    stop = threading.Event()
    stop.set()
    half = imported_folder(str(exported), tmp_path / "data")
    (half.parent / f".{half.name}.new-abc").mkdir(parents=True)  # as a killed import would leave it
    folder = checkpoint_folder(str(exported), tmp_path / "data", stop, lambda _: None)
    assert folder == half and not any(half.parent.iterdir())


def test_what_cannot_be_imported_is_refused_before_anything_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match="there is no file or folder nowhere, nor can it be a hub id"):
        checkpoint_folder("nowhere", tmp_path, threading.Event(), said.append)
    assert not said
