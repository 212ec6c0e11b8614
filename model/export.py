"""`dit export`: our checkpoint → an official `.pt`, or a folder for diffusers' `DiTPipeline`. What a format cannot hold is refused."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import DiTConfig, ObjectiveConfig, preset_heads
from model.diffusers_folder import PIPELINE_CLASSES, scaling_factor, scheduler_fields, transformer_fields
from model.dit import DiT
from model.formats import CLASS_TABLE, DIFFUSERS, OFFICIAL, positions, their_state
from model.labels import id2label
from model.sources import ConversionError
from model.vae import VAE, build_autoencoder


def export_official(checkpoint: Checkpoint, destination: Path) -> list[str]:
    """A flat state dict with the official names; returns what whoever loads it must know. Raises ConversionError before it writes."""
    _require_holdable(checkpoint)
    dit, objective = checkpoint.config.architecture, checkpoint.config.objective
    if objective.prediction != "noise":
        raise ConversionError(f"the official code predicts noise, this model {objective.prediction}")
    with _put_in_place(destination) as staged:
        torch.save(their_state(checkpoint.dit, OFFICIAL), staged)
    notes = ["the file holds no labels, no VAE and no process"]
    if preset_heads(dit.depth, dit.hidden_size) != dit.num_heads:
        notes.append(f"it does not hold the number of heads either, {dit.num_heads}, and no preset has this shape")
    if dit.frequency_shift:
        notes.append("warning: this model's time features are those of DiTPipeline (divided by 127); the official code divides by 128")
    if dit.mlp_norm_eps != dit.norm_eps:
        notes.append(f"warning: this model's norm before the MLP has eps {dit.mlp_norm_eps:g}; the official code's has 1e-06")
    if not dit.learn_sigma:
        notes.append("warning: this model has no learned covariance; the official code must be told learn_sigma=False")
    if dit.mlp_ratio != 4:
        notes.append(f"warning: this model's mlp_ratio is {dit.mlp_ratio:g}; the official code must be told")
    if checkpoint.vae and not _has_papers_scale(checkpoint.vae):
        notes.append("warning: this model's latents are not scaled by 0.18215 alone, as the official code does it; its own VAE must decode")
    if _process(objective) != _process(ObjectiveConfig("diffusion")):
        notes.append("warning: this model's process is not the official code's, which has 1000 steps and betas from 0.0001 to 0.02")
    return notes


def export_diffusers(checkpoint: Checkpoint, destination: Path) -> list[str]:
    """A folder for `DiTPipeline.from_pretrained`; returns what whoever loads it must know. Raises ConversionError before it writes."""
    _require_holdable(checkpoint)
    config, dit = checkpoint.config, checkpoint.config.architecture
    if int(dit.hidden_size * dit.mlp_ratio) != 4 * dit.hidden_size:
        raise ConversionError(f"diffusers' MLP is 4 times as wide as the model; mlp_ratio is {dit.mlp_ratio:g}")
    if dit.num_classes > PIPELINE_CLASSES:
        raise ConversionError(f"DiTPipeline's null class is {PIPELINE_CLASSES}, so it cannot have {dit.num_classes} classes")
    with _put_in_place(destination) as staged:
        to_transformer(checkpoint.dit).save_pretrained(staged / "transformer")
        DDIMScheduler(**scheduler_fields(config.objective)).save_pretrained(staged / "scheduler")
        if checkpoint.vae:
            autoencoder(checkpoint.vae).save_pretrained(staged / "vae")
        (staged / "model_index.json").write_text(_index(checkpoint))
    notes = []
    if checkpoint.vae is None:
        notes.append("warning: it has no VAE; give one to DiTPipeline.from_pretrained(…, vae=…)")
    if not dit.frequency_shift:
        notes.append("warning: this model's time features are the official ones (divided by 128); DiTPipeline divides by 127")
    if dit.num_classes < PIPELINE_CLASSES:
        notes.append(f"the class table has the null class from row {dit.num_classes} to {PIPELINE_CLASSES}, where DiTPipeline looks for it")
    commas = next((name for names in config.labels for name in names if "," in name), None)
    if commas:
        notes.append(f"warning: DiTPipeline splits names at commas, and so {commas!r}")
    return notes


def _has_papers_scale(vae: VAE) -> bool:
    std = vae.latent_std.flatten()
    return not vae.latent_mean.any() and bool(torch.allclose(std, torch.full_like(std, 1 / 0.18215), rtol=1e-4))


def _process(objective: ObjectiveConfig) -> tuple[int, float, float]:
    return objective.num_timesteps, objective.beta_start, objective.beta_end


def _require_holdable(checkpoint: Checkpoint) -> None:
    """Both formats hold the paper's diffusion with adaLN-Zero blocks, and nothing beyond."""
    config, objective = checkpoint.config.architecture, checkpoint.config.objective
    if objective.kind != "diffusion":
        raise ConversionError(f"neither format holds the objective {objective.kind!r}")
    plain = DiTConfig(1, 1, 1, 4, 1, 1, 1)
    for name in ("block", "qk_norm", "rms_norm", "swiglu", "rope", "norm_eps", "time_factor"):
        if getattr(config, name) != getattr(plain, name):
            raise ConversionError(f"neither format holds {name} = {getattr(config, name)!r}, only {getattr(plain, name)!r}")


