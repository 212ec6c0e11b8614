"""Batches on their way from the data to the device. A batch is named tensors whose first dimension is its rows."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Batch = dict[str, Tensor]
_AHEAD = 2


class Prefetch:
    """Makes the next batches in threads while the device computes. `waited_s` is the time that was lost waiting for one all the same."""

    def __init__(self, make: Callable[[int], Batch], steps: int, device: torch.device) -> None:
        self.waited_s = 0.0
        self._make, self._steps, self._device = make, steps, device
        self._coming: dict[int, Future[Batch]] = {}
        self._threads = ThreadPoolExecutor(_AHEAD, "batches")

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def take(self, step: int) -> Batch:
        """The batch of a step, on the device; raises what making it raised."""
        wanted = range(step, min(self._steps, step + 1 + _AHEAD))
        self._coming = {at: self._coming.get(at) or self._threads.submit(self._pinned, at) for at in wanted}
        began = time.perf_counter()
        batch = self._coming.pop(step).result()
        self.waited_s += time.perf_counter() - began
        return {name: value.to(self._device, non_blocking=True) for name, value in batch.items()}

    def _pinned(self, step: int) -> Batch:
        """A copy from pinned memory to a GPU does not wait for the step before."""
        batch = self._make(step)
        return {name: value.pin_memory() for name, value in batch.items()} if self._device.type == "cuda" else batch


def rows_of(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Slices of at most `size` rows, or for 0 all at once."""
    rows = rows_of(batch)
    for start in range(0, rows, size or rows):
        yield {name: value[start : start + (size or rows)] for name, value in batch.items()}
