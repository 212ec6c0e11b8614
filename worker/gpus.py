"""Several workers on one machine share its GPUs out: each takes one that no other has, by a lock that the kernel frees however it ends.

It happens before CUDA starts, so that a worker sees its own GPU only. The containers of `docker compose up --scale worker=N` all see every
GPU, and the folder of the locks is a volume that they have in common.
"""

import fcntl
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

log = logging.getLogger("dit.worker")

_held: list[IO[str]] = []  # a lock lasts as long as its file is open: until this process ends


def visible_gpus(devices: Path = Path("/dev")) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or the numbers of the NVIDIA devices that are here."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    return [str(number) for number in range(sum(path.name[6:].isdigit() for path in devices.glob("nvidia[0-9]*")))]


def take_one(gpus: Sequence[str], folder: Path) -> str | None:
    """The first that no other process has taken in this folder; None if there is nothing to choose, or none is left."""
    if len(gpus) < 2:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    for gpu in gpus:
        file = (folder / f"{gpu.replace('/', '-')}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        _held.append(file)
        return gpu
    log.warning("each of the %d GPUs has a worker already; this one shares the first, and both are slower for it", len(gpus))
    return None


def see_only_ones_own(data: Path) -> None:
    """From here on CUDA shows this process the GPU it has taken, as cuda:0. Before torch is imported."""
    gpu = take_one(visible_gpus(), data / "gpus")
    if gpu is not None:
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # every worker shall count alike
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        log.info("taking GPU %s", gpu)
