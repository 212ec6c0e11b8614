"""`dit evaluate` as the paper does: pictures against a reference in Inception's features, with a checkpoint and without.

The weights are random ones, so the numbers are no FIDs; that a file of other weights is refused is tested elsewhere.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from app.cli import app
from model.checkpoint import read_config
from tests.training.random_inception import random_weights
from training import inception_weights
from training.classifier import ClassifierConfig
from training.evaluate import evaluate
from training.inception_measures import NAMES

TINY_CLASSIFIER = ClassifierConfig(widths=(8, 8), features=6, steps=60, batch_size=32)
PAPERS = set(NAMES.values())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_weights(), path)
    return path


@pytest.fixture(autouse=True)
def taken_for_the_real_ones(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception_weights, "SHA256_PREFIX", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """Four grey pictures of one brightness each, and some noise."""
    noise = np.random.default_rng(0).integers(0, 30, (4, 16, 16, 1))
    np.savez(tmp_path / "real.npz", (noise + 40 * np.arange(4)[:, None, None, None]).astype(np.uint8))
    return tmp_path / "real.npz"


@pytest.fixture
def path(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "models")


def test_the_papers_measures_are_kept_beside_the_classifiers_with_how_they_were_taken(
    path: Path, reference: Path, weights: Path, make_idx_folder: Callable[..., Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"cache": tmp_path / "classifiers", "classifier_config": TINY_CLASSIFIER}
    local = evaluate(path, make_idx_folder(tmp_path / "data"), samples=16, **options)
    _, before = read_config(path)
    lines: list[str] = []
    paper: dict[str, Any] = {"reference": reference, "inception": weights, "guidance_channels": "first-three"}
    metrics = evaluate(path, **paper, samples=5, show=lines.append)
    config, after = read_config(path)
    assert after == before and config.metrics == metrics
    assert {name: metrics[name] for name in local} == local and metrics.keys() - local.keys() == PAPERS | {"inception"}
    told = metrics["inception"]
    assert (told["samples"], told["labels"], told["rounding"], told["reference_pictures"]) == (5, "random", "nearest", 4)
    assert (told["reference"], told["steps"], told["sampler"], told["guidance_channels"]) == ("real.npz", 4, "euler", "first-three")
    card = (path / "README.md").read_text()
    assert f"| {metrics['fid']:.2f} | {metrics['sfid']:.2f} | {metrics['inception_score']:.1f} |" in card and "recall" in card
    printed = "\n".join(lines)
    assert "5 pictures (euler, 4 steps, guidance 2, on the first three channels, " in printed and f"FID {metrics['fid']:.2f}" in printed
    again = evaluate(path, tmp_path / "data", samples=20, **options)
    assert {name: again[name] for name in PAPERS} == {name: metrics[name] for name in PAPERS}
    assert (again["samples"], again["inception"]["samples"]) == (20, 5), "each beside its own account"


def test_pictures_written_by_one_command_are_measured_alike_by_another(path: Path, reference: Path, weights: Path, tmp_path: Path) -> None:
    npz, folder = tmp_path / "out" / "pictures.npz", tmp_path / "pngs"
    metrics = evaluate(path, reference=reference, inception=weights, samples=4, save_npz=npz, save_png=folder, save=False)
    with np.load(npz) as file:
        assert file["arr_0"].shape == (4, 16, 16, 3)
        with Image.open(folder / "000003.png") as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), file["arr_0"][3])
    command = ["evaluate", "--pictures", str(npz), "--reference", str(reference), "--inception", str(weights)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (
        f"FID {metrics['fid']:.2f}, sFID {metrics['sfid']:.2f}" in result.output
        and "4 pictures (pictures.npz) against real.npz" in result.output
    )


def test_pictures_are_written_without_any_judge(path: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    result = CliRunner().invoke(app, ["evaluate", str(path), "--samples", "5", "--save-npz", str(tmp_path / "p.npz")])
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "p.npz") as file:
        assert file["arr_0"].shape == (5, 16, 16, 3)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a checkpoint to draw from, or --pictures of any model, and not both"),
        (["CHECKPOINT", "--pictures", "p.npz"], "and not both"),
        (["CHECKPOINT"], "nothing to do: give --data, or --reference and --inception"),
        (["--pictures", "p.npz", "--data", "d"], "--pictures goes with --reference and --inception alone"),
        (["--pictures", "nowhere.npz", "--reference", "r.npz", "--inception", "w.pth"], "no file or folder nowhere.npz"),
        (["--pictures", "REFERENCE", "--reference", "REFERENCE"], "--inception is missing: the file weights-inception"),
        (["--pictures", "REFERENCE", "--inception", "w.pth"], "--reference is missing: a .npz with ADM's statistics"),
        (["CHECKPOINT", "--save-npz", "REFERENCE"], "real.npz exists"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(path: Path, reference: Path, arguments: list[str], message: str) -> None:
    named = {"CHECKPOINT": str(path), "REFERENCE": str(reference)}
    result = CliRunner().invoke(app, ["evaluate", *(named.get(a, a) for a in arguments)])
    assert result.exit_code == 1 and result.stderr.startswith("dit: ") and message in result.stderr and result.stderr.count("\n") == 1
