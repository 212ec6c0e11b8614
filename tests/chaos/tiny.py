"""The model that all the workers serve: random weights, steps of milliseconds."""

from pathlib import Path

import torch

from model.checkpoint import Checkpoint, CheckpointConfig, save
from model.config import DiTConfig, ObjectiveConfig, VAEConfig
from model.dit import DiT
from model.vae import VAE
from worker.protocol import GenerationRequest

MODEL = "tiny"
LABELS = (("cat",), ("dog",), ("ship",), ("truck",))


def save_tiny(registry: Path) -> str:
    """Write the checkpoint into a registry folder; its hash."""
    architecture = DiTConfig(
        input_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        depth=2,
        num_heads=2,
        num_classes=len(LABELS),
        learn_sigma=False,
        time_factor=1000.0,
    )
    vae_config = VAEConfig(
        image_size=16,
        image_channels=1,
        latent_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_attention=False,
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        dit, vae = DiT(architecture), VAE(vae_config)
        for parameter in dit.parameters():  # what starts at zero shall do something too
            parameter += 0.1 * torch.randn(parameter.shape)
    config = CheckpointConfig(
        architecture=architecture,
        objective=ObjectiveConfig("flow"),
        image_size=16,
        image_channels=1,
        labels=LABELS,
        default_steps=4,
        default_guidance_scale=2.0,
        default_sampler="euler",
        vae=vae_config,
        provenance={"data": "none: random weights for tests"},
    )
    return save(registry / MODEL, Checkpoint(config, dit.eval(), vae.eval()), card="# Tiny\n\nRandom weights for tests.\n")


def picture_request(class_label: int = 0, *, steps: int = 12, seed: int = 7, num_images: int = 1) -> GenerationRequest:
    """Guided pictures of one class."""
    return GenerationRequest(MODEL, (class_label,) * num_images, 2.0, (0.0, 1.0), steps, "euler", seed)
