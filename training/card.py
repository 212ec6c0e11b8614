"""The model card, `README.md` of a checkpoint folder: Markdown from what the checkpoint says of itself. Facts that are missing are left out
or said to be missing, so that any checkpoint has a card."""

import json
import shlex
from typing import Any

from model.checkpoint import CheckpointConfig
from model.config import DiTConfig, ObjectiveConfig
from training.card_metrics import GRID, MISSING, TUNING_PLOT, metrics_section, number, setting_in_words, share


def model_card(config: CheckpointConfig, metrics: dict[str, Any]) -> str:
    """The card of a checkpoint; `metrics` as returned by `training.evaluate.evaluate`, or empty before any evaluation."""
    sections = [
        _title(config),
        _picture(config, metrics),
        _use(config),
        *([_origin(config)] if "imported" in config.provenance else [_data(config), _training(config)]),
        metrics_section(metrics),
        _tuning(config),
        _limits(config),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _names(config: CheckpointConfig) -> list[str]:
    return [group[0] for group in config.labels]


def _size(config: CheckpointConfig) -> str:
    return f"{config.image_size}×{config.image_size} {'grey' if config.image_channels == 1 else 'RGB'}"


def _title(config: CheckpointConfig) -> str:
    dit, vae = config.architecture, config.vae
    parameters = _stage(config, "dit").get("parameters")
    counted = f"{parameters / 1e6:.1f} M parameters, " if parameters else ""
    latents = f" on {vae.latent_size}×{vae.latent_size}×{vae.latent_channels} latents of its own VAE" if vae else ""
    return (
        f"# Class-conditional DiT, {_size(config)}, {len(config.labels)} classes\n\n"
        f"A Diffusion Transformer (Peebles & Xie 2022) with {_network(dit)}{latents}: "
        f"{counted}width {dit.hidden_size}, depth {dit.depth}, {dit.num_heads} heads, patch {dit.patch_size}, {dit.num_tokens} tokens; "
        f"trained as {_objective(config.objective, dit.learn_sigma)}. "
        f"Defaults: {setting_in_words(config.defaults)}."
    )


def _network(dit: DiTConfig) -> str:
    block = {"adaln-zero": "adaLN-Zero", "adaln": "adaLN"}.get(dit.block, dit.block)
    parts = {"QK-norm": dit.qk_norm, "RMSNorm": dit.rms_norm, "SwiGLU": dit.swiglu, "2-D RoPE": dit.rope}
    added = ", ".join(name for name, there in parts.items() if there)
    return f"{block} blocks ({added})" if added else f"{block} blocks"


def _objective(objective: ObjectiveConfig, learn_sigma: bool) -> str:
    if objective.kind == "flow":
        return "rectified flow" if objective.flow_time == "logit-normal" else f"rectified flow with {objective.flow_time} times"
    if learn_sigma and objective == ObjectiveConfig("diffusion"):
        return "Gaussian diffusion with the paper's loss"
    loss = "the paper's hybrid loss" if learn_sigma else "the mean squared error alone"
    weight = f", min-SNR weighted (γ = {objective.min_snr_gamma:g})" if objective.min_snr_gamma else ""
    return f"Gaussian diffusion with {objective.prediction}-prediction and {loss}{weight}"


def _picture(config: CheckpointConfig, metrics: dict[str, Any]) -> str:
    if not metrics:
        return ""
    names = _names(config)
    order = f": {', '.join(names)}" if len(names) <= 20 else ""
    return (
        f"![one row per class]({GRID})\n\nOne row per class, in order{order}. The first seeds of the evaluation below, none chosen by hand."
    )


def _use(config: CheckpointConfig) -> str:
    label = _names(config)[0]
    request = {"class_label": label, "guidance_scale": config.default_guidance_scale, "steps": config.default_steps, "seed": 7}
    body = shlex.quote(json.dumps(request, ensure_ascii=False))
    return (
        "## Use\n\n"
        "The folder is complete in itself. Under `checkpoints/` (or wherever `DIT_CHECKPOINTS` points; `DIT_MODEL` names the folder), "
        "`make run` serves it:\n\n"
        "```sh\nmake run\n"
        "curl -s -X POST localhost:8000/generate -H 'Prefer: wait=30' -H 'Accept: image/png' -H 'Content-Type: application/json' \\\n"
        f"     -d {body} -o picture.png\n```\n\n"
        f"`class_label` is an index from 0 to {len(config.labels) - 1} or a class's name."
    )


def _origin(config: CheckpointConfig) -> str:
    """Of weights that were trained elsewhere (`dit import`)."""
    told, dit = _stage(config, "imported"), config.architecture
    parts = [("DiT", told.get("sha256")), ("VAE", (told.get("vae") or {}).get("sha256"))]
    files = [f"- {part}, `{name}`: sha256 `{digest}`" for part, named in parts for name, digest in (named or {}).items()]
    return (
        f"## Origin\n\nImported from `{told.get('source')}` ({told.get('format')} format) by `dit import`; how it was trained is not known "
        f"here. The time features' frequencies are divided by {128 - dit.frequency_shift}, and the norm before the MLP has eps "
        f"{dit.mlp_norm_eps:g}.\n\n" + "\n".join(files)
    )


def _data(config: CheckpointConfig) -> str:
    return (
        f"## Data\n\n{_described(config)}. Every picture is {_size(config)}; IDX images that are smaller were centred on black, "
        "images of a folder were scaled to their shorter side and cropped to the centre. "
        "The training split trained the model; the test split was kept for the measures."
    )


def _described(config: CheckpointConfig) -> str:
    return str(config.provenance.get("data") or "The data was not recorded").rstrip(".")


def _stage(config: CheckpointConfig, name: str) -> dict[str, Any]:
    found = config.provenance.get(name)
    return found if isinstance(found, dict) else {}


def _training(config: CheckpointConfig) -> str:
    stages = [(title, _stage(config, name)) for title, name in (("VAE", "vae"), ("DiT", "dit"))]
    commands = [str(stage["command"]) for _, stage in stages if stage.get("command")]
    rows = [
        f"| {title} | {stage.get('steps', MISSING)} | {stage.get('minutes', MISSING)} | {stage.get('hardware', MISSING)} |"
        for title, stage in stages
    ]
    commit = config.provenance.get("commit")
    return "\n".join(
        [
            "## Training\n",
            *(["```sh", *commands, "```\n"] if commands else ["The commands were not recorded.\n"]),
            "| stage | steps | minutes | hardware |\n|---|---|---|---|",
            *rows,
            f"\nThe stored DiT is the moving average (EMA) of the trained weights; source at commit `{commit or 'unknown'}`.",
        ]
    )


def _tuning(config: CheckpointConfig) -> str:
    told = config.tuning
    if not told:
        return ""
    cached = [("–", entry) for entry in told["table"] if "block_cache" in entry]
    return (
        f"## Quality and speed\n\n```sh\n{told['command']}\n```\n\n"
        "| quality | setting | network evaluations of a picture | Fréchet distance | class consistency |\n|---|---|---|---|---|\n"
        + "\n".join(_quality_row(name, entry) for name, entry in [*config.quality.items(), *cached])
        + f"\n\n![distance over evaluations]({TUNING_PLOT})\n\n"
        f"{len(told['table'])} measurements: first with {told['samples']} pictures a setting, then the best of them again with "
        f"{told['final_samples']}, which alone decide. A guided evaluation counts twice. *best* has the lowest distance, *standard*, the "
        f"default, the fewest evaluations within {_percent(told['within']['standard'])} of it, *draft* the fewest within "
        f"{_percent(told['within']['draft'])}. Drawn in {told['dtype']}; {told['minutes']:g} minutes on {told['hardware']}, "
        f"source at commit `{told['commit'] or 'unknown'}`."
    )


def _quality_row(name: str, entry: dict[str, Any]) -> str:
    values = setting_in_words(entry), entry["evaluations"], number(entry, "frechet_distance"), share(entry, "class_consistency")
    return f"| {name} | {' | '.join(map(str, values))} |"


def _limits(config: CheckpointConfig) -> str:
    names = _names(config)
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return (
        "## Limits\n\n"
        f"- It draws {len(names)} classes and nothing else: {shown}. No text prompts; no people, faces or scenes beyond these.\n"
        f"- Pictures are {_size(config)}; there is no finer detail to enlarge, and no other size.\n"
        "- It repeats what its training images show, with their biases, and the licence of that data applies to what is made of it.\n"
        "- Class consistency is a classifier's opinion and says nothing about variety: more guidance raises it while pictures grow alike.\n"
        "- A picture that resembles no class clearly is possible at any setting; few steps make it likelier."
    )
