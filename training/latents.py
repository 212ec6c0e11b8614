"""Latents are encoded once: the posterior's moments of every training image (and of its mirror image), cached on disk.

The cache is stamped with the VAE's and the data's hash, and made again when either has changed.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from model.vae import VAE
from training.data import Split, to_float

CACHE = "latents.safetensors"


@dataclass(frozen=True)
class LatentCache:
    """Moments of normalised latents: mean and std (V, N, C, h, w) for V = 1 view, or 2 with mirror images."""

    mean: Tensor
    std: Tensor

    def sample(self, index: Tensor, view: Tensor, noise: Tensor) -> Tensor:
        """Posterior samples (B, C, h, w) of images `index` (B,) in view `view` (B,)."""
        return self.mean[view, index] + self.std[view, index] * noise


def _stamp(vae: VAE, split: Split, flips: bool) -> str:
    digest = hashlib.sha256(f"{vae.config} flips={flips}".encode())
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    split.hash_into(digest)
    return digest.hexdigest()


@torch.inference_mode()
def cached_latents(vae: VAE, split: Split, folder: Path, *, flips: bool, batch_size: int = 256) -> LatentCache:
    """Read the cache in `folder` if it fits this VAE and these images, else encode and write it. `vae` is in float32 on the CPU."""
    path, stamp = folder / CACHE, _stamp(vae, split, flips)
    if path.is_file():
        with safe_open(path, "pt") as cache:
            if (cache.metadata() or {}).get("stamp") == stamp:
                return LatentCache(cache.get_tensor("mean"), cache.get_tensor("std"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = vae.to(device)
    views: list[list[Tensor]] = [[], []]
    for flipped in range(2 if flips else 1):
        for images in tqdm(split.batches(batch_size), desc="latents", unit="batch"):
            batch = to_float(images).to(device)
            views[flipped].append(torch.stack([m.cpu() for m in vae.moments(batch.flip(3) if flipped else batch)]))
    vae.to("cpu")
    mean, std = torch.stack([torch.cat(view, dim=1) for view in views if view], dim=1)  # each (V, N, C, h, w)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({"mean": mean.contiguous(), "std": std.contiguous()}, temporary, metadata={"stamp": stamp})
    temporary.replace(path)
    return LatentCache(mean, std)
