"""The saved state of a run, `state/NNNNNNNN/` by its step: written under another name, fsynced and renamed, and only then is the one
before it removed. Tensors are written by torch.distributed.checkpoint, each process its part, and are read by any number of processes.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from training.world import World

STATE, FACTS = "state", "run.json"


def newest(folder: Path) -> Path | None:
    """The last complete state of a run's folder."""
    return max((path for path in (folder / STATE).glob("*") if path.name.isdigit()), default=None)


def facts(state: Path) -> dict[str, Any]:
    return json.loads((state / FACTS).read_text())


def read(state: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Read the state into `tensors`, in place, whatever number of processes wrote it."""
    with _alone(world):
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(state), no_dist=world.size == 1)


def write(folder: Path, tensors: dict[str, Tensor], told: dict[str, Any], world: World) -> None:
    """Write a state, of which `told["step"]` is the name; then remove those before it."""
    target = folder / STATE / f"{told['step']:08d}"
    if target.exists():
        return
    temporary = target.with_suffix(".tmp")
    if world.first:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    world.meet()
    with _alone(world):
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), no_dist=world.size == 1)
    if world.first:
        _complete(temporary, target, told)
    world.meet()


def _complete(temporary: Path, target: Path, told: dict[str, Any]) -> None:
    with (temporary / FACTS).open("w") as file:
        json.dump(told, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(temporary)
    temporary.rename(target)
    _sync(target.parent)  # the rename itself
    for other in target.parent.iterdir():
        if other != target:
            shutil.rmtree(other)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _alone(world: World) -> Iterator[None]:
    """torch warns a single process that it is one."""
    with warnings.catch_warnings():
        if world.size == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
