"""A checkpoint folder → a warm runner on this worker's device."""

import logging
from pathlib import Path

import torch
from torch._dynamo.exc import BackendCompilerFailed

from model.checkpoint import Checkpoint, load
from model.config import DiTConfig
from worker.decoder import SMALLEST_DECODE
from worker.device import FEWEST_ROWS, affordable, can_compile, use_device
from worker.runner import Runner

log = logging.getLogger("dit.worker")

MOST_ROWS = {"cpu": 64, "cuda": 256}  # of a forward, unless DIT_MAX_ROWS says otherwise
TICK_S = 2.0  # that a forward may take, where the smallest one does not take longer


class Loader:
    """Called with a folder. The first call is for a process in which nothing runs yet; later ones come from a thread beside the ticks."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        max_rows: int | None = None,
        compile: bool = True,
        reproducible: bool = False,
        block_cache: bool = False,
    ) -> None:
        if compile and not can_compile(device):
            log.warning("no C++ compiler was found, so the model runs uncompiled, more slowly")
            compile = False
        self.device, self.dtype, self.max_rows, self.compile = device, dtype, max_rows, compile
        self.reproducible, self.block_cache = reproducible, block_cache
        self._sizes: dict[DiTConfig, tuple[int, int]] = {}  # rows and decoder batch of each architecture met
        self._threads: int | None = None  # that the first runner found to be steady

    def __call__(self, folder: Path) -> Runner:
        """Raises CheckpointError or ValueError: not sound, no VAE, or too large for the device's memory."""
        log.info("loading %s on %s in %s", folder, self.device, str(self.dtype).removeprefix("torch."))
        use_device(self.device)
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # each thread has its own number
        try:
            checkpoint = self._read(folder)
            runner = self._warm(checkpoint, *self._size(checkpoint))
        except torch.OutOfMemoryError as error:
            raise ValueError(f"{folder} does not fit the device: {str(error).splitlines()[0]}") from error
        self._threads = torch.get_num_threads()
        return runner

    def _read(self, folder: Path) -> Checkpoint:
        checkpoint = load(folder, self.device)
        if checkpoint.vae is None:
            raise ValueError(f"{folder} has no VAE, so it cannot be served")
        checkpoint.dit.to(self.dtype)
        # Decoding is a small part of the work: on the CPU in float32, which spares a grey level.
        checkpoint.vae.cast(self.dtype if self.device.type == "cuda" else torch.float32)
        return checkpoint

    def _size(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Rows and images: measured once for an architecture, so that a new version of a model is not measured beside what runs."""
        shape = checkpoint.config.architecture
        if shape not in self._sizes:
            rows, images, curve = affordable(checkpoint, self.max_rows or MOST_ROWS[self.device.type], TICK_S)
            times = ", ".join(f"{size}: {1e3 * seconds:.1f} ms" for size, seconds in curve.items())
            log.info("a forward of rows, uncompiled, takes %s", times)
            self._sizes[shape] = self.max_rows or rows, images
        rows, images = self._sizes[shape]
        log.info("at most %d rows to a forward and %d images to a decode", rows, images)
        return rows, images

    def _warm(self, checkpoint: Checkpoint, max_rows: int, max_decode: int) -> Runner:
        """A compiler that fails costs speed, and a small memory the width of a batch, but not the service."""
        compile = self.compile
        while True:
            try:
                return self._runner(checkpoint, max_rows, max_decode, compile)
            except torch.OutOfMemoryError:
                if max_rows <= FEWEST_ROWS and max_decode <= SMALLEST_DECODE:
                    raise
                log.warning("out of memory with %d rows to a forward and %d images to a decode; trying half", max_rows, max_decode)
                max_rows, max_decode = max(FEWEST_ROWS, max_rows // 2), max(SMALLEST_DECODE, max_decode // 2)
            except BackendCompilerFailed as error:
                reason = str(error.inner_exception).strip().partition("\n")[0]
                log.warning("compiling failed, so the model runs uncompiled, more slowly: %s", reason)
                compile = False
            if self._threads is None:
                torch._dynamo.reset()
            torch.cuda.empty_cache()  # does nothing where there is no CUDA

    def _runner(self, checkpoint: Checkpoint, max_rows: int, max_decode: int, compile: bool) -> Runner:
        """In a function of its own, so that one that did not fit is gone before the next is made."""
        runner = Runner(
            checkpoint,
            max_rows=max_rows,
            max_decode=max_decode,
            compile=compile,
            reproducible=self.reproducible,
            block_cache=self.block_cache,
        )
        log.info("%s", "compiling and warming up (the first time takes a minute)" if compile else "warming up")
        runner.warm_up(choose_threads=self._threads is None)
        return runner
