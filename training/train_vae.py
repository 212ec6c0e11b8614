"""Stage one: the autoencoder. `dit train vae RECIPE --data DIR`.

Loss: mean absolute error of the pixels + kl_weight · mean KL of the posterior to N(0, 1), both per element.
Afterwards the latents' mean and standard deviation are measured over the training set and kept with the weights.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.checkpoint import from_json
from model.config import VAEConfig
from model.sampling import to_pixels
from model.vae import VAE
from training.batches import Batch
from training.config import Execution, OptimiserConfig, Recipe
from training.data import Dataset, Split, batch_indices, load_dataset, report_data, to_float
from training.loop import fit, grid, require_ready
from training.randomness import SEED, Draw, normal, sample_numbers, uniform
from training.runlog import command, hardware
from training.stage import Losses, Player, Stage
from training.world import joined

VAE_WEIGHTS, VAE_RECORD = "vae.safetensors", "vae.json"


def vae_config(recipe: Recipe) -> VAEConfig:
    return VAEConfig(
        image_size=recipe.data.image_size,
        image_channels=recipe.data.image_channels,
        latent_channels=recipe.vae.latent_channels,
        block_out_channels=recipe.vae.block_out_channels,
        layers_per_block=recipe.vae.layers_per_block,
        norm_num_groups=recipe.vae.norm_num_groups,
        mid_block_attention=recipe.vae.mid_block_attention,
    )


def vae_losses(vae: VAE, images: Tensor, noise: Tensor, kl_weight: float) -> dict[str, Tensor]:
    """Reconstruction and KL of a batch in [−1, 1]; `noise` (B, C, h, w) samples the posterior."""
    posterior = vae.autoencoder.encode(images).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    decoded = vae.autoencoder.decode(mean + torch.exp(logvar / 2) * noise, return_dict=False)[0].float()
    reconstruction = (decoded - images).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return {"reconstruction": reconstruction, "kl": kl, "loss": reconstruction + kl_weight * kl}


@torch.inference_mode()
def latent_statistics(vae: VAE, split: Split, batch_size: int = 256) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of posterior samples over a split, in float64."""
    total = torch.zeros(2, vae.config.latent_channels, dtype=torch.float64)
    for images in split.batches(batch_size):
        mean, std = vae.moments(to_float(images))
        # E[z] = mean; E[z²] = mean² + std², without drawing samples.
        total += torch.stack([mean.double().mean((2, 3)).sum(0), (mean.double() ** 2 + std.double() ** 2).mean((2, 3)).sum(0)])
    first, second = total / len(split)
    return tuple(first.tolist()), tuple((second - first**2).sqrt().tolist())


def train_vae(recipe: Recipe, data: Path, out: Path, *, resume: bool = False, execution: Execution = Execution()) -> Path:
    """Train, measure the latents, write `vae.safetensors` and `vae.json` to `out`; returns `out`."""
    if execution.shard:
        raise ValueError("an autoencoder is not spread over processes: it fits on each")
    config, optimiser = vae_config(recipe), recipe.vae.optimiser
    with joined() as world:
        require_ready(optimiser, out, world=world, execution=execution, resume=resume)
        dataset = load_dataset(data, recipe.data)
        if world.first:
            report_data(dataset, out)
        torch.manual_seed(SEED)
        vae = VAE(config).to(world.device)
        vae.autoencoder.to(memory_format=torch.channels_last)
        if execution.activation_checkpointing:
            vae.autoencoder.enable_gradient_checkpointing()
        stage = Stage(
            title="vae",
            players={"vae": Player(vae, optimiser)},
            batch_at=_batches(dataset.train, optimiser.batch_size),
            losses=_losses(vae, recipe),
            preview=_preview(dataset.test, world.device),
            made_of=asdict(config),
        )
        trained, seconds = fit(stage, out, world=world, execution=execution, resume=resume)
        if world.first:
            _save(cast(VAE, trained), dataset, optimiser, seconds, out)
        world.meet()  # a process that returns finds the files
        return out


def _batches(split: Split, batch_size: int) -> Callable[[int, slice], Batch]:
    """Images, uint8, and sample numbers."""

    def batch_at(step: int, rows: slice) -> Batch:
        index = batch_indices(len(split), batch_size, step, SEED)[rows]
        return {"image": split.read(index), "number": sample_numbers(step, batch_size, rows)}

    return batch_at


def _losses(vae: VAE, recipe: Recipe) -> Losses:
    config = vae.config
    latent_shape = (config.latent_channels, config.latent_size, config.latent_size)

    def losses(batch: Batch) -> dict[str, Tensor]:
        """Mirror half of the images, and sample the posterior, by the samples' numbers."""
        images, numbers = to_float(batch["image"]), batch["number"]
        if recipe.data.horizontal_flip:
            mirrored = (uniform(numbers, Draw.VIEW) < 0.5)[:, None, None, None]
            images = torch.where(mirrored, images.flip(3), images)
        noise = normal(numbers, Draw.POSTERIOR, latent_shape)
        return vae_losses(vae, images.contiguous(memory_format=torch.channels_last), noise, recipe.vae.kl_weight)

    return losses


def _preview(split: Split, device: torch.device) -> Callable[[nn.Module], Image.Image]:
    shown = to_float(split.read(torch.arange(min(16, len(split)))))

    @torch.inference_mode()
    def preview(model: nn.Module) -> Image.Image:
        assert isinstance(model, VAE)
        decoded = model.decode(model.encode(shown.to(device))).cpu()
        return grid(to_pixels(torch.cat([shown, decoded])), columns=8)

    return preview


def _save(trained: VAE, dataset: Dataset, optimiser: OptimiserConfig, seconds: float, out: Path) -> None:
    trained = trained.to("cpu").float()
    mean, std = latent_statistics(trained, dataset.train)
    state = {name: value.contiguous() for name, value in trained.state_dict().items()}
    save_file(state, out / VAE_WEIGHTS)
    record: dict[str, Any] = {
        "config": asdict(replace(trained.config, latent_mean=mean, latent_std=std)),
        "command": command().replace(" --resume", ""),  # a resumed run equals the one never stopped
        "minutes": round(seconds / 60, 1),
        "hardware": hardware(),
        "steps": optimiser.steps,
        "data": dataset.described,
    }
    (out / VAE_RECORD).write_text(json.dumps(record, indent=2) + "\n")


def load_vae(folder: Path) -> tuple[VAE, dict[str, Any]]:
    """The trained autoencoder in float32 and its record; ValueError if the folder has none."""
    if not (folder / VAE_RECORD).is_file():
        raise ValueError(f"{folder} has no trained VAE ({VAE_RECORD} is missing): run `dit train vae` first, or name one with --vae")
    record = json.loads((folder / VAE_RECORD).read_text())
    vae = VAE(from_json(VAEConfig, record["config"]))
    vae.load_state_dict(load_file(folder / VAE_WEIGHTS))
    return vae.eval().requires_grad_(False), record