@contextmanager
def _put_in_place(destination: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which gets its name when it is whole. FileExistsError if something has that name."""
    if destination.exists():
        raise FileExistsError(f"{destination} exists; an export is never written over anything")
    destination.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(prefix=f".{destination.name}.new-", dir=destination.parent))
    try:
        yield around / destination.name
        for path in (around / destination.name).rglob("*.safetensors"):
            path.chmod(0o644)  # as readable as the files beside it
        os.rename(around / destination.name, destination)
    finally:
        shutil.rmtree(around)


def to_transformer(dit: DiT) -> DiTTransformer2DModel:
    """The same network as diffusers' own, built without memory, so that its own names and sizes judge ours."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(**transformer_fields(dit.config))
    state = their_state(dit, DIFFUSERS)
    for name in DIFFUSERS.names(CLASS_TABLE, dit.config.depth):
        table = state[name]
        state[name] = torch.cat([table, table[-1:].expand(PIPELINE_CLASSES + 1 - len(table), -1)])
    model.load_state_dict(state, assign=True)
    model.pos_embed.pos_embed = positions(dit.config)  # the one buffer that is not among the weights
    return model.eval()


def _index(checkpoint: Checkpoint) -> str:
    parts = {"transformer": "DiTTransformer2DModel", "scheduler": "DDIMScheduler", "vae": "AutoencoderKL"}
    document = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "id2label": id2label(checkpoint.config.labels),
        **{name: ["diffusers", kind] for name, kind in parts.items() if name != "vae" or checkpoint.vae},
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def autoencoder(vae: VAE) -> AutoencoderKL:
    """The same autoencoder with statistics that DiTPipeline can hold: one scaling factor, or none and the 1×1 convolutions changed."""
    model = build_autoencoder(vae.config)
    model.load_state_dict(vae.autoencoder.state_dict())
    mean, std = vae.latent_mean.flatten().double(), vae.latent_std.flatten().double()
    if not mean.any() and (std == std[0]).all():
        model.register_to_config(scaling_factor=scaling_factor((vae.config.latent_std or (1.0,))[0]))
    else:
        fold_statistics(model, mean, std)
    return model


@torch.no_grad()
def fold_statistics(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Encode to and decode from (raw − mean)/std, mean and std (C,): for logits l of the posterior, log σ² − 2·log std. In place."""
    quant, post = model.quant_conv, model.post_quant_conv
    both = torch.cat([std, torch.ones_like(std)])  # mean and log-variance of the posterior
    shift = torch.cat([-mean / std, -2 * std.log()])
    weight, bias = quant.weight.double(), quant.bias.double()
    quant.weight.copy_(weight / both.view(-1, 1, 1, 1))
    quant.bias.copy_(bias / both + shift)
    weight = post.weight.double()
    post.bias.copy_(post.bias.double() + (weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3)))
    post.weight.copy_(weight * std.view(1, -1, 1, 1))
