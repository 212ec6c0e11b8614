"""Images ↔ normalised latents, on diffusers' AutoencoderKL. The only place that knows a latent's scale."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from model.config import VAEConfig

TILED_FROM = 512  # pixels; pictures of this size are decoded in tiles, which bounds the memory of a batch
_TILE = 3 / 4  # of a side; neighbours share a quarter of a tile, over which they are blended


def build_autoencoder(config: VAEConfig) -> AutoencoderKL:
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        latent_channels=config.latent_channels,
        block_out_channels=list(config.block_out_channels),
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_attention,
        sample_size=config.image_size,
        scaling_factor=1.0,  # the statistics below scale; two places would scale twice
    )


class VAE(nn.Module):
    """`encode`: images (B, C, H, W) in [−1, 1] → latents of zero mean and unit variance; `decode`: back."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder: Any = build_autoencoder(config)
        self.autoencoder.tile_sample_min_size = int(_TILE * config.image_size)
        self.autoencoder.tile_latent_min_size = int(_TILE * config.latent_size)
        channels = config.latent_channels
        for name, values, default in (("latent_mean", config.latent_mean, 0.0), ("latent_std", config.latent_std, 1.0)):
            self.register_buffer(name, torch.tensor(values or (default,) * channels, device="cpu").view(1, -1, 1, 1), persistent=False)

    def cast(self, dtype: torch.dtype) -> "VAE":
        """Weights to `dtype`, in place; the latent statistics stay in float32."""
        for module in self.autoencoder.children():  # by parts: diffusers warns of a cast of the whole
            module.to(dtype)
        return self

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior over normalised latents, float32, each (B, C, h, w)."""
        posterior = self.autoencoder.encode(images.to(self.autoencoder.dtype)).latent_dist
        mean = (posterior.mean.float() - self.latent_mean.float()) / self.latent_std.float()
        return mean, posterior.std.float() / self.latent_std.float()

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The posterior's mean, or with standard normal `noise` a sample of the posterior, as the paper trains on."""
        mean, std = self.moments(images)
        return mean if noise is None else mean + std * noise

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) → images in about [−1, 1], float32."""
        raw = (latents.float() * self.latent_std.float() + self.latent_mean.float()).to(self.autoencoder.dtype)
        decode = self.autoencoder.tiled_decode if self.config.image_size >= TILED_FROM else self.autoencoder.decode
        return decode(raw, return_dict=False)[0].float()
