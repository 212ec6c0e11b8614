"""The checkpoint folder: complete in itself, written whole or not at all, refused when one byte of it has changed.

`checkpoint.json` names every other file with its sha256 and carries a checksum of itself. The checkpoint's own hash, which every picture
carries, covers what decides a picture (weights, architecture, objective) and not what describes it (metrics, defaults, model card).
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.checkpoint_config import CheckpointConfig, is_interval
from model.config import DiTConfig, ObjectiveConfig, VAEConfig, stored
from model.diffusion import GaussianDiffusion
from model.dit import DiT
from model.flow import RectifiedFlow
from model.folders import exchange, fsync
from model.manifest import LATEST, MANIFEST, CheckpointError, file_entries, is_plain_name, read_latest, read_manifest
from model.vae import VAE

FORMAT = 1
WEIGHTS = {"dit": "dit.safetensors", "vae": "vae.safetensors"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

C = TypeVar("C", DiTConfig, VAEConfig, ObjectiveConfig)


@dataclass
class Checkpoint:
    """A loaded model: modules in evaluation mode on one device, and what is known of them."""

    config: CheckpointConfig
    dit: DiT
    vae: VAE | None
    hash: str = ""  # empty until saved or loaded

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        return self.config.labels

    @property
    def device(self) -> torch.device:
        return self.dit.pos_embed.device

    @property
    def diffusion(self) -> GaussianDiffusion | None:
        return GaussianDiffusion(self.config.objective) if self.config.objective.kind == "diffusion" else None

    @property
    def flow(self) -> RectifiedFlow | None:
        return RectifiedFlow(self.config.objective) if self.config.objective.kind == "flow" else None


def _canonical(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(config: CheckpointConfig) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "architecture": stored(config.architecture),
        "vae": stored(config.vae) if config.vae else None,
        "objective": stored(config.objective),
        "image_size": config.image_size,
        "image_channels": config.image_channels,
        "labels": [list(group) for group in config.labels],
        "null_class": config.architecture.null_class,
        "defaults": config.defaults,
        "quality": config.quality,
        "provenance": config.provenance,
        "metrics": config.metrics,
        **({"tuning": config.tuning} if config.tuning else {}),
    }


def _identity(document: dict[str, Any]) -> str:
    """sha256 of what decides a picture."""
    decisive = {key: document[key] for key in ("format", "architecture", "vae", "objective", "image_size", "image_channels")}
    decisive["weights"] = {name: entry["sha256"] for name, entry in document["files"].items() if name in WEIGHTS.values()}
    return hashlib.sha256(_canonical(decisive)).hexdigest()


def _write_manifest(folder: Path, config: CheckpointConfig) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    document = _describe(config)
    document["files"] = {name: {"sha256": _sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in names}
    document["hash"] = _identity(document)
    document["checksum"] = hashlib.sha256(_canonical(document)).hexdigest()
    (folder / MANIFEST).write_bytes(_canonical(document))
    for path in folder.iterdir():
        fsync(path)
    fsync(folder)
    return str(document["hash"])


def _replace_folder(staged: Path, target: Path, overwrite: bool) -> None:
    """Put a finished folder in the target's place. An older one there is `staged` afterwards, and a reader always finds one of them."""
    if overwrite and target.exists():
        exchange(staged, target)
    else:
        os.rename(staged, target)  # OSError if a folder has appeared there meanwhile
    fsync(target.parent)


