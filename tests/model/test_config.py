"""Configurations refuse what cannot work, and say the numbers."""

from collections.abc import Callable
from typing import Any

import pytest

from model.config import DiTConfig, ObjectiveConfig, VAEConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"input_size": 9}, "input_size 9 is not a multiple of patch_size 2"),
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"hidden_size": 30, "num_heads": 3}, "multiple of 4 .*got 30"),
        ({"frequency_shift": 2}, "frequency_shift must be 0 .* got 2"),
        ({"time_factor": 0.0}, "must be positive"),
    ],
)
def test_an_impossible_dit_is_refused(tiny_dit_config: Callable[..., DiTConfig], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_dit_config("flow", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_channels": 2}, "image_channels must be 1 .* got 2"),
        ({"image_size": 17}, "image_size 17 is not a multiple of the VAE's factor 2"),
        ({"norm_num_groups": 3}, "block width 8 is not a multiple of norm_num_groups 3"),
        ({"latent_mean": (0.0,)}, "latent_mean has 1 values for 4 latent channels"),
        ({"latent_std": (1.0, 1.0, 0.0, 1.0)}, "latent_std must be positive"),
        ({"block_out_channels": ()}, "block_out_channels"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"latent_channels": 0, "latent_mean": (), "latent_std": ()}, "latent_channels"),
    ],
)
def test_an_impossible_vae_is_refused(tiny_vae_config: Callable[..., VAEConfig], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vae_config(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "gan"}, "'diffusion' or 'flow', got 'gan'"),
        ({"kind": "diffusion", "num_timesteps": 0}, "num_timesteps must be at least"),
        ({"kind": "diffusion", "num_timesteps": 1}, "num_timesteps must be at least 2"),
        ({"kind": "diffusion", "beta_start": 0.5, "beta_end": 0.1}, "got 0.5, 0.1"),
        ({"kind": "diffusion", "beta_end": float("nan")}, "betas"),
        ({"kind": "flow", "logit_normal_std": 0.0}, "logit_normal_std must be positive"),
    ],
)
def test_an_impossible_objective_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**values)


def test_sizes_follow_from_the_configuration(tiny_dit_config: Callable[..., DiTConfig], tiny_vae_config: Callable[..., VAEConfig]) -> None:
    flow, diffusion, vae = tiny_dit_config("flow"), tiny_dit_config("diffusion"), tiny_vae_config()
    assert (flow.num_tokens, flow.out_channels, diffusion.out_channels, flow.null_class) == (16, 4, 8, 4)
    assert (vae.factor, vae.latent_size) == (2, 8)
