"""The process of a worker to which something happens: `worker.serve.serve`, wrapped from outside, since production code has no hooks."""

import ctypes
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.admission import Admission
from worker.results import JobResults
from worker.rq_worker import DiTWorker
from worker.runner import Runner
from worker.serve import serve
from worker.stores.folder import FolderStore

HANG = 0  # no signal: the device never answers
_FOREVER_S = 3600.0
_PR_SET_PDEATHSIG = 1

# The moments of a job's life at which its worker, or its API, can be struck: a method, and whether before or after it.
POINTS: dict[str, tuple[type, str, str]] = {
    "popped": (DiTWorker, "_lease", "before"),  # in the intermediate list, not leased
    "leased": (JobResults, "start_in", "after"),
    "prepared": (DiTWorker, "_admit", "after"),
    "step": (Runner, "step", "after"),  # inside Engine.tick
    "written": (FolderStore, "put", "after"),  # in a thread: a picture is in its folder, and Redis does not know
    "drawn": (DiTWorker, "_store", "before"),  # a tick's pictures are ready, and nothing of them is in Redis
    "stored": (DiTWorker, "_store", "after"),  # they are there, and so is the end of at least one job
    "committing": (JobResults, "_end", "before"),  # its pictures and its end are about to be sent
    "committed": (DiTWorker, "_finish", "before"),  # ended for us, and not yet in rq's books
    "submitting": (Admission, "submit", "before"),  # of an API
    "submitted": (Admission, "_answer", "before"),
}


@dataclass(frozen=True)
class Mishap:
    """What befalls a worker when it comes to a point: for the `call`-th time, or each time (None)."""

    point: str
    call: int | None = 1
    what: int = signal.SIGKILL  # a signal, which it sends to itself; or HANG
    class_label: int | None = None  # only in a step with a picture of this class
    order: Path | None = None  # only once this file is there

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ValueError(f"point must be one of {', '.join(POINTS)}; got {self.point!r}")

    def is_due(self, call: int, arguments: Sequence[Any]) -> bool:
        if self.class_label is not None and not any(picture.class_label == self.class_label for picture in arguments[1]):
            return False
        return self.call in (None, call) and (self.order is None or self.order.exists())

    def happen(self) -> None:
        if self.what == HANG:
            time.sleep(_FOREVER_S)
        else:
            os.kill(os.getpid(), self.what)

    def prepare(self) -> None:
        """Wrap the method, in this process."""
        owner, name, when = POINTS[self.point]
        original, calls = getattr(owner, name), itertools.count(1)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if self.point == "stored" and not arguments[2]:  # pictures alone: which of a tick's are encoded first is a race
                return original(*arguments, **options)
            due = self.is_due(next(calls), arguments)
            if due and when == "before":
                self.happen()
            answer = original(*arguments, **options)
            if due and when == "after":
                self.happen()
            return answer

        setattr(owner, name, wrapped)


def end_with_parent() -> None:
    """Nothing stays when the tests are killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(url: str, registry: Path, log: Path, mishaps: Sequence[Mishap], **settings: Any) -> None:
    """What `dit worker` does, with its log in a file. `settings`: as `serve` takes them."""
    end_with_parent()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr, force=True)
    torch.set_num_threads(1)  # many run beside each other
    for mishap in mishaps:
        mishap.prepare()
    serve(redis_url=url, registry=registry, models=None, device="cpu", max_rows=16, compile=False, **settings)
