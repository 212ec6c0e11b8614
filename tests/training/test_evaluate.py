"""`dit evaluate` on synthetic data and a tiny random checkpoint, and the classifier and model card it relies on."""

import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import Checkpoint, CheckpointConfig, load, read_config, save
from model.config import DiTConfig, ObjectiveConfig, VAEConfig
from model.dit import DiT
from model.sampling import sample
from model.vae import VAE
from training.card import model_card
from training.classifier import CLASSIFIER_WEIGHTS, ClassifierConfig, ConvNet, classifier_key, get_classifier
from training.config import DataConfig
from training.data import Dataset, load_dataset
from training.evaluate import evaluate
from training.local_measures import rows_like

LABELS = (("dark", "night"), ("grey",), ("light",))
Run = Callable[..., dict[str, Any]]
TINY_CLASSIFIER = ClassifierConfig(widths=(8, 8), features=6, steps=60, batch_size=32)
CPU = torch.device("cpu")


def idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def pictures_of(labels: np.ndarray, seed: int) -> np.ndarray:
    """Grey 8×8 images whose brightness tells their class."""
    noise = np.random.default_rng(seed).integers(0, 40, (len(labels), 8, 8))
    return noise + 80 * labels[:, None, None]


@pytest.fixture
def idx_data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for part, count, seed in (("train", 90, 0), ("t10k", 30, 1)):
        labels = np.arange(count) % 3
        idx(folder / f"{part}-images-idx3-ubyte", pictures_of(labels, seed))
        idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return folder


@pytest.fixture
def checkpoint_path(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "checkpoint", image_channels=1)


