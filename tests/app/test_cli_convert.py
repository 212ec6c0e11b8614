"""`dit import` and `dit export` as they are typed, and the hub without a network."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from app.cli import app
from model.checkpoint import Checkpoint, load, save
from model.export import export_diffusers

GOLDEN = str(Path(__file__).parents[1] / "golden" / "official-tiny-p2.pt")
REVISION = "eab87f77abd5aef071a632f08807fbaab0b704d0"


def dit(*arguments: object, code: int = 0) -> str:
    """What it prints: to stdout where it succeeds, to stderr where it fails."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert (result.stderr if code == 0 else result.stdout) == ""
    return result.stderr if code else result.stdout


def refused(*arguments: object) -> str:
    line = dit(*arguments, code=1)
    assert line.startswith("dit: ") and line.count("\n") == 1, line
    return line


@pytest.fixture
def exported(build_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> Path:
    """A folder for DiTPipeline."""
    export_diffusers(build_checkpoint("diffusion", frequency_shift=1), tmp_path / "exported")
    return tmp_path / "exported"


def test_import_says_which_conventions_it_took_and_what_it_wrote(tmp_path: Path) -> None:
    said = dit("import", GOLDEN, tmp_path / "out", "--heads", 4)
    found = load(tmp_path / "out")
    assert "width 64, depth 2, 4 heads, patch 2, latents 8 × 8 × 4, 10 classes, learned covariance" in said
    assert "divided by 128" in said and "--time-features diffusers" in said and "eps 1e-06" in said and "no VAE" in said
    assert f"wrote {tmp_path / 'out'}, checkpoint {found.hash[:12]}, the DiT in float32" in said
    assert found.config.provenance["imported"]["source"] == GOLDEN
    assert f"Imported from `{GOLDEN}`" in (tmp_path / "out" / "README.md").read_text()


def test_import_takes_every_option(tmp_path: Path, exported: Path) -> None:
    (tmp_path / "names").write_text("\n".join(f"name {i}, other {i}" for i in range(10)))
    options = ["--heads", 8, "--vae", exported, "--dtype", "bfloat16", "--time-features", "diffusers", "--labels", tmp_path / "names"]
    said = dit("import", GOLDEN, tmp_path / "out", *options)
    found = load(tmp_path / "out")
    assert "divided by 127, as DiTPipeline computes them, as asked" in said and f"VAE from {exported / 'vae'}" in said
    assert next(found.dit.parameters()).dtype == torch.bfloat16 and found.config.architecture.num_heads == 8
    assert found.config.architecture.frequency_shift == 1 and found.labels[9] == ("name 9", "other 9") and found.vae


def test_a_checkpoint_without_vae_is_refused_where_pictures_are_wanted(tmp_path: Path) -> None:
    from model.sampling import sample

    dit("import", GOLDEN, tmp_path / "out", "--heads", 4)
    with pytest.raises(ValueError, match="no VAE"):
        sample(load(tmp_path / "out"), [0], steps=1, guidance_scale=1.0, sampler="ddim", seeds=[0])


def test_export_and_import_give_the_same_weights_through_either_format(tmp_path: Path, build_checkpoint: Callable[..., Checkpoint]) -> None:
    save(tmp_path / "ours", build_checkpoint("diffusion"))
    assert f"wrote {tmp_path / 'a.pt'} (official)" in dit("export", tmp_path / "ours", tmp_path / "a.pt", "--format", "official")
    said = dit("export", tmp_path / "ours", tmp_path / "a", "--format", "diffusers")
    assert f"wrote {tmp_path / 'a'} (diffusers)" in said and "warning: this model's time features are the official ones" in said
    dit("import", tmp_path / "a.pt", tmp_path / "one", "--heads", 2)
    dit("import", tmp_path / "a", tmp_path / "two", "--time-features", "official")
    weights = [(tmp_path / name / "dit.safetensors").read_bytes() for name in ("ours", "one", "two")]
    assert weights[0] == weights[1] == weights[2]


def test_what_is_wrong_ends_in_one_line(tmp_path: Path, exported: Path) -> None:
    assert "--heads must tell the number of heads" in refused("import", GOLDEN, tmp_path / "out")
    assert "there is no file or folder nothing" in refused("import", "nothing", tmp_path / "out")
    assert "there is no file or folder nothing" in refused("import", GOLDEN, tmp_path / "out", "--heads", 4, "--vae", "nothing")
    assert "No such file" in refused("import", GOLDEN, tmp_path / "out", "--heads", 4, "--labels", tmp_path / "none.txt")
    assert "never written over" in refused("import", GOLDEN, exported, "--heads", 4)
    assert "is not a checkpoint" in refused("export", exported, tmp_path / "out", "--format", "official")
    (tmp_path / "short.pt").write_bytes(Path(GOLDEN).read_bytes()[:100_000])
    assert "short.pt is no archive of torch.save, or it is cut short" in refused("import", tmp_path / "short.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the hub, as a cache or not at all ---------------------------------------------------------------------------------


def in_cache(cache: Path, repository: str, content: Path) -> None:
    """A repository as huggingface_hub keeps it after a download."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(content, folder / "snapshots" / REVISION)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)


def run(cache: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, since huggingface_hub reads the environment once."""
    shell = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DIT_"))}
    environment = {**shell, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache), **variables}
    command = [sys.executable, "-m", "app.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cache.parent, capture_output=True, text=True, timeout=300)


def test_hub_ids_are_imported_from_the_cache_without_a_network(tmp_path: Path, exported: Path) -> None:
    in_cache(tmp_path / "cache", "facebook/DiT-XL-2-256", exported)
    in_cache(tmp_path / "cache", "stabilityai/sd-vae-ft-ema", exported / "vae")
    result = run(tmp_path / "cache", "import", "facebook/DiT-XL-2-256", tmp_path / "out", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert "divided by 127" in result.stdout and load(tmp_path / "out").vae
    assert load(tmp_path / "out").config.provenance["imported"]["source"] == "facebook/DiT-XL-2-256"
    options = ["--heads", 4, "--vae", "stabilityai/sd-vae-ft-ema"]
    result = run(tmp_path / "cache", "import", GOLDEN, tmp_path / "other", *options, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert load(tmp_path / "other").vae


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "no network"])
def test_without_network_and_cache_one_line_says_what_was_to_be_fetched_and_where(tmp_path: Path, variables: dict[str, str]) -> None:
    (tmp_path / "cache").mkdir()
    result = run(tmp_path / "cache", "import", "facebook/DiT-XL-2-512", tmp_path / "out", **variables)
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    where = variables.get("HF_ENDPOINT", "https://huggingface.co")
    assert result.stderr.startswith("dit: ") and f"{where}/facebook/DiT-XL-2-512 could not be fetched" in result.stderr


def test_a_folder_in_the_cache_that_is_not_whole_is_refused_by_what_it_lacks(tmp_path: Path, exported: Path) -> None:
    (exported / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    in_cache(tmp_path / "cache", "someone/half", exported)
    result = run(tmp_path / "cache", "import", "someone/half", tmp_path / "out", HF_HUB_OFFLINE="1")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "holds no weights" in result.stderr


def test_labels_of_a_published_index_are_names_and_synonyms(tmp_path: Path, exported: Path) -> None:
    index = exported / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"0": "tench, Tinca tinca", "1": "b", "2": "c", "3": "d"}}))
    dit("import", exported, tmp_path / "out")
    assert load(tmp_path / "out").labels == (("tench", "Tinca tinca"), ("b",), ("c",), ("d",))