def _stage(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    staged.chmod(0o755)
    return staged


def save(
    path: str | Path,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    card: str = "",
    overwrite: bool = False,
) -> str:
    """Write the folder under a temporary name, fsync, rename; returns its hash. `dtype` is that of the stored DiT, by default its own."""
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; a checkpoint is never written over another unless told to")
    vae_config = checkpoint.vae.config if checkpoint.vae else None
    if (checkpoint.dit.config, vae_config) != (checkpoint.config.architecture, checkpoint.config.vae):
        raise ValueError("the configuration of the DiT or the VAE does not match the checkpoint's, which could not be loaded again")
    staged = _stage(target)
    try:
        for name, module, kind in (("dit", checkpoint.dit, dtype), ("vae", checkpoint.vae, None)):
            if module is not None:
                state = {k: v.detach().to("cpu", kind or v.dtype).contiguous() for k, v in module.state_dict().items()}
                save_file(state, staged / WEIGHTS[name])
                (staged / WEIGHTS[name]).chmod(0o644)  # it is served by another user than the one who trained it
        (staged / "README.md").write_text(card or "No model card was given.\n")
        identity = _write_manifest(staged, checkpoint.config)
        _replace_folder(staged, target, overwrite)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    checkpoint.hash = identity
    return identity


def annotate(path: str | Path, *, card: str, files: dict[str, bytes], **changes: Any) -> None:
    """Replace the model card, extra files (a grid, a plot) and fields of CheckpointConfig that describe a saved checkpoint: metrics,
    defaults, quality, tuning. ValueError for a change that decides pictures, since the hash must stay.
    """
    target = resolve(path)
    document = verify(target)
    staged = _stage(target)
    try:
        for source in target.iterdir():
            shutil.copy2(source, staged / source.name)
        for name, content in files.items():
            (staged / name).write_bytes(content)
        (staged / "README.md").write_text(card)
        identity = _write_manifest(staged, replace(_parse(document, target), **changes))
        if identity != document["hash"]:
            raise ValueError(f"{', '.join(changes)}: this would make another checkpoint of {target}; save it as one")
        _replace_folder(staged, target, overwrite=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def resolve(path: str | Path) -> Path:
    """A checkpoint folder, or a registry entry with versions and a file `latest` that names one → the checkpoint folder."""
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return folder
    latest = folder / LATEST
    if latest.is_file():
        name = read_latest(latest)
        if is_plain_name(name) and (folder / name / MANIFEST).is_file():
            return folder / name
        raise CheckpointError(f"{latest} names {name!r}, which is no checkpoint folder beside it")
    raise CheckpointError(f"{folder} is not a checkpoint: it has neither {MANIFEST} nor a file 'latest'")


def verify(folder: Path) -> dict[str, Any]:
    """Read `checkpoint.json` and check every byte it vouches for; CheckpointError names the first file that is wrong."""
    manifest = folder / MANIFEST
    raw, document = read_manifest(manifest)
    if type(document.get("format")) is not int or document["format"] != FORMAT:
        raise CheckpointError(f"{manifest} has format {ascii(document.get('format'))[:40]}; this version reads format {FORMAT}")
    try:
        checksum = document.pop("checksum", None)
        sound = hashlib.sha256(_canonical(document)).hexdigest() == checksum and raw == _canonical({**document, "checksum": checksum})
    except (ValueError, RecursionError) as error:  # not a number, lone surrogates, too deep
        raise CheckpointError(f"{manifest} cannot be read: {error}") from error
    if not sound:
        raise CheckpointError(f"{manifest} was changed after it was written: its checksum does not fit")
    files = file_entries(document, manifest)
    for kind, name in WEIGHTS.items():
        if name not in files and (kind == "dit" or document.get(kind)):
            raise CheckpointError(f"{manifest} has no sha256 of {name} among its files")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry.bytes or _sha256(path) != entry.sha256:
            raise CheckpointError(f"{path} was changed after it was written: its sha256 does not fit")
    _require_own_hash(document, manifest)
    return document


def _require_own_hash(document: dict[str, Any], manifest: Path) -> None:
    """Pictures and jobs go by it, and workers share what has the same: one that lies would be taken for another checkpoint."""
    try:
        identity = _identity(document)
    except KeyError as error:
        raise CheckpointError(f"{manifest} lacks {error}") from error
    if document.get("hash") != identity:
        raise CheckpointError(f"{manifest} has a hash that is not that of its content")


def from_json(kind: type[C], values: dict[str, Any]) -> C:
    """A configuration from its JSON form, in which tuples are lists. Raises TypeError, AttributeError or ValueError."""
    arguments: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return kind(**arguments)


def _build(kind: type[C], values: dict[str, Any], where: Path) -> C:
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: the fields of {kind.__name__} are no JSON object")
    known = {f.name for f in fields(kind)}
    unknown = set(values) - known
    if unknown:
        raise CheckpointError(f"{where}: {kind.__name__} has no field {sorted(unknown)[0][:60]!a}")
    try:
        return from_json(kind, values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _interval(values: list[float] | None) -> tuple[float, float] | None:
    if values is None:
        return None
    if not is_interval(values):
        raise ValueError(f"the default guidance_interval must be [low, high] with 0 ≤ low ≤ high ≤ 1; got {ascii(values)[:60]}")
    return float(values[0]), float(values[1])


def _labels(groups: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise ValueError("labels must be a list of lists of names, one per class")
    return tuple(tuple(group) for group in groups)


def _parse(document: dict[str, Any], folder: Path) -> CheckpointConfig:
    where = folder / MANIFEST
    try:
        return CheckpointConfig(
            architecture=_build(DiTConfig, document["architecture"], where),
            objective=_build(ObjectiveConfig, document["objective"], where),
            vae=_build(VAEConfig, document["vae"], where) if document["vae"] else None,
            image_size=document["image_size"],
            image_channels=document["image_channels"],
            labels=_labels(document["labels"]),
            default_steps=document["defaults"]["steps"],
            default_guidance_scale=document["defaults"]["guidance_scale"],
            default_sampler=document["defaults"]["sampler"],
            default_spacing=document["defaults"].get("spacing"),
            default_guidance_interval=_interval(document["defaults"].get("guidance_interval")),
            quality=document["quality"],
            provenance=document["provenance"],
            metrics=document["metrics"],
            tuning=document.get("tuning", {}),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{where}: {error!r}") from error


def _verified(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint folder that a path leads to, and its manifest; looked at again where an entry just becomes one of several versions."""
    folder = resolve(path)
    try:
        return folder, verify(folder)
    except FileNotFoundError:
        folder = resolve(path)
        return folder, verify(folder)


def read_config(path: str | Path) -> tuple[CheckpointConfig, str]:
    """What a verified checkpoint says of itself, and its hash; builds no module."""
    folder, document = _verified(path)
    return _parse(document, folder), str(document["hash"])


M = TypeVar("M", DiT, VAE)


def _read_weights(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """The library checks the header: no tensor may lie outside the file, or share its bytes with another."""
    try:
        state = load_file(path, device=str(device))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no sound safetensors file: {error}") from error
    for key, value in state.items():
        if value.dtype not in DTYPES.values():
            raise CheckpointError(f"{path}: {key[:100]!a} is of type {str(value.dtype).removeprefix('torch.')}, not of {', '.join(DTYPES)}")
    return state


def _require_held(architecture: DiTConfig, path: Path) -> None:
    """A configuration may claim any width, and its position table is made before the weights are compared. So the file must hold a part
    of them: four of a block's matrices have D² numbers.
    """
    least = 4 * architecture.hidden_size**2 * architecture.depth
    if least > path.stat().st_size:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, too few for {MANIFEST}'s depth and hidden_size")


def _load_module(module: M, path: Path, device: torch.device, dtype: torch.dtype | None) -> M:
    state, expected = _read_weights(path, device), module.state_dict()
    for key in sorted(expected.keys() ^ state.keys()):
        raise CheckpointError(f"{path}: {'lacks' if key in expected else 'has an unknown'} key {key!r}")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise CheckpointError(f"{path}: {key} has size {tuple(value.shape)}, but {MANIFEST} describes {tuple(expected[key].shape)}")
    module.load_state_dict(state, assign=True)
    kind = dtype or next(iter(state.values())).dtype
    if isinstance(module, VAE):
        module.to(device).cast(kind)
    else:
        module.to(device, kind)
    return module.eval().requires_grad_(False)


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Checkpoint:
    """Verify and load a checkpoint folder or registry entry; dtype defaults to what is stored. Raises CheckpointError."""
    folder, document = _verified(path)
    config, where = _parse(document, folder), torch.device(device)
    _require_held(config.architecture, folder / WEIGHTS["dit"])
    with torch.device("meta"):  # no time, memory or random numbers for weights that are replaced at once
        empty_dit, empty_vae = DiT(config.architecture), VAE(config.vae) if config.vae else None
    dit = _load_module(empty_dit, folder / WEIGHTS["dit"], where, dtype)
    vae = _load_module(empty_vae, folder / WEIGHTS["vae"], where, dtype) if empty_vae else None
    return Checkpoint(config, dit, vae, str(document["hash"]))