def save_tiny(path: Path, image_channels: int) -> Path:
    torch.manual_seed(0)
    vae = VAEConfig(8, image_channels, latent_channels=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    dit = DiTConfig(
        input_size=4,
        patch_size=2,
        in_channels=2,
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=3,
        learn_sigma=False,
        time_factor=1000.0,
    )
    config = CheckpointConfig(dit, ObjectiveConfig("flow"), 8, image_channels, LABELS, 2, 2.0, "euler", vae=vae)
    save(path, Checkpoint(config, DiT(dit).eval(), VAE(vae).eval()), dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data is the same in most tests, so its classifier is trained once."""
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture
def run(classifiers: Path) -> Run:
    """`run(checkpoint, data, **changes)`: 36 pictures."""

    def run(checkpoint_path: Path, data: Path, **changes: Any) -> dict[str, Any]:
        settings = {"samples": 36, "batch_size": 16, "cache": classifiers, "classifier_config": TINY_CLASSIFIER} | changes
        return evaluate(checkpoint_path, data, **settings)

    return run


def dataset_of(folder: Path) -> Dataset:
    return load_dataset(folder, DataConfig(8, 1))


def test_classifier_learns_the_data_and_is_trained_once(idx_data: Path, tmp_path: Path) -> None:
    dataset = dataset_of(idx_data)
    first = get_classifier(dataset, tmp_path / "cache", CPU, TINY_CLASSIFIER)
    weights = tmp_path / "cache" / first.key / CLASSIFIER_WEIGHTS
    os.utime(weights, (1, 1))
    second = get_classifier(dataset, tmp_path / "cache", CPU, TINY_CLASSIFIER)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert weights.stat().st_mtime == 1
    assert first.test_accuracy == second.test_accuracy > 0.9
    a, b = (c.judge(dataset.test.images) for c in (first, second))
    assert torch.equal(a.features, b.features) and torch.equal(a.predicted, b.predicted)
    assert a.features.shape == (30, 6) and a.features.dtype == torch.float32


def test_classifier_trained_twice_is_the_same_classifier(idx_data: Path, tmp_path: Path) -> None:
    dataset = dataset_of(idx_data)
    one, other = (get_classifier(dataset, tmp_path / name, CPU, TINY_CLASSIFIER) for name in ("one", "other"))
    assert torch.equal(one.judge(dataset.test.images).features, other.judge(dataset.test.images).features)


def test_classifier_key_follows_pixels_labels_and_configuration(idx_data: Path) -> None:
    dataset = dataset_of(idx_data)
    key = classifier_key(dataset, TINY_CLASSIFIER)
    assert key == classifier_key(dataset_of(idx_data), TINY_CLASSIFIER)
    assert key != classifier_key(dataset, replace(TINY_CLASSIFIER, steps=61))
    dataset.test.labels[0] += 1
    assert key != classifier_key(dataset, TINY_CLASSIFIER)
    dataset.test.labels[0] -= 1
    dataset.train.images[0, 0, 0, 0] += 1
    assert key != classifier_key(dataset, TINY_CLASSIFIER)


@pytest.mark.parametrize(("channels", "size"), [(1, 1), (3, 4), (1, 28), (3, 64), (3, 72)])
def test_classifier_takes_pictures_of_any_size(channels: int, size: int) -> None:
    network = ConvNet(TINY_CLASSIFIER, channels, size, num_classes=5).eval()
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 5)


def test_classifier_refuses_pixels_that_were_not_quantised(idx_data: Path, tmp_path: Path) -> None:
    classifier = get_classifier(dataset_of(idx_data), tmp_path / "cache", CPU, TINY_CLASSIFIER)
    with pytest.raises(ValueError, match="uint8 pictures"):
        classifier.judge(torch.zeros(2, 1, 8, 8))


def test_evaluation_measures_prints_and_keeps_its_results_in_the_checkpoint(run: Run, idx_data: Path, checkpoint_path: Path) -> None:
    before, lines = read_config(checkpoint_path)[1], []
    metrics = run(checkpoint_path, idx_data, show=lines.append)
    config, after = read_config(checkpoint_path)  # verifies every file
    assert after == before and config.metrics == metrics
    assert metrics["classifier_accuracy"] > 0.9
    assert metrics["frechet_distance_train"] < metrics["frechet_distance"]
    assert {metrics[k] for k in ("samples", "test_images", "train_images")} == {36, 30}
    assert (metrics["steps"], metrics["guidance_scale"], metrics["sampler"], metrics["dtype"]) == (2, 2.0, "euler", "bfloat16")
    printed, card = "\n".join(lines), (checkpoint_path / "README.md").read_text()
    for name in ("frechet_distance", "spatial_frechet_distance", "classifier_score"):
        for told in (f"{metrics[name + suffix]:.3f}" for suffix in ("", "_reconstructions", "_train")):
            assert told in printed and told in card
    for name in ("precision", "recall_train", "class_consistency", "near_copies"):
        assert f"{100 * metrics[name]:.1f} %" in printed and f"{100 * metrics[name]:.1f} %" in card
    assert len(metrics["class_consistencies"]) == len(metrics["class_accuracies"]) == 3
    assert (metrics["labels"], metrics["rounding"], metrics["train_images"]) == ("balanced", "nearest", 36)


def test_real_images_have_the_better_measures(run: Run, idx_data: Path, checkpoint_path: Path) -> None:
    """The checkpoint's weights are random, so whatever is measured must say so."""
    metrics = run(checkpoint_path, idx_data, save=False)
    for name in ("frechet_distance", "spatial_frechet_distance", "kernel_distance"):
        assert metrics[f"{name}_train"] < metrics[name] and metrics[f"{name}_train"] < metrics[f"{name}_reconstructions"]
    for name in ("precision", "recall", "classifier_score"):
        assert metrics[f"{name}_train"] > metrics[name] and metrics[f"{name}_train"] > metrics[f"{name}_reconstructions"]
    assert metrics["precision_train"] > 0.8 and metrics["classifier_accuracy"] > 0.9 > metrics["class_consistency"]


def test_the_floors_images_have_the_classes_of_the_pictures() -> None:
    labels = torch.arange(90) % 3
    labels[:9] = 0  # six more of it
    chosen = rows_like(labels, torch.tensor([0] * 20 + [1] * 50 + [2] * 3))
    assert labels[chosen].bincount().tolist() == [20, 27, 3], "all that there are, where more were asked for"
    assert len(chosen.unique()) == 50 and len(set(labels[chosen[:20]].tolist())) > 1, "in no order"


def test_plots_and_grid_are_kept_beside_the_weights(run: Run, idx_data: Path, checkpoint_path: Path) -> None:
    run(checkpoint_path, idx_data)
    files = read_config(checkpoint_path)[0], {path.name for path in checkpoint_path.iterdir()}
    assert {"grid.png", "evaluation.png", "neighbours.png"} <= files[1]
    for name in ("evaluation.png", "neighbours.png"):
        with Image.open(checkpoint_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10 and min(picture.size) > 200
        assert f"({name})" in (checkpoint_path / "README.md").read_text()


def test_random_labels_are_recorded_and_asked_for(run: Run, idx_data: Path, checkpoint_path: Path) -> None:
    metrics = run(checkpoint_path, idx_data, labels="random", samples=12)
    assert metrics["labels"] == "random" and "random labels" in (checkpoint_path / "README.md").read_text()
    with Image.open(checkpoint_path / "grid.png") as picture:
        assert picture.size == (4 * 8 * 2, 3 * 8 * 2), "a row for each class, black where too few were drawn"


def test_grid_has_one_row_per_class_of_the_models_own_pictures(run: Run, idx_data: Path, checkpoint_path: Path) -> None:
    run(checkpoint_path, idx_data)
    with Image.open(io.BytesIO((checkpoint_path / "grid.png").read_bytes())) as picture:
        found = np.asarray(picture)
    assert found.shape == (3 * 8 * 2, 10 * 8 * 2)
    image = sample(load(checkpoint_path), [1] * 4, steps=2, guidance_scale=2.0, sampler="euler", seeds=[1, 4, 7, 10])[2]
    shown = found[16:32:2, 2 * 16 : 3 * 16 : 2]  # second row, third column
    assert np.abs(shown.astype(int) - image[..., 0].numpy().astype(int)).max() <= 2  # the batch size moves bfloat16's last bits


def test_evaluation_without_saving_leaves_the_checkpoint_as_it_was(run: Run, idx_data: Path, checkpoint_path: Path) -> None:
    metrics = run(checkpoint_path, idx_data, save=False, samples=5, steps=1, guidance_scale=1.0)
    assert (metrics["samples"], metrics["steps"], metrics["guidance_scale"]) == (5, 1, 1.0)
    assert not (checkpoint_path / "grid.png").exists() and read_config(checkpoint_path)[0].metrics == {}


def test_evaluation_takes_an_image_folder_in_colour(run: Run, tmp_path: Path) -> None:
    labels = np.arange(60) % 3
    for i, (label, image) in enumerate(zip(labels, pictures_of(labels, 2), strict=True)):
        folder = tmp_path / "data" / LABELS[label][0]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(image.astype(np.uint8)[..., None], 3, axis=2)).save(folder / f"{i:03d}.png")
    metrics = run(save_tiny(tmp_path / "checkpoint", image_channels=3), tmp_path / "data")
    assert metrics["test_images"] == 6
    with Image.open(tmp_path / "checkpoint" / "grid.png") as picture:
        assert picture.mode == "RGB"


def test_data_of_other_classes_is_refused(run: Run, tmp_path: Path, checkpoint_path: Path) -> None:
    for name in ("dark", "grey", "pale"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(10):
            Image.new("L", (8, 8)).save(folder / f"{i}.png")
    with pytest.raises(ValueError, match=r"dark, grey, pale; the checkpoint was trained on dark, grey, light"):
        run(checkpoint_path, tmp_path / "data")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 2}, "at least the number of classes, 3, got 2"),
        ({"guidance_scale": float("nan")}, "between 1 and 20, got nan"),
        ({"sampler": "ddpm"}, "which has: euler"),
        ({"steps": 0}, "between 1 and 1000, got 0"),
        ({"labels": "even"}, "labels are balanced or random, got 'even'"),
        ({"reference": Path("r.npz")}, "--inception is missing: the file weights-inception-2015-12-05-6726825d.pth, from https"),
        ({"inception": Path("w.pth")}, "--reference is missing"),
        ({"inception": Path("w.pth"), "reference": Path("r.npz")}, "no file w.pth: Inception's weights are weights-inception"),
        ({"save_png": Path(__file__)}, "no empty folder"),
    ],
)
def test_settings_the_checkpoint_cannot_run_are_refused_before_any_work(
    run: Run, idx_data: Path, checkpoint_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(checkpoint_path, idx_data, cache=idx_data.parent / "none", **wrong)
    assert not (idx_data.parent / "none").exists()


def test_card_of_a_checkpoint_without_provenance_or_metrics_says_so(checkpoint_path: Path) -> None:
    card = model_card(read_config(checkpoint_path)[0], {})
    assert "Not evaluated yet" in card and "not recorded" in card and "grid.png" not in card
    assert '"class_label": "dark"' in card and "None" not in card


def test_card_tells_commands_minutes_hardware_and_every_measure_beside_its_floor(checkpoint_path: Path) -> None:
    stage = {"command": "dit train vae x --data /d", "minutes": 8.5, "hardware": "two cores", "steps": 1900}
    dit = {"command": "dit train dit x --data /d", "minutes": 25.1, "hardware": "one GPU", "steps": 4000, "parameters": 9_700_000}
    provenance = {"data": "IDX files /d: 9 training and 3 test images", "vae": stage, "dit": dit, "commit": "abc123"}
    metrics = {
        "class_consistency": 0.9412,
        "classifier_accuracy": 0.936,
        "frechet_distance": 1.71234,
        "frechet_distance_reconstructions": 1.1,
        "frechet_distance_train": 0.03,
        "test_images": 10000,
        "train_images": 10000,
    }
    card = model_card(replace(read_config(checkpoint_path)[0], provenance=provenance), metrics)
    for fact in (
        "x --data /d",
        "8.5",
        "25.1",
        "two cores",
        "one GPU",
        "1900",
        "9.7 M",
        "abc123",
        "94.1 %",
        "93.6 %",
        "1.712",
        "1.100",
        "0.030",
    ):
        assert fact in card
    assert "![one row per class](grid.png)" in card
    assert "dit train vae x --data /d\ndit train dit x --data /d" in card


def test_card_quotes_a_label_with_an_apostrophe_for_the_shell(checkpoint_path: Path) -> None:
    config = replace(read_config(checkpoint_path)[0], labels=(("cat's eye",), ("b",), ("c",)))
    assert """'{"class_label": "cat'"'"'s eye",""" in model_card(config, {})
