"""Latents → pixels: in batches of a few sizes, padded, and whatever is not finite gives no picture."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint
from model.sampling import to_pixels
from worker.decoder import Decoder, Decoding, bucket_of

CPU = torch.device("cpu")


@pytest.fixture
def decoder(build_checkpoint: Callable[..., Checkpoint]) -> Decoder:
    return Decoder(build_checkpoint(image_channels=3).vae, 16, CPU)


def latents(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_every_number_of_latents_gives_the_pixels_of_the_vae(decoder: Decoder, count: int) -> None:
    decoding = decoder.start(latents(16)[:count])
    assert decoding.ready()
    found = decoding.result()
    assert len(found) == count and all(pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8 for pixels in found)
    theirs = to_pixels(decoder.vae.decode(latents(16))).numpy()[:count]
    assert np.abs(np.stack(found).astype(int) - theirs).max() <= 1 and theirs.std() > 1


@torch.inference_mode()
def test_a_picture_is_the_same_in_every_batch(decoder: Decoder) -> None:
    alone = [decoder.start(latents(16)[i : i + 1]).result()[0] for i in range(16)]
    for size in (2, 3, 4, 7, 16):
        parts = [decoder.start(part).result() for part in latents(16).split(size)]
        assert np.array_equal(np.stack(alone), np.concatenate(parts))


@torch.inference_mode()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_gives_no_picture_and_spoils_no_other(decoder: Decoder, value: float) -> None:
    clean, z = decoder.start(latents(4)).result(), latents(4)
    z[1, 2, 3, 4] = value
    found = decoder.start(z).result()
    assert found[1] is None and all(np.array_equal(found[i], clean[i]) for i in (0, 2, 3))


@torch.inference_mode()
def test_a_decoder_that_overflows_gives_no_picture_and_spoils_no_other(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, original = decoder.start(latents(4)).result(), decoder.vae.decode

    def overflow(z: torch.Tensor) -> torch.Tensor:
        images = original(z)
        images[2, 0, 0, 0] = float("inf")
        return images

    monkeypatch.setattr(decoder.vae, "decode", overflow)
    found = decoder.start(latents(4)).result()
    assert found[2] is None and all(np.array_equal(found[i], clean[i]) for i in (0, 1, 3))


@pytest.mark.parametrize(("most", "buckets"), [(1, [2]), (2, [2]), (5, [2, 4]), (8, [2, 4, 8]), (500, [2, 4, 8, 16])])
def test_batches_are_of_a_few_sizes_and_never_of_one(build_checkpoint: Callable[..., Checkpoint], most: int, buckets: list[int]) -> None:
    assert Decoder(build_checkpoint().vae, most, CPU).buckets == buckets


def test_the_batch_is_halved_down_to_the_smallest(decoder: Decoder) -> None:
    assert [decoder.halve() for _ in range(4)] == [True, True, True, False] and decoder.buckets == [2]


def test_a_bucket_is_the_smallest_that_holds_them() -> None:
    assert [bucket_of([4, 8, 16], count) for count in (1, 4, 5, 9, 16)] == [4, 4, 8, 16, 16]


class Waiting:
    """A CUDA event, seen from the host."""

    def __init__(self) -> None:
        self.queried, self.waited = False, False

    def query(self) -> bool:
        return self.queried

    def synchronize(self) -> None:
        self.waited = True


def test_a_decoding_under_way_is_not_ready_and_its_result_waits() -> None:
    event = Waiting()
    decoding = Decoding(torch.zeros(1, 2, 2, 1, dtype=torch.uint8), torch.tensor([True]), event)  # type: ignore[arg-type]
    assert not decoding.ready()
    event.queried = True
    assert decoding.ready() and not event.waited
    assert decoding.result()[0].shape == (2, 2, 1) and event.waited
