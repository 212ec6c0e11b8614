"""Moments of latents on disk: right, read by row, resumed, shared by processes, and refused when they are of something else."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.config import VAEConfig
from model.vae import VAE
from training import latents
from training.data import Split
from training.latents import CACHE, MANIFEST, LatentCache, cached_latents

IMAGES = torch.randint(0, 256, (7, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vae(tiny_vae_config: Callable[..., VAEConfig]) -> VAE:
    torch.manual_seed(0)
    return VAE(tiny_vae_config()).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SHARD_ROWS", 3)


def split(images: torch.Tensor = IMAGES) -> Split:
    return Split(images, torch.zeros(len(images), dtype=torch.int64))


def everything(cache: LatentCache, view: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.moments(torch.arange(7), torch.full((7,), view))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """First rows of the shards that were encoded."""
    starts: list[int] = []
    real = latents._encode

    def encode(vae: VAE, split: Split, rows: range, *more: object) -> np.ndarray:
        starts.append(rows.start)
        return real(vae, split, rows, *more)

    monkeypatch.setattr(latents, "_encode", encode)
    return starts


def test_the_moments_are_the_vaes_to_float16(vae: VAE, tmp_path: Path) -> None:
    cache = cached_latents(vae, split(), tmp_path, flips=True, batch_size=2)
    assert (cache.views, cache.shape, [len(shard) for shard in cache.shards]) == (2, (4, 8, 8), [3, 3, 1])
    for view, images in enumerate((IMAGES, IMAGES.flip(3))):
        for found, expected in zip(everything(cache, view), vae.moments(images.float() / 127.5 - 1), strict=True):
            torch.testing.assert_close(found, expected, rtol=2**-11, atol=1e-5)


def test_rows_and_views_are_found_in_any_order_over_shards(vae: VAE, tmp_path: Path) -> None:
    cache = cached_latents(vae, split(), tmp_path, flips=True)
    index, view = torch.tensor([6, 0, 3, 0, 2]), torch.tensor([1, 0, 1, 1, 0])
    both = torch.stack([torch.stack(everything(cache, v), 1) for v in range(2)])
    mean, std = cache.moments(index, view)
    assert torch.equal(torch.stack([mean, std], 1), both[view, index])


def test_latents_are_encoded_once(vae: VAE, tmp_path: Path, encoded: list[int]) -> None:
    first = cached_latents(vae, split(), tmp_path, flips=False)
    again = cached_latents(vae, split(), tmp_path, flips=False)
    assert encoded == [0, 3, 6] and first.views == 1
    assert torch.equal(torch.stack(everything(first)), torch.stack(everything(again)))


def test_an_interrupted_encoding_goes_on_where_it_was(vae: VAE, tmp_path: Path, encoded: list[int]) -> None:
    whole = everything(cached_latents(vae, split(), tmp_path, flips=False))
    folder = tmp_path / CACHE
    (folder / "shard-00001.npy").rename(folder / "shard-00001.tmp")  # as if it was being written
    last = folder / "shard-00002.npy"
    last.write_bytes(last.read_bytes()[:-10])
    del encoded[:]
    again = everything(cached_latents(vae, split(), tmp_path, flips=False))
    assert encoded == [3, 6] and torch.equal(torch.stack(whole), torch.stack(again))
    assert not list(folder.glob("*.tmp"))


def test_latents_of_something_else_are_refused_and_made_anew_when_asked(vae: VAE, tmp_path: Path, encoded: list[int]) -> None:
    cached_latents(vae, split(), tmp_path, flips=False)
    other_images = split(IMAGES.flip(0))
    for images, flips, told in (
        (
            other_images,
            False,
            r"latents of other training images \(data was [0-9a-f]{12}, is [0-9a-f]{12}\): --new-latents encodes them anew",
        ),
        (split(), True, r"latents of another horizontal_flip \(views was 1, is 2\)"),
        (split(IMAGES[:6]), False, "other training images"),
    ):
        with pytest.raises(ValueError, match=told):
            cached_latents(vae, images, tmp_path, flips=flips)
    before = everything(cached_latents(vae, split(), tmp_path, flips=False))  # what was refused is still there
    next(vae.parameters()).add_(1.0)
    with pytest.raises(ValueError, match=r"latents of another VAE \(vae was"):
        cached_latents(vae, split(), tmp_path, flips=False)
    with pytest.raises(ValueError, match="latents of another VAE and other training images"):
        cached_latents(vae, other_images, tmp_path, flips=False)
    after = everything(cached_latents(vae, split(), tmp_path, flips=False, anew=True))
    assert encoded == [0, 3, 6] * 2 and not torch.equal(before[0], after[0])


def test_the_vaes_statistics_are_part_of_it(vae: VAE, tmp_path: Path) -> None:
    cached_latents(vae, split(), tmp_path, flips=False)
    other = VAE(replace(vae.config, latent_mean=(0.0,) * 4))
    other.load_state_dict(vae.state_dict())
    with pytest.raises(ValueError, match="another VAE"):
        cached_latents(other.eval(), split(), tmp_path, flips=False)


@pytest.mark.parametrize("raw", ["", "[]", "{}", '{"version": 0}'])
def test_a_spoilt_manifest_is_refused(vae: VAE, tmp_path: Path, raw: str) -> None:
    cached_latents(vae, split(), tmp_path, flips=False)
    (tmp_path / CACHE / MANIFEST).write_text(raw)
    with pytest.raises(ValueError, match="--new-latents"):
        cached_latents(vae, split(), tmp_path, flips=False)


def test_a_disk_that_is_too_small_is_told_before_anything_is_encoded(
    vae: VAE, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"the latents take 0\.0 GiB, and the disk of .* has 0\.0 GiB left"):
        cached_latents(vae, split(), tmp_path, flips=False)
    assert not encoded


def test_latents_that_are_not_finite_are_not_kept(vae: VAE, tmp_path: Path) -> None:
    next(vae.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        cached_latents(vae, split(), tmp_path, flips=False)
    assert not list((tmp_path / CACHE).glob("shard-*"))


@dataclass(frozen=True)
class Rank:
    """A process of several, as far as latents are concerned; here a thread."""

    rank: int
    barrier: threading.Barrier
    size: int = 2

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def meet(self) -> None:
        self.barrier.wait(120)


def test_processes_share_the_shards_and_see_them_all(vae: VAE, tmp_path: Path, encoded: list[int]) -> None:
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as ranks:
        caches = list(ranks.map(lambda r: cached_latents(vae, split(), tmp_path, flips=False, crew=Rank(r, barrier)), range(2)))
    assert sorted(encoded) == [0, 3, 6]
    alone = cached_latents(vae, split(), tmp_path / "alone", flips=False)
    for cache in caches:
        torch.testing.assert_close(torch.stack(everything(cache)), torch.stack(everything(alone)), rtol=2**-10, atol=1e-5)
    assert json.loads((tmp_path / CACHE / MANIFEST).read_text()) == json.loads((tmp_path / "alone" / CACHE / MANIFEST).read_text())
