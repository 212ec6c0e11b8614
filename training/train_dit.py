"""Stage two: the DiT on cached latents. `dit train dit RECIPE --data DIR`; writes a checkpoint to OUT/checkpoint."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from model.blocks import Modulation
from model.checkpoint import DTYPES, Checkpoint, CheckpointConfig, save
from model.config import DiTConfig, ObjectiveConfig
from model.diffusion import GaussianDiffusion
from model.dit import DiT
from model.flow import RectifiedFlow
from model.samplers import build_table
from model.sampling import sample
from model.vae import VAE
from training.batches import Batch
from training.card import model_card
from training.config import Execution, OptimiserConfig, Recipe
from training.data import Dataset, Split, batch_indices, load_dataset, report_data
from training.latents import LatentCache, cached_latents
from training.loop import fit, grid, require_ready
from training.randomness import SEED, Draw, normal, sample_numbers, uniform
from training.runlog import command, commit, hardware
from training.stage import Losses, Player, Stage
from training.train_vae import load_vae
from training.world import joined

CHECKPOINT = "checkpoint"

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
Process = GaussianDiffusion | RectifiedFlow


def build_process(objective: ObjectiveConfig, device: torch.device) -> Process:
    return RectifiedFlow(objective) if objective.kind == "flow" else GaussianDiffusion(objective).to(device)


def dit_losses(network: Network, process: Process, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Means of the objective's losses for clean latents x0 (B, C, h, w) of classes y (B,) at times t (B,)."""
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


def train_dit(
    recipe: Recipe,
    data: Path,
    vae_folder: Path,
    out: Path,
    *,
    resume: bool = False,
    new_latents: bool = False,
    execution: Execution = Execution(),
    publish: float | None = None,
) -> Path:
    """Train on the latents of the VAE in `vae_folder` and save an EMA as a checkpoint, the first or that of decay `publish`.

    Returns the checkpoint's folder.
    """
    objective, optimiser = _check(recipe), recipe.dit.optimiser
    with joined() as world:
        require_ready(optimiser, out, world=world, execution=execution, resume=resume, publish=publish)
        dataset = load_dataset(data, recipe.data)
        vae, vae_record = load_vae(vae_folder)
        if vae.config.image_size != recipe.data.image_size or vae.config.image_channels != recipe.data.image_channels:
            raise ValueError(f"the VAE in {vae_folder} was trained for other images than the recipe's {recipe.data.image_size} pixels")
        if world.first:
            report_data(dataset, out)
        latents = cached_latents(vae, dataset.train, out, flips=recipe.data.horizontal_flip, crew=world, anew=new_latents)
        architecture = recipe.dit.architecture(
            input_size=vae.config.latent_size, in_channels=vae.config.latent_channels, num_classes=len(dataset.class_names)
        )
        torch.manual_seed(SEED)
        dit = DiT(architecture).to(world.device)
        dit.recompute = execution.activation_checkpointing
        vae = vae.to(world.device)

        def checkpoint_of(model: DiT, **provenance: Any) -> Checkpoint:
            return Checkpoint(_describe(recipe, dataset, architecture, objective, vae, provenance), model, vae)

        stage = dit_stage(dit, recipe, dataset.train, latents, _preview(checkpoint_of))
        trained, seconds = fit(stage, out, world=world, execution=execution, resume=resume, publish=publish)
        target = out / CHECKPOINT
        if world.first:
            provenance = _provenance(dataset, optimiser, vae_record, trained, seconds)
            checkpoint = checkpoint_of(cast(DiT, trained), **provenance)
            save(target, checkpoint, dtype=DTYPES[recipe.defaults.dtype], card=model_card(checkpoint.config, {}), overwrite=True)
        world.meet()  # a process that returns finds the checkpoint
        return target


def dit_stage(dit: DiT, recipe: Recipe, split: Split, latents: LatentCache, preview: Callable[[nn.Module], Image.Image]) -> Stage:
    """The network, where it is to be trained, as the loop takes it."""
    objective = recipe.dit.objective_config()
    return Stage(
        title="dit",
        players={"dit": Player(dit, recipe.dit.optimiser, parts=_parts(dit))},
        batch_at=_batches(recipe, split, latents),
        losses=_losses(dit, recipe, build_process(objective, dit.pos_embed.device)),
        preview=preview,
        made_of=asdict(dit.config) | asdict(objective),
    )


def _parts(dit: DiT) -> list[nn.Module]:
    """The blocks, and before each its modulation, which is called on its own (`DiT.conditions`)."""
    return [part for block in dit.blocks for part in (*(m for m in block.modules() if isinstance(m, Modulation)), block)]


def _batches(recipe: Recipe, split: Split, latents: LatentCache) -> Callable[[int, slice], Batch]:
    """Moments of the latents, classes and sample numbers."""
    batch_size = recipe.dit.optimiser.batch_size

    def batch_at(step: int, rows: slice) -> Batch:
        index = batch_indices(len(split), batch_size, step, SEED)[rows]
        numbers = sample_numbers(step, batch_size, rows)
        view = (uniform(numbers, Draw.VIEW) * latents.views).long()
        mean, std = latents.moments(index, view)
        return {"mean": mean, "std": std, "label": split.labels[index], "number": numbers}

    return batch_at


def _losses(dit: DiT, recipe: Recipe, process: Process) -> Losses:
    null_class, dropout = dit.config.null_class, recipe.dit.label_dropout

    def losses(batch: Batch) -> dict[str, Tensor]:
        """Sample the latents' posterior, drop labels, draw times and noise, each by the sample's number."""
        numbers, mean = batch["number"], batch["mean"]
        shape = tuple(mean.shape[1:])
        x0 = mean + batch["std"] * normal(numbers, Draw.POSTERIOR, shape)
        y = torch.where(uniform(numbers, Draw.LABEL) < dropout, null_class, batch["label"])
        t = process.times(uniform(numbers, Draw.TIME))
        return dit_losses(dit, process, x0, y, t, normal(numbers, Draw.NOISE, shape))

    return losses


def _provenance(
    dataset: Dataset, optimiser: OptimiserConfig, vae_record: dict[str, Any], trained: nn.Module, seconds: float
) -> dict[str, Any]:
    trained_here = {
        "command": command().replace(" --resume", ""),  # a resumed run equals the one never stopped
        "minutes": round(seconds / 60, 1),
        "hardware": hardware(),
        "steps": optimiser.steps,
        "parameters": sum(p.numel() for p in trained.parameters()),
    }
    stage_one = {key: vae_record[key] for key in ("command", "minutes", "hardware", "steps")}
    return {"data": dataset.described, "vae": stage_one, "dit": trained_here, "commit": commit()}


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
