"""Tiny models, checkpoints, data and recipes, made in milliseconds, for every test that needs a real one."""

import gzip
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import nn

from model.checkpoint import Checkpoint, CheckpointConfig, save
from model.config import DiTConfig, ObjectiveConfig, VAEConfig
from model.dit import DiT
from model.vae import VAE
from training.config import DataConfig, DiTRecipe, OptimiserConfig, Recipe, ServingDefaults, VAERecipe

# The same examples everywhere and every time, however slow the machine: a gate that fails by chance is no gate.
settings.register_profile("dit", derandomize=True, deadline=None, database=None)
settings.load_profile("dit")

# A shell starts what runs in its background with SIGINT ignored, which children inherit; and what Ctrl-C does is tested with children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LABELS = (("cat", "house cat"), ("dog",), ("ship",), ("truck", "lorry"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a CUDA device is left out where there is none. It is not skipped: a skip says that something could be installed."""
    left_out = [] if torch.cuda.is_available() else [item for item in items if item.get_closest_marker("cuda")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def tiny_dit_config() -> Callable[..., DiTConfig]:
    """`tiny_dit_config(objective="flow", **changes)`: width 32, depth 2, 8×8 latents of 4 channels, 4 classes."""

    def make(objective: str = "flow", **changes: Any) -> DiTConfig:
        config = DiTConfig(
            input_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            depth=2,
            num_heads=2,
            num_classes=len(LABELS),
            learn_sigma=objective == "diffusion",
            time_factor=1.0 if objective == "diffusion" else 1000.0,
        )
        return replace(config, **changes)

    return make


@pytest.fixture(scope="session")
def tiny_vae_config() -> Callable[..., VAEConfig]:
    """`tiny_vae_config(**changes)`: 16×16 grey images, factor 2, 4 latent channels with statistics of their own."""

    def make(**changes: Any) -> VAEConfig:
        config = VAEConfig(
            image_size=16,
            image_channels=1,
            latent_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_attention=False,
            latent_mean=(0.1, -0.2, 0.3, 0.0),
            latent_std=(1.7, 0.9, 1.3, 2.1),
        )
        return replace(config, **changes)

    return make


def randomise(module: nn.Module, generator: torch.Generator, std: float = 0.1) -> None:
    """Noise on every weight, so that what starts at zero (gates, the last linear) does something too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="session")
def build_checkpoint(tiny_dit_config: Callable[..., DiTConfig], tiny_vae_config: Callable[..., VAEConfig]) -> Callable[..., Checkpoint]:
    """`build_checkpoint(objective="flow", image_size=16, image_channels=1, seed=0, **dit)`: the same random weights every time."""

    def make(objective: str = "flow", image_size: int = 16, image_channels: int = 1, seed: int = 0, **dit_changes: Any) -> Checkpoint:
        vae_config = tiny_vae_config(image_size=image_size, image_channels=image_channels)
        architecture = tiny_dit_config(objective, input_size=vae_config.latent_size, **dit_changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            dit, vae = DiT(architecture), VAE(vae_config)
        generator = torch.Generator().manual_seed(seed)
        randomise(dit, generator)
        randomise(vae, generator, std=0.02)
        config = CheckpointConfig(
            architecture=architecture,
            objective=ObjectiveConfig(objective),
            image_size=image_size,
            image_channels=image_channels,
            labels=LABELS,
            default_steps=4,
            default_guidance_scale=2.0,
            default_sampler="euler" if objective == "flow" else "ddim",
            vae=vae_config,
            provenance={"data": "none: random weights for tests"},
        )
        return Checkpoint(config, dit.eval().requires_grad_(False), vae.eval().requires_grad_(False))

    return make


@pytest.fixture(scope="session")
def make_checkpoint(build_checkpoint: Callable[..., Checkpoint]) -> Callable[..., Path]:
    """`make_checkpoint(folder, objective="flow", name="tiny", **build)` writes folder/name and returns it; folder serves as a registry."""

    def make(folder: Path, objective: str = "flow", name: str = "tiny", **build: Any) -> Path:
        save(folder / name, build_checkpoint(objective, **build), card="# Tiny\n\nRandom weights for tests.\n")
        return folder / name

    return make


def write_idx(path: Path, array: np.ndarray) -> None:
    """One IDX file of unsigned bytes, gzipped if the name ends in .gz."""
    raw = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


@pytest.fixture
def make_idx_folder() -> Callable[..., Path]:
    """`make_idx_folder(folder, train=40, test=16, size=16, classes=4, suffix=".gz")`: pictures whose brightness tells their class."""

    def make(folder: Path, train: int = 40, test: int = 16, size: int = 16, classes: int = 4, suffix: str = ".gz") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        for part, count in (("train", train), ("t10k", test)):
            labels = np.arange(count) % classes
            images = labels[:, None, None] * (200 // classes) + random.integers(0, 50, (count, size, size))
            write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
            write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
        return folder

    return make


@pytest.fixture
def tiny_recipe() -> Callable[..., Recipe]:
    """`tiny_recipe(objective="flow", steps=4, **optimiser)`: both stages in a second, for the pictures of `make_idx_folder`."""

    def make(objective: str = "flow", steps: int = 4, **optimiser: Any) -> Recipe:
        stage = OptimiserConfig(
            **{
                "steps": steps,
                "batch_size": 8,
                "learning_rate": 1e-3,
                "final_learning_rate": 1e-4,
                "warmup_steps": 1,
                "sample_every": 100,
                "save_every": 100,
                **optimiser,
            }
        )
        return Recipe(
            name="tiny",
            data=DataConfig(image_size=16, image_channels=1, labels=tuple(group[0] for group in LABELS)),
            vae=VAERecipe(
                latent_channels=4,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                mid_block_attention=False,
                kl_weight=1e-3,
                optimiser=stage,
            ),
            dit=DiTRecipe(
                patch_size=2,
                hidden_size=32,
                depth=2,
                num_heads=2,
                objective=objective,
                learn_sigma=objective == "diffusion",
                optimiser=stage,
            ),
            defaults=ServingDefaults(steps=4, guidance_scale=2.0, sampler="euler" if objective == "flow" else "ddim"),
        )

    return make
