"""The processes that train together, one a device: `torchrun` starts them and says who is who; without it there is one.

On a machine with GPUs the device's tensors travel by NCCL, else by gloo; what the hosts agree on travels by gloo in any case, so that no
device is waited for.
"""

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

_PATIENCE = timedelta(hours=12)  # others wait while the first process encodes latents; one that dies is seen by torchrun, at once


@dataclass(frozen=True)
class World:
    """This process is `rank` of `size`, and computes on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """The one process that logs, draws previews and writes results."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """The rows of a global batch that are this process'. ValueError if it cannot be shared evenly."""
        if batch_size % self.size:
            raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {self.size} processes")
        rows = batch_size // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, ReduceOp.MAX)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true for any process; all of them must ask."""
        return bool(self.largest(torch.tensor(int(flag))))

    def meet(self) -> None:
        """Wait until every process is here."""
        self.any(False)


@contextmanager
def joined() -> Iterator[World]:
    """The world of this process, by torchrun's environment. ValueError if this machine has fewer GPUs than processes."""
    size, rank, local_rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    device = _device(local_rank)
    if size == 1:
        yield World(0, 1, device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield World(rank, size, device)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # DDP must go before the group that it holds: else the group ends in DDP's destructor, which waits for the group's threads while one
        # of them may wait for the interpreter, to free a tensor.
        gc.collect()
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"there are {torch.cuda.device_count()} GPUs here: start no more processes than that")
    torch.cuda.set_device(local_rank)
    torch.set_float32_matmul_precision("high")  # TF32 for the float32 products that are left, as the public code trains
    return torch.device("cuda", local_rank)
