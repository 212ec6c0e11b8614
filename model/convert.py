"""`dit import`: an official `.pt` or a diffusers folder → our checkpoint, with a line on each convention in which the two differ."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import MANIFEST, Checkpoint, CheckpointConfig
from model.config import PAPER_VAE_FACTOR, TIME_FEATURES, DiTConfig, ObjectiveConfig, VAEConfig, preset_heads
from model.diffusers_folder import ignored_sampling, read_objective, read_transformer, read_vae, require_agreement, transformer_heads
from model.dit import DiT
from model.formats import CLASS_TABLE, DIFFUSERS, OFFICIAL, architecture_of, our_state
from model.labels import Labels, complete, parse_labels, read_labels
from model.sources import ConversionError, Weights, find_weights, locate, read_json, read_weights
from model.vae import VAE

_DIVISORS = {0: "128, as in the official code", 1: "127, as DiTPipeline computes them"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class Imported:
    """A checkpoint to save, and lines for who asked for it."""

    checkpoint: Checkpoint
    notes: list[str]


@dataclass
class _Found:
    """What a source holds, as far as its own format tells."""

    weights: Weights
    architecture: DiTConfig
    state: dict[str, Tensor]
    form: str
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig("diffusion"))
    spacing: str | None = None
    labels: Labels = field(default_factory=dict)
    vae: Path | None = None
    warnings: list[str] = field(default_factory=list)


def import_checkpoint(
    source: str, *, heads: int | None = None, vae: str | None = None, time_features: str | None = None, labels: Path | None = None
) -> Imported:
    """A file, a folder or a hub id → a checkpoint in float32 on the CPU. Raises ConversionError, or OSError where a file cannot be read.

    Arguments left out are taken from the source, or from the conventions of its format.
    """
    path = locate(source)
    found = _read_folder(path, heads) if path.is_dir() else _read_official(path, heads)
    if labels:
        found.labels = read_labels(labels)
    about_padding = _without_padding(found)
    _require_names_fit(found, labels or path, every=labels is not None)
    if time_features:
        found.architecture = replace(found.architecture, frequency_shift=TIME_FEATURES[time_features])
    vae_folder = _vae_folder(locate(vae)) if vae else found.vae
    autoencoder, vae_weights = _read_vae(vae_folder, found.architecture) if vae_folder else (None, None)
    config = CheckpointConfig(
        architecture=found.architecture,
        objective=found.objective,
        labels=complete(found.labels, found.architecture.num_classes),
        provenance={"imported": _provenance(source, found, vae, vae_weights)},
        **_picture(autoencoder, found.architecture),
        **_defaults(found),
    )
    notes = [
        *_about_weights(found),
        *found.warnings,
        *about_padding,
        *_about_conventions(found, asked=bool(time_features)),
        *_about_names(found),
    ]
    return Imported(Checkpoint(config, _build_dit(found), autoencoder), [*notes, _about_vae(vae_folder, autoencoder)])


def _read_official(path: Path, heads: int | None) -> _Found:
    weights = read_weights(path)
    architecture = architecture_of(weights, OFFICIAL, heads=heads)
    warnings = _about_heads(heads, preset_heads(architecture.depth, architecture.hidden_size), "the paper's model of this shape has")
    return _Found(weights, architecture, our_state(weights, OFFICIAL, architecture), OFFICIAL.name, warnings=warnings)


def _read_folder(folder: Path, heads: int | None) -> _Found:
    """A pipeline's folder, or its transformer's alone."""
    if (folder / MANIFEST).is_file():
        raise ConversionError(f"{folder} is a checkpoint of dit already")
    index = folder / "model_index.json"
    transformer = folder / "transformer" if index.is_file() else folder
    if not (transformer / "config.json").is_file():
        raise ConversionError(f"{folder} is no diffusers folder: it has neither model_index.json nor config.json")
    fields = read_transformer(transformer / "config.json")
    weights = read_weights(find_weights(transformer))
    architecture = architecture_of(weights, DIFFUSERS, side=fields.integer("sample_size", 32), heads=heads or transformer_heads(fields))
    require_agreement(fields, architecture)
    warnings = _about_heads(heads, transformer_heads(fields), "the folder's config.json says")
    architecture = replace(architecture, frequency_shift=1, mlp_norm_eps=fields.positive("norm_eps", 1e-5))
    found = _Found(weights, architecture, our_state(weights, DIFFUSERS, architecture), DIFFUSERS.name, spacing="leading", warnings=warnings)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if index.is_file() and scheduler.is_file():
        found.objective, found.spacing = read_objective(scheduler)
        found.warnings += [f"warning: {scheduler} says {what}, which no sampler here does" for what in ignored_sampling(scheduler)]
    if index.is_file():
        found.labels = parse_labels(index, read_json(index).get("id2label") or {})
        found.vae = folder / "vae" if (folder / "vae").is_dir() else None
    return found


def _without_padding(found: _Found) -> list[str]:
    """DiTPipeline's null class is row 1000; the rows that an export put in between repeat it, and go again."""
    table, count = found.state[CLASS_TABLE], len(found.labels)
    padded = found.labels.keys() == set(range(count)) and 0 < count < len(table) - 1 and bool((table[count:] == table[count]).all())
    if not padded:
        return []
    found.state[CLASS_TABLE] = table[: count + 1].clone()
    found.architecture = replace(found.architecture, num_classes=count)
    return [f"{count} classes have names, and the {len(table) - count} rows after them are all the null class: it is kept once"]


