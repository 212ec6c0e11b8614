"""Stage one on a tiny IDX folder: losses, latent statistics, and the whole of it in a few steps."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import VAEConfig
from model.vae import VAE
from training.config import Recipe
from training.data import Split, load_dataset, to_float
from training.train_vae import latent_statistics, load_vae, train_vae, vae_config, vae_losses


@pytest.fixture
def raw_vae(tiny_vae_config: Callable[..., VAEConfig]) -> VAE:
    torch.manual_seed(0)
    return VAE(tiny_vae_config(latent_mean=(), latent_std=())).eval()


@pytest.fixture
def split() -> Split:
    images = torch.randint(0, 256, (10, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split(images, torch.zeros(10, dtype=torch.int64))


def test_losses_are_absolute_error_and_kl_per_element(raw_vae: VAE, split: Split) -> None:
    images, noise = to_float(split.images), torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    losses = vae_losses(raw_vae, images, noise, kl_weight=0.5)
    posterior = raw_vae.autoencoder.encode(images).latent_dist
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0.0, 1.0))
    error = (raw_vae.autoencoder.decode(posterior.mean + posterior.std * noise).sample - images).abs()
    torch.testing.assert_close(losses["kl"], kl.mean())
    torch.testing.assert_close(losses["reconstruction"], error.mean())
    torch.testing.assert_close(losses["loss"], error.mean() + 0.5 * kl.mean())


@pytest.mark.parametrize("batch_size", [3, 10, 256])
def test_latent_statistics_are_those_of_posterior_samples(raw_vae: VAE, split: Split, batch_size: int) -> None:
    mean, std = latent_statistics(raw_vae, split, batch_size)
    with torch.no_grad():
        posterior = raw_vae.autoencoder.encode(to_float(split.images)).latent_dist
    centre, spread = posterior.mean.double(), posterior.std.double()
    assert mean == pytest.approx(centre.mean((0, 2, 3)).tolist(), abs=1e-6)
    # The law of total variance: between the posteriors and within them.
    expected = (centre.var((0, 2, 3), unbiased=False) + spread.square().mean((0, 2, 3))).sqrt()
    assert std == pytest.approx(expected.tolist(), rel=1e-5)


def test_normalised_latents_have_no_mean_and_unit_variance(raw_vae: VAE, split: Split, tiny_vae_config: Callable[..., VAEConfig]) -> None:
    mean, std = latent_statistics(raw_vae, split)
    normalised = VAE(tiny_vae_config(latent_mean=mean, latent_std=std))
    normalised.load_state_dict(raw_vae.state_dict())
    mean, std = latent_statistics(normalised.eval(), split)
    assert mean == pytest.approx([0] * 4, abs=1e-5) and std == pytest.approx([1] * 4, rel=1e-5)


def test_a_few_steps_make_a_vae_that_loads(
    tmp_path: Path, make_idx_folder: Callable[..., Path], tiny_recipe: Callable[..., Recipe]
) -> None:
    recipe, data = tiny_recipe(steps=6), make_idx_folder(tmp_path / "data", size=12)
    out = train_vae(recipe, data, tmp_path / "run")
    assert out == tmp_path / "run"
    assert sorted(p.name for p in out.iterdir()) == [
        "data.json",
        "data.png",
        "log.jsonl",
        "samples-000006.png",
        "state",
        "tensorboard",
        "vae.json",
        "vae.safetensors",
    ]
    vae, record = load_vae(out)
    assert record["steps"] == 6 and "40 training" in record["data"] and record["command"].startswith("dit")
    assert replace(vae.config, latent_mean=(), latent_std=()) == vae_config(recipe)
    mean, std = latent_statistics(vae, load_dataset(data, recipe.data).train)
    assert mean == pytest.approx([0] * 4, abs=1e-4) and std == pytest.approx([1] * 4, rel=1e-4)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"reconstruction", "kl", "loss"} <= set(log[1])


def test_training_learns_to_reconstruct(tmp_path: Path, make_idx_folder: Callable[..., Path], tiny_recipe: Callable[..., Recipe]) -> None:
    recipe, data = tiny_recipe(steps=60, learning_rate=1e-2, final_learning_rate=1e-3), make_idx_folder(tmp_path / "data")
    train_vae(recipe, data, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    errors = [line["reconstruction"] for line in lines if "reconstruction" in line]
    assert errors[-1] < 0.5 * errors[0]


def test_the_same_recipe_and_data_give_the_same_weights(
    tmp_path: Path, make_idx_folder: Callable[..., Path], tiny_recipe: Callable[..., Recipe]
) -> None:
    recipe, data = tiny_recipe(steps=3), make_idx_folder(tmp_path / "data")
    first, second = (train_vae(recipe, data, tmp_path / name) for name in ("a", "b"))
    assert (first / "vae.safetensors").read_bytes() == (second / "vae.safetensors").read_bytes()


def test_a_folder_without_a_vae_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no trained VAE \(vae\.json is missing\): run `dit train vae` first"):
        load_vae(tmp_path)
