"""Latents → pixels in batches of a few sizes; on CUDA beside the next ticks, on a stream of its own."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.sampling import to_pixels
from model.vae import VAE

SMALLEST_DECODE = 2  # below this the CPU's kernels give other bits
DECODE_BUCKETS = (SMALLEST_DECODE, 4, 8, 16)


class Decoding:
    """Pixels on their way to the host."""

    def __init__(self, pixels: Tensor, finite: Tensor, done: torch.cuda.Event | None) -> None:
        self._pixels, self._finite, self._done = pixels, finite, done

    def ready(self) -> bool:
        return self._done is None or self._done.query()

    def result(self) -> list[np.ndarray | None]:
        """uint8 pixels (H, W, channels) of each picture; None for one whose latent is not finite. Waits until it is ready."""
        if self._done:
            self._done.synchronize()
        pixels = self._pixels.numpy()
        return [pixels[i] if finite else None for i, finite in enumerate(self._finite.tolist())]


class Decoder:
    """The VAE's decoder, padded to `buckets` of images."""

    def __init__(self, vae: VAE, most: int, device: torch.device) -> None:
        """`most`: images of one batch, about."""
        vae.autoencoder.to(memory_format=torch.channels_last)
        self.vae, self.device = vae, device
        self.buckets = [b for b in DECODE_BUCKETS if b <= max(SMALLEST_DECODE, most)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pixels(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → uint8 (B, H, W, channels)."""
        return self._draw(latents)[0]

    def _draw(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and which pictures are finite (B,): a decoder of half precision may overflow on latents that are."""
        images = self.vae.decode(latents)
        return to_pixels(images), images.flatten(1).isfinite().all(1) & latents.flatten(1).isfinite().all(1)

    def halve(self) -> bool:
        """Half the images of a batch from now on, after the device ran out of memory; False if there are no fewer."""
        if len(self.buckets) == 1:
            return False
        self.buckets = self.buckets[:-1]
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
        return True

    def start(self, latents: Tensor) -> Decoding:
        """At most the largest bucket of latents; nobody else may write to them."""
        count = len(latents)
        bucket = bucket_of(self.buckets, count)
        padded = torch.cat([latents, latents[:1].expand(bucket - count, *latents.shape[1:])])
        if self._stream is None:
            pixels, finite = self._draw(padded)
            return Decoding(pixels[:count], finite[:count], None)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            padded.record_stream(self._stream)
            drawn, finite = self._draw(padded)
            pixels, finite = _to_host(drawn[:count]), _to_host(finite[:count])
            done = torch.cuda.Event()
            done.record()
        return Decoding(pixels, finite, done)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, under way."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def bucket_of(buckets: Sequence[int], count: int) -> int:
    """The smallest that holds them."""
    return next(b for b in buckets if b >= count)