def _require_names_fit(found: _Found, where: Path, *, every: bool) -> None:
    named, classes = found.labels.keys(), found.architecture.num_classes
    if named - set(range(classes)) or (every and len(named) != classes):
        raise ConversionError(f"{where}: names {len(named)} classes, but the model has {classes}")


def _build_dit(found: _Found) -> DiT:
    with torch.device("meta"):
        dit = DiT(found.architecture)
    dit.load_state_dict(found.state, assign=True)
    return dit.eval().requires_grad_(False)


def _vae_folder(folder: Path) -> Path:
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def _read_vae(folder: Path, dit: DiTConfig) -> tuple[VAE, Weights]:
    """An `AutoencoderKL`, in float32. The names of its attention were others before diffusers 0.12."""
    config = read_vae(folder / "config.json", dit)
    read = read_weights(find_weights(folder))
    tensors = {_renamed(key): value for key, value in read.tensors.items()}
    weights = replace(read, tensors=tensors)
    with torch.device("meta"):
        vae = VAE(config)
    expected = {key: tuple(value.shape) for key, value in vae.autoencoder.state_dict().items()}
    weights.require_keys(list(expected))
    weights.require_sizes(expected)
    weights.require_held(list(expected))
    vae.autoencoder.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
    return vae.eval().requires_grad_(False), weights


def _renamed(key: str) -> str:
    return re.sub(r"(attentions\.\d+\.)(query|key|value|proj_attn)\b", lambda old: old[1] + _OLD_ATTENTION[old[2]], key)


def _picture(vae: VAE | None, dit: DiTConfig) -> dict[str, Any]:
    config: VAEConfig | None = vae.config if vae else None
    size, channels = (config.image_size, config.image_channels) if config else (dit.input_size * PAPER_VAE_FACTOR, 3)
    return {"vae": config, "image_size": size, "image_channels": channels}


def _defaults(found: _Found) -> dict[str, Any]:
    """The official code's sampler, or DiTPipeline's."""
    ours = found.form == OFFICIAL.name and found.architecture.learn_sigma
    steps = min(250 if found.form == OFFICIAL.name else 50, found.objective.num_timesteps)
    sampler = "ddpm" if ours else "ddim"
    return {"default_sampler": sampler, "default_steps": steps, "default_guidance_scale": 4.0, "default_spacing": found.spacing}


def _provenance(source: str, found: _Found, vae: str | None, vae_weights: Weights | None) -> dict[str, Any]:
    return {
        "source": source,
        "format": found.form,
        "sha256": found.weights.sha256(),
        "frequency_shift": found.architecture.frequency_shift,
        "mlp_norm_eps": found.architecture.mlp_norm_eps,
        "vae": {"source": vae or source, "sha256": vae_weights.sha256()} if vae_weights else None,
    }


def _about_weights(found: _Found) -> list[str]:
    dit = found.architecture
    sigma = "learned covariance" if dit.learn_sigma else "no learned covariance"
    return [
        f"{found.form} weights of a DiT: width {dit.hidden_size}, depth {dit.depth}, {dit.num_heads} heads, patch {dit.patch_size}, "
        f"latents {dit.input_size} × {dit.input_size} × {dit.in_channels}, {dit.num_classes} classes, {sigma}"
    ]


def _about_heads(asked: int | None, known: int | None, who: str) -> list[str]:
    differ = asked is not None and known is not None and asked != known
    return [f"warning: {asked} heads as asked, but {who} {known}: with a wrong number pictures are wrong"] if differ else []


def _about_conventions(found: _Found, *, asked: bool) -> list[str]:
    dit = found.architecture
    other = next(name for name, shift in TIME_FEATURES.items() if shift != dit.frequency_shift)
    why = "as asked" if asked else f"since the weights are in the {found.form} format"
    features = f"time features: frequencies divided by {_DIVISORS[dit.frequency_shift]}, {why}; --time-features {other} takes the other"
    if not asked and found.form == DIFFUSERS.name:
        features += ", with which facebook's published weights were trained"
    sampling = _defaults(found)
    spacing = sampling["default_spacing"] or "paper"
    how = f"{sampling['default_sampler']}, {sampling['default_steps']} steps, spacing {spacing}, guidance 4 on all channels"
    three = "; the official code's guidance moves the first three: guidance_channels" if found.form == OFFICIAL.name else ""
    process = found.objective
    betas = f"{process.num_timesteps} steps, betas {process.beta_start:g} to {process.beta_end:g}, predicts {process.prediction}"
    return [
        features,
        f"process: {betas}",
        f"unless a request tells: {how}{three}",
        f"norm before the MLP: eps {dit.mlp_norm_eps:g}; the official code's is 1e-06, diffusers' 1e-05 unless told",
    ]


def _about_names(found: _Found) -> list[str]:
    return [] if found.labels else ['the classes have no names and are called "class 0", "class 1", …; --labels names them']


def _about_vae(folder: Path | None, vae: VAE | None) -> str:
    if vae is None:
        return "no VAE: the checkpoint loads but cannot be served; --vae stabilityai/sd-vae-ft-ema brings one"
    scale = " · ".join(f"{1 / std:.5g}" for std in dict.fromkeys(vae.config.latent_std))
    return f"VAE from {folder}: pictures of {vae.config.image_size} pixels, latents scaled by {scale}"
