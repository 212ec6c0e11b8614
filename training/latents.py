"""Latents are encoded once: the posterior's moments of every training image, and of its mirror image, memory-mapped from shards on disk.

`OUT/latents/manifest.json` says of which VAE and which data they are, and `shard-00000.npy` … hold (rows, V, 2, C, h, w) float16: V views
of an image, and of each the mean and the standard deviation. A shard that is there is complete, so an interrupted encoding goes on, and
processes share the work by shards. Latents of another VAE or other data are refused, not used and not overwritten.

float16 costs nothing that is seen: normalised latents are of the order of 1, and rounding moves a mean by less than the posterior spreads.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.vae import VAE
from training.data import Split, to_float

CACHE, MANIFEST = "latents", "manifest.json"
SHARD_ROWS = 4096  # images; what an interruption loses, and what is shared among processes
_VERSION = 1
_WORDS = {"vae": "another VAE", "data": "other training images", "views": "another horizontal_flip"}


@dataclass(frozen=True)
class LatentCache:
    """Moments of normalised latents, of which only the rows asked for are read."""

    shards: Sequence[np.ndarray]  # each (rows, V, 2, C, h, w), all but the last of the same number of rows

    @property
    def views(self) -> int:
        """1, or 2 with mirror images."""
        return self.shards[0].shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """C, h, w."""
        return self.shards[0].shape[3:]

    def moments(self, index: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std (B, C, h, w) float32 of images `index` (B,) in view `view` (B,)."""
        found = np.empty((len(index), 2, *self.shape), dtype=np.float32)
        shard, row = np.divmod(index.numpy(), len(self.shards[0]))
        for number in np.unique(shard):
            here = shard == number
            found[here] = self.shards[number][row[here], view.numpy()[here]]
        mean, std = torch.from_numpy(found).unbind(1)
        return mean, std


class Crew(Protocol):
    """The processes that share the work (World of a training run)."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def meet(self) -> None: ...


@dataclass(frozen=True)
class Alone:
    """One process, on the GPU where there is one."""

    rank: int = 0
    size: int = 1

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def meet(self) -> None:
        return


def vae_hash(vae: VAE) -> str:
    """64 hex digits of its configuration and weights; `vae` is on the CPU."""
    digest = hashlib.sha256(str(vae.config).encode())
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def cached_latents(
    vae: VAE, split: Split, run: Path, *, flips: bool, crew: Crew = Alone(), anew: bool = False, batch_size: int = 256
) -> LatentCache:
    """Encode what the run's folder lacks, and open all of it. `vae` is in float32 on the CPU; every process of the crew calls this.

    ValueError if the latents there are of another VAE or other images, unless they are to be made `anew`; or if the disk is too small.
    """
    folder, views = run / CACHE, 2 if flips else 1
    shards = _shards(folder, len(split), (views, 2, vae.config.latent_channels, vae.config.latent_size, vae.config.latent_size))
    if crew.rank == 0:
        facts = {"version": _VERSION, "vae": vae_hash(vae), "data": split.content_hash, "views": views, "rows": SHARD_ROWS}
        _prepare(folder, facts, anew=anew)
        _require_space(folder, [shard for shard in shards if shard.open() is None])
    crew.meet()
    missing = [shard for shard in shards[crew.rank :: crew.size] if shard.open() is None]
    if missing:
        vae.to(crew.device)
        with tqdm(total=sum(shard.shape[0] for shard in missing), desc="latents", unit="image", dynamic_ncols=True) as bar:
            for shard in missing:
                shard.write(_encode(vae, split, shard.rows, views, batch_size, bar))
        vae.to("cpu")
    crew.meet()
    return LatentCache([_opened(shard) for shard in shards])


@dataclass(frozen=True)
class _Shard:
    path: Path
    first: int  # of its images
    shape: tuple[int, ...]  # (rows, V, 2, C, h, w)

    @property
    def rows(self) -> range:
        return range(self.first, self.first + self.shape[0])

    def open(self) -> np.ndarray | None:
        """Memory-mapped; None if there is none, or one that was cut short."""
        try:
            found = np.load(self.path, mmap_mode="r")
        except (OSError, ValueError):
            return None
        return np.asarray(found) if found.shape == self.shape and found.dtype == np.float16 else None

    def write(self, moments: np.ndarray) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, moments)
        temporary.replace(self.path)


def _shards(folder: Path, images: int, of_one: tuple[int, ...]) -> list[_Shard]:
    starts = range(0, images, SHARD_ROWS)
    return [_Shard(folder / f"shard-{i:05}.npy", start, (min(SHARD_ROWS, images - start), *of_one)) for i, start in enumerate(starts)]


def _opened(shard: _Shard) -> np.ndarray:
    found = shard.open()
    if found is None:
        raise ValueError(f"{shard.path} is not there: all processes need the same folder")
    return found


def _prepare(folder: Path, facts: dict[str, Any], *, anew: bool) -> None:
    """A folder that is for these latents and no others."""
    path = folder / MANIFEST
    if anew:
        for old in (path, *folder.glob("shard-*")):
            old.unlink(missing_ok=True)
    if path.is_file():
        _require_same(path, facts)
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts, indent=2) + "\n")
    temporary.replace(path)


def _require_same(path: Path, facts: dict[str, Any]) -> None:
    remedy = "--new-latents encodes them anew, or choose another --out"
    try:
        kept = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; {remedy}") from error
    changed = [name for name, value in facts.items() if not isinstance(kept, dict) or kept.get(name) != value]
    if changed:
        words = " and ".join(_WORDS[name] for name in changed if name in _WORDS) or "another version of dit"
        was = (
            ", ".join(f"{name} was {str(kept.get(name))[:12]}, is {str(facts[name])[:12]}" for name in changed)
            if isinstance(kept, dict)
            else ""
        )
        raise ValueError(f"{path.parent} holds latents of {words} ({was}): {remedy}")


def _require_space(folder: Path, missing: Sequence[_Shard]) -> None:
    needed, free = sum(2 * math.prod(shard.shape) for shard in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"the latents take {needed / 2**30:.1f} GiB, and the disk of {folder} has {free / 2**30:.1f} GiB left")


def _encode(vae: VAE, split: Split, rows: range, views: int, batch_size: int, bar: tqdm) -> np.ndarray:
    """(rows, V, 2, C, h, w) float16."""
    device, parts = vae.latent_mean.device, []
    for images in split.batches(batch_size, torch.arange(rows.start, rows.stop)):
        batch = to_float(images.to(device))
        seen = [torch.stack(vae.moments(view), dim=1) for view in (batch, batch.flip(3))[:views]]
        parts.append(torch.stack(seen, dim=1).to("cpu", torch.float16))
        if not parts[-1].isfinite().all():
            raise ValueError(
                "the VAE gives latents that are not finite, or too large for float16: its latent_mean and latent_std are wrong"
            )
        bar.update(len(images))
    return torch.cat(parts).numpy()
