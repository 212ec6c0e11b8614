"""Stage two: the DiT on cached latents. `dit train dit RECIPE --data DIR`; writes a checkpoint to OUT/checkpoint."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from model.checkpoint import DTYPES, Checkpoint, CheckpointConfig, save
from model.config import DiTConfig, ObjectiveConfig
from model.diffusion import GaussianDiffusion
from model.dit import DiT
from model.flow import RectifiedFlow
from model.samplers import build_table
from model.sampling import sample
from model.vae import VAE
from training.card import model_card
from training.config import Recipe
from training.data import Dataset, batch_indices, load_dataset, report_data
from training.latents import LatentCache, cached_latents
from training.loop import fit, grid, step_generator
from training.runlog import command, commit, hardware
from training.train_vae import load_vae

_SEED = 0
CHECKPOINT = "checkpoint"

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
Process = GaussianDiffusion | RectifiedFlow


def build_process(objective: ObjectiveConfig, device: torch.device) -> Process:
    return RectifiedFlow(objective) if objective.kind == "flow" else GaussianDiffusion(objective).to(device)


def _to(device: torch.device, value: Tensor) -> Tensor:
    """A copy to a GPU from pinned memory does not wait for the step before."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def dit_losses(network: Network, process: Process, x0: Tensor, y: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw time and noise for clean latents x0 (B, C, h, w) of classes y (B,); returns the means of the objective's losses."""
    noise = _to(x0.device, torch.randn(x0.shape, generator=generator))
    t = _to(x0.device, process.draw_times(len(x0), generator))
    xt = process.q_sample(x0, t, noise)
    losses = process.losses(network(xt, t, y).float(), x0, xt, t, noise)
    return {name: value.mean() for name, value in losses.items()}


def _check(recipe: Recipe) -> ObjectiveConfig:
    """Errors before the first step, not after the last."""
    objective = recipe.dit.objective_config()
    build_table(objective, recipe.defaults.sampler, recipe.defaults.steps, learn_sigma=recipe.dit.learn_sigma)
    if recipe.defaults.dtype not in DTYPES:
        raise ValueError(f"defaults.dtype must be one of {', '.join(DTYPES)}, got {recipe.defaults.dtype!r}")
    return objective


def _preview(checkpoint_of: Callable[[DiT], Checkpoint]) -> Callable[[nn.Module], Image.Image]:
    """One row of eight pictures per class (the first ten), always of the same seeds, so that progress is seen."""

    def preview(model: nn.Module) -> Image.Image:
        checkpoint = checkpoint_of(cast(DiT, model))
        defaults = checkpoint.config
        classes = [c for c in range(min(10, defaults.architecture.num_classes)) for _ in range(8)]
        images = sample(
            checkpoint,
            classes,
            steps=min(25, defaults.default_steps),
            guidance_scale=defaults.default_guidance_scale,
            sampler=defaults.default_sampler,
            seeds=list(range(len(classes))),
        )
        return grid(images.cpu(), columns=8)

    return preview


def train_dit(recipe: Recipe, data: Path, vae_folder: Path, out: Path, *, resume: bool = False, new_latents: bool = False) -> Path:
    """Train on the latents of the VAE in `vae_folder` and save the EMA as a checkpoint; returns its folder."""
    objective, optimiser = _check(recipe), recipe.dit.optimiser
    dataset = load_dataset(data, recipe.data)
    vae, vae_record = load_vae(vae_folder)
    if vae.config.image_size != recipe.data.image_size or vae.config.image_channels != recipe.data.image_channels:
        raise ValueError(f"the VAE in {vae_folder} was trained for other images than the recipe's {recipe.data.image_size} pixels")
    report_data(dataset, out)
    latents = cached_latents(vae, dataset.train, out, flips=recipe.data.horizontal_flip, anew=new_latents)
    architecture = recipe.dit.architecture(
        input_size=vae.config.latent_size, in_channels=vae.config.latent_channels, num_classes=len(dataset.class_names)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(_SEED)
    dit = DiT(architecture).to(device)
    loss_at = _loss_function(dit, recipe, build_process(objective, device), dataset, latents, device)
    vae = vae.to(device)

    def checkpoint_of(model: DiT, **provenance: Any) -> Checkpoint:
        return Checkpoint(_describe(recipe, dataset, architecture, objective, vae, provenance), model, vae)

    made_of = asdict(architecture) | asdict(objective)
    trained, seconds = fit(dit, loss_at, optimiser, out, preview=_preview(checkpoint_of), resume=resume, title="dit", made_of=made_of)
    trained_here = {
        "command": command().replace(" --resume", ""),  # a resumed run equals the one never stopped
        "minutes": round(seconds / 60, 1),
        "hardware": hardware(),
        "steps": optimiser.steps,
        "parameters": sum(p.numel() for p in trained.parameters()),
    }
    stage_one = {key: vae_record[key] for key in ("command", "minutes", "hardware", "steps")}
    checkpoint = checkpoint_of(cast(DiT, trained), data=dataset.described, vae=stage_one, dit=trained_here, commit=commit())
    target = out / CHECKPOINT
    save(target, checkpoint, dtype=DTYPES[recipe.defaults.dtype], card=model_card(checkpoint.config, {}), overwrite=True)
    return target


def _loss_function(
    dit: DiT, recipe: Recipe, process: Process, dataset: Dataset, latents: LatentCache, device: torch.device
) -> Callable[[int], dict[str, Tensor]]:
    batch_size, null_class = recipe.dit.optimiser.batch_size, dit.config.null_class

    def loss_at(step: int) -> dict[str, Tensor]:
        index = batch_indices(len(dataset.train), batch_size, step, _SEED)
        generator = step_generator(_SEED, step)
        view = torch.randint(latents.views, (batch_size,), generator=generator)
        x0 = _to(device, latents.sample(index, view, torch.randn(batch_size, *latents.shape, generator=generator)))
        dropped = torch.rand(batch_size, generator=generator) < recipe.dit.label_dropout
        y = _to(device, torch.where(dropped, null_class, dataset.train.labels[index]))
        with torch.autocast(device.type, torch.bfloat16):
            return dit_losses(dit, process, x0, y, generator)

    return loss_at


def _describe(
    recipe: Recipe, dataset: Dataset, architecture: DiTConfig, objective: ObjectiveConfig, vae: VAE, provenance: dict[str, Any]
) -> CheckpointConfig:
    return CheckpointConfig(
        architecture=architecture,
        objective=objective,
        vae=vae.config,
        image_size=recipe.data.image_size,
        image_channels=recipe.data.image_channels,
        labels=tuple((name,) for name in dataset.class_names),
        default_steps=recipe.defaults.steps,
        default_guidance_scale=recipe.defaults.guidance_scale,
        default_sampler=recipe.defaults.sampler,
        provenance=provenance,
    )
