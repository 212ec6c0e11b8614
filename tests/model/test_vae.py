"""Images ↔ normalised latents."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.config import VAEConfig
from model.vae import VAE


@pytest.fixture
def vae(tiny_vae_config: Callable[..., VAEConfig]) -> VAE:
    torch.manual_seed(0)
    return VAE(tiny_vae_config()).eval().requires_grad_(False)


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_shapes_follow_the_factor(vae: VAE, tiny_vae_config: Callable[..., VAEConfig]) -> None:
    assert vae.encode(images()).shape == (3, 4, 8, 8)
    assert vae.decode(torch.zeros(3, 4, 8, 8)).shape == (3, 1, 16, 16)
    colour = VAE(tiny_vae_config(image_size=32, image_channels=3, block_out_channels=(8, 8, 16))).eval()
    assert colour.encode(torch.zeros(2, 3, 32, 32)).shape == (2, 4, 8, 8)
    assert colour.decode(torch.zeros(2, 4, 8, 8)).shape == (2, 3, 32, 32)


def with_statistics(vae: VAE, mean: tuple[float, ...], std: tuple[float, ...]) -> VAE:
    other = VAE(replace(vae.config, latent_mean=mean, latent_std=std))
    other.load_state_dict(vae.state_dict())
    return other.eval().requires_grad_(False)


def test_statistics_normalise_latents_and_decoding_undoes_it(vae: VAE) -> None:
    raw = with_statistics(vae, (), ())
    mean, std = (t.view(1, 4, 1, 1) for t in (torch.tensor(vae.config.latent_mean), torch.tensor(vae.config.latent_std)))
    latents = raw.encode(images())
    torch.testing.assert_close(vae.encode(images()), (latents - mean) / std)
    torch.testing.assert_close(vae.decode((latents - mean) / std), raw.decode(latents))


def test_noise_samples_the_posterior_in_normalised_units(vae: VAE) -> None:
    raw = with_statistics(vae, (), ())
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    posterior = raw.autoencoder.encode(images()).latent_dist
    sampled = posterior.mean + posterior.std * noise
    mean, std = (t.view(1, 4, 1, 1) for t in (torch.tensor(vae.config.latent_mean), torch.tensor(vae.config.latent_std)))
    torch.testing.assert_close(vae.encode(images(), noise), (sampled - mean) / std)
    assert not torch.equal(vae.encode(images(), noise), vae.encode(images()))


def test_statistics_are_configuration_and_not_weights(vae: VAE) -> None:
    assert not [name for name in vae.state_dict() if "latent" in name]


def test_half_precision_weights_still_answer_in_float32(vae: VAE) -> None:
    full = vae.encode(images())
    vae.cast(torch.bfloat16)
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    assert vae.latent_std.flatten().tolist() == torch.tensor(vae.config.latent_std).tolist()
    latents = vae.encode(images())
    assert latents.dtype == vae.decode(latents).dtype == torch.float32
    assert float((latents - full).norm() / full.norm()) < 0.05


def test_at_least_two_images_decode_alike_in_any_batch(vae: VAE) -> None:
    """DESIGN.md: the decoder gives other bits at 1 image and at two or more, so the worker never decodes one."""
    latents = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    together = vae.decode(latents)
    for part in (slice(0, 2), slice(1, 4), slice(2, 7)):
        assert torch.equal(vae.decode(latents[part]), together[part])


def test_pictures_of_512_pixels_are_decoded_in_tiles_that_meet_without_a_seam() -> None:
    shape = VAEConfig(
        image_size=512, image_channels=1, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, mid_block_attention=False
    )
    torch.manual_seed(0)
    vae = VAE(shape).eval()
    latents = torch.randn(1, 4, 64, 64)
    sizes: list[int] = []
    vae.autoencoder.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-1]))
    with torch.inference_mode():
        tiled = vae.decode(latents)
        whole = vae.autoencoder.decode(latents, return_dict=False)[0]
    assert tiled.shape == whole.shape == (1, 1, 512, 512)
    assert max(sizes[:-1]) == 48, "no tile is as large as the picture"
    steps = tiled.diff(dim=-1).abs().mean(dim=(0, 1, 2))  # between neighbouring columns; tiles begin at 288
    assert steps[280:300].max() < 2 * steps.median(), "a seam would be a larger step than any other"
