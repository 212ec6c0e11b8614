"""Configurations refuse what cannot work, and say the numbers."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from model.config import ADAPTIVE, BLOCKS, PRESETS, DiTConfig, ObjectiveConfig, VAEConfig, preset, preset_heads, stored

# FACTS.md §1: depth, width, heads.
PAPER_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"input_size": 9}, "input_size 9 is not a multiple of patch_size 2"),
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"hidden_size": 30, "num_heads": 3}, "multiple of 4 .*got 30"),
        ({"frequency_shift": 2}, "frequency_shift must be 0 .* got 2"),
        ({"time_factor": 0.0}, "must be positive"),
        ({"mlp_ratio": 0.0}, "must be positive"),
        ({"norm_eps": 0.0}, "norm_eps and mlp_norm_eps must be positive"),
        ({"mlp_norm_eps": -1e-6}, "norm_eps and mlp_norm_eps must be positive"),
        ({"block": "adaLN-Zero"}, "block must be one of adaln-zero, adaln, cross-attention, in-context, got 'adaLN-Zero'"),
        ({"rope": True, "num_heads": 16}, "2 a head is no multiple of 4"),
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
        ({"kind": "diffusion", "beta_end": float("nan")}, "beta_end must be a finite number, got nan"),
        ({"kind": "flow", "logit_normal_std": 0.0}, "logit_normal_std must be positive"),
        ({"kind": "diffusion", "prediction": "x0"}, "prediction must be 'noise' or 'v', got 'x0'"),
        ({"kind": "diffusion", "min_snr_gamma": -1.0}, "min_snr_gamma must be positive, or 0 for none, got -1.0"),
        ({"kind": "flow", "flow_time": "cosine"}, "flow_time must be 'logit-normal' or 'uniform', got 'cosine'"),
        ({"kind": "flow", "prediction": "v"}, "prediction belongs to the objective 'diffusion', not to 'flow'"),
        ({"kind": "flow", "min_snr_gamma": 5.0}, "min_snr_gamma belongs to the objective 'diffusion', not to 'flow'"),
        ({"kind": "diffusion", "flow_time": "uniform"}, "flow_time belongs to the objective 'flow', not to 'diffusion'"),
    ],
)
def test_an_impossible_objective_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**values)


def test_sizes_follow_from_the_configuration(tiny_dit_config: Callable[..., DiTConfig], tiny_vae_config: Callable[..., VAEConfig]) -> None:
    flow, diffusion, vae = tiny_dit_config("flow"), tiny_dit_config("diffusion"), tiny_vae_config()
    assert (flow.num_tokens, flow.out_channels, diffusion.out_channels, flow.null_class) == (16, 4, 8, 4)
    assert (vae.factor, vae.latent_size) == (2, 8)


# --- presets -----------------------------------------------------------------------------------------------------------


def test_the_presets_are_the_papers_twelve() -> None:
    assert list(PRESETS) == [f"DiT-{size}/{patch}" for size in PAPER_SIZES for patch in (8, 4, 2)]


@pytest.mark.parametrize("size", PAPER_SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_a_preset_is_the_papers_model_in_every_field(size: str, patch: int) -> None:
    depth, width, heads = PAPER_SIZES[size]
    shape = {"patch_size": patch, "hidden_size": width, "depth": depth, "num_heads": heads}
    rest = {"input_size": 32, "in_channels": 4, "num_classes": 1000, "mlp_ratio": 4.0, "learn_sigma": True}
    conventions = {"norm_eps": 1e-6, "time_factor": 1.0, "frequency_shift": 0}
    assert stored(preset(f"DiT-{size}/{patch}")) == {**shape, **rest, **conventions}


def test_a_preset_at_512_has_latents_of_64_and_1024_tokens_at_patch_2() -> None:
    config = preset("DiT-XL/2", image_size=512)
    assert (config.input_size, config.num_tokens) == (64, 1024)
    assert config == replace(preset("DiT-XL/2"), input_size=64)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_preset_takes_any_block_and_number_of_classes(block: str) -> None:
    config = preset("DiT-B/4", block=block, num_classes=7)
    assert (config.block, config.null_class) == (block, 7)
    assert replace(config, block="adaln-zero", num_classes=1000) == preset("DiT-B/4")


@pytest.mark.parametrize("name", ["DiT-XXL/2", "DiT-S/3", "dit-xl/2", "XL/2", "DiT-XL", "", "DiT-S/2/2"])
def test_an_unknown_preset_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"no preset {name!r}; there is: {', '.join(PRESETS)}")):
        preset(name)


@pytest.mark.parametrize("image_size", [0, -8, 4, 100, 257])
def test_a_preset_of_pictures_that_no_latent_fits_is_refused(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size must be a multiple of 8 up to 2048, got {image_size}"):
        preset("DiT-S/2", image_size=image_size)


def test_depth_and_width_of_a_preset_tell_its_heads() -> None:
    assert {size: preset_heads(depth, width) for size, (depth, width, _) in PAPER_SIZES.items()} == {"S": 6, "B": 12, "L": 16, "XL": 16}
    assert preset_heads(12, 1024) is None and preset_heads(28, 384) is None and preset_heads(8, 256) is None


# --- what is stored ----------------------------------------------------------------------------------------------------


def test_the_adaptive_blocks_are_the_two_with_a_modulation() -> None:
    assert set(ADAPTIVE) == {"adaln-zero", "adaln"} and set(ADAPTIVE) < set(BLOCKS) and len(BLOCKS) == 4


def test_a_field_that_was_added_is_stored_only_where_it_says_something(tiny_dit_config: Callable[..., DiTConfig]) -> None:
    added = {"mlp_norm_eps": 1e-5, "block": "adaln", "qk_norm": True, "rms_norm": True, "swiglu": True, "rope": True}
    plain = stored(tiny_dit_config())
    assert plain.keys().isdisjoint(added)
    for name, value in added.items():
        assert stored(tiny_dit_config(**{name: value})) == {**plain, name: value}
    assert stored(tiny_dit_config(norm_eps=1e-6)) == plain, "a first field is stored at its default too"


def test_an_objective_stores_its_added_fields_only_where_they_say_something() -> None:
    plain = stored(ObjectiveConfig("diffusion"))
    assert set(plain) == {"kind", "num_timesteps", "beta_start", "beta_end", "logit_normal_mean", "logit_normal_std"}
    assert stored(ObjectiveConfig("diffusion", prediction="v")) == {**plain, "prediction": "v"}
    assert stored(ObjectiveConfig("flow", flow_time="uniform")) == {**plain, "kind": "flow", "flow_time": "uniform"}


@pytest.mark.parametrize("name", ["learn_sigma", "qk_norm", "rms_norm", "swiglu", "rope"])
def test_a_flag_is_true_or_false(name: str, tiny_dit_config: Callable[..., DiTConfig]) -> None:
    """`"no"` is true to Python, and 1 would give the same network another hash."""
    for wrong in ("no", 1, None):
        with pytest.raises(ValueError, match=f"{name} must be true or false"):
            tiny_dit_config("flow", **{name: wrong})


def test_a_presets_pictures_have_a_largest_size() -> None:
    for size in (1_000_000, 2056, 100, 0):
        with pytest.raises(ValueError, match=f"multiple of 8 up to 2048, got {size}"):
            preset("DiT-S/8", image_size=size)
