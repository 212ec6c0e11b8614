"""Stage two end to end on tiny data: latents are cached, a run resumes exactly, and what comes out is a checkpoint that samples."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint as checkpoints
from model.config import ObjectiveConfig, VAEConfig
from model.sampling import sample
from model.vae import VAE
from training import train_dit as stage_two
from training.config import Recipe
from training.data import Split
from training.latents import CACHE, cached_latents
from training.loop import Interrupted
from training.train_dit import dit_losses, train_dit
from training.train_vae import train_vae

RecipeMaker = Callable[..., Recipe]


@pytest.fixture
def idx_folder(make_idx_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return make_idx_folder(tmp_path / "data")


@pytest.fixture
def trained_vae(tiny_recipe: RecipeMaker, idx_folder: Path, tmp_path: Path) -> Path:
    return train_vae(tiny_recipe(), idx_folder, tmp_path / "vae")


def test_latents_are_encoded_once_and_again_only_for_another_vae_or_other_images(
    tiny_vae_config: Callable[..., VAEConfig], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vae = VAE(tiny_vae_config()).eval()
    split = Split(torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8), torch.zeros(6, dtype=torch.int64))
    first = cached_latents(vae, split, tmp_path, flips=True, batch_size=4)
    written = (tmp_path / CACHE).stat().st_mtime_ns
    again = cached_latents(vae, split, tmp_path, flips=True)
    assert (tmp_path / CACHE).stat().st_mtime_ns == written
    assert torch.equal(first.mean, again.mean) and torch.equal(first.std, again.std)
    assert first.mean.shape == (2, 6, 4, 8, 8)
    expected, _ = vae.moments(split.images.float() / 127.5 - 1)
    assert torch.allclose(first.mean[0], expected, atol=1e-5)
    with torch.no_grad():
        next(vae.parameters()).add_(1.0)
    changed = cached_latents(vae, split, tmp_path, flips=True)
    assert not torch.equal(first.mean, changed.mean)


@pytest.mark.parametrize("objective", ["flow", "diffusion"])
def test_a_run_ends_in_a_checkpoint_that_loads_and_samples(
    tiny_recipe: RecipeMaker, idx_folder: Path, trained_vae: Path, tmp_path: Path, objective: str
) -> None:
    recipe = tiny_recipe(objective)
    sampler = recipe.defaults.sampler
    folder = train_dit(recipe, idx_folder, trained_vae, tmp_path / "dit")
    loaded = checkpoints.load(folder)
    assert loaded.config.provenance["dit"]["steps"] == recipe.dit.optimiser.steps
    assert loaded.config.provenance["vae"]["steps"] == recipe.vae.optimiser.steps
    images = sample(loaded, [0, None], steps=3, guidance_scale=2.0, sampler=sampler, seeds=[1, 2])
    assert images.shape == (2, recipe.data.image_size, recipe.data.image_size, recipe.data.image_channels)
    assert (tmp_path / "dit" / f"samples-{recipe.dit.optimiser.steps:06d}.png").is_file()


def test_an_interrupted_run_resumes_to_the_same_weights(
    tiny_recipe: RecipeMaker, idx_folder: Path, trained_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    straight = checkpoints.load(train_dit(recipe, idx_folder, trained_vae, tmp_path / "straight"))
    calls = 0
    real = stage_two.dit_losses

    def interrupting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(stage_two, "dit_losses", interrupting)
    with pytest.raises(Interrupted, match="go on with --resume"):
        train_dit(recipe, idx_folder, trained_vae, tmp_path / "stopped")
    resumed = checkpoints.load(train_dit(recipe, idx_folder, trained_vae, tmp_path / "stopped", resume=True))
    assert resumed.hash == straight.hash  # the same weights to the last bit


def test_a_network_that_knows_the_velocity_has_no_loss() -> None:
    x0 = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def exact(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - x0) / t.view(-1, 1, 1, 1)  # x_t = (1−t)·x₀ + t·ε, so ε − x₀ = (x_t − x₀)/t

    losses = dit_losses(exact, ObjectiveConfig("flow"), x0, torch.zeros(8, dtype=torch.int64), torch.Generator().manual_seed(1))
    assert losses["loss"] < 1e-9


def test_a_recipe_that_cannot_work_is_refused_before_the_first_step(
    tiny_recipe: RecipeMaker, idx_folder: Path, trained_vae: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    for wrong, message in (
        (replace(recipe, dit=replace(recipe.dit, learn_sigma=not recipe.dit.learn_sigma)), "learn_sigma"),
        (replace(recipe, defaults=replace(recipe.defaults, sampler="dpm")), "dpm"),
        (replace(recipe, defaults=replace(recipe.defaults, dtype="int8")), "int8"),
    ):
        with pytest.raises(ValueError, match=message):
            train_dit(wrong, idx_folder, trained_vae, tmp_path / "never")
        assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="dit train vae"):
        train_dit(recipe, idx_folder, tmp_path / "no-vae", tmp_path / "never")
