"""The folder of a run, which `dit runs`, the trainer and TensorBoard read while it grows:

    log.jsonl            one JSON object a line, flushed; see below
    samples-NNNNNN.png   previews after that many steps, always of the same seeds
    state/NNNNNNNN/      the saved state after that many steps, one at rest (training/state.py)
    tensorboard/         event files: every number of the step lines, and the previews; unless switched off
    checkpoint/          what a finished DiT run made; a VAE run leaves vae.safetensors and vae.json instead

Lines of log.jsonl. A step is counted when it is done: `step` 10 is the tenth. Times are Unix seconds.

    {"event": "start", "time", "stage": "vae" or "dit", "steps", "batch_size", "parameters", "processes", "resumed_at", "optimiser",
     "execution", "command", "commit", "hardware", "torch", "pid"}             one for each start; `resumed_at` 0 for a new run
    {"step", "time", "loss", …, "gradient_norm", "learning_rate", "images_per_s", "data_wait", "eta_s"}   every tenth step, and the last
    {"event": "rollback", "step", "to", "reason"}   `step` was not finite: its update is left out, and the weights are those of step `to`
    {"event": "interrupted", "step"}                stopped by Ctrl-C or SIGTERM, saved
    {"event": "end", "step", "seconds"}             all steps are done; `seconds` of all starts together

`data_wait` is the share of the time since the line before that was spent waiting for data. Steps after `resumed_at`, or after `to`, may
appear a second time: the later line counts. A run whose last line is none of the last two runs, or was killed.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG = "log.jsonl"


def hardware() -> str:
    """The device that trains, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{torch.get_num_threads()} CPU cores ({model})"


def commit() -> str | None:
    """The commit of the source tree, if it is a git checkout; `-dirty` if it has changes besides."""
    try:
        root = Path(__file__).parent
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command() -> str:
    return " ".join(["dit", *sys.argv[1:]])


class RunLog:
    """Appends to `log.jsonl`; each line is flushed, so that a killed run keeps what it logged. A `quiet` one writes nothing."""

    def __init__(self, folder: Path, *, tensorboard: bool, quiet: bool = False) -> None:
        self._folder, self._quiet = folder, quiet
        if quiet:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(folder / LOG)
        self._file = (folder / LOG).open("a", encoding="utf-8")
        self._board = _board(folder / "tensorboard") if tensorboard else None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._quiet:
            self._file.close()
            if self._board:
                self._board.close()

    def say(self, message: str) -> None:
        """To the person at the terminal, above the live line."""
        if not self._quiet:
            tqdm.write(f"dit: {message}", file=sys.stderr)

    def start(self, **facts: Any) -> None:
        self.write(
            event="start",
            time=time.time(),
            **facts,
            command=command(),
            commit=commit(),
            hardware=hardware(),
            torch=torch.__version__,
            pid=os.getpid(),
        )

    def step(self, step: int, values: dict[str, float]) -> None:
        self.write(step=step, time=round(time.time(), 3), **values)
        if not self._quiet and self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def picture(self, step: int, picture: Image.Image) -> None:
        if self._quiet:
            return
        picture.save(self._folder / f"samples-{step:06d}.png")
        if self._board:
            self._board.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def write(self, **record: Any) -> None:
        if not self._quiet:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()


def _drop_torn_line(path: Path) -> None:
    """A process that was killed may have left a part of a line, to which the next must not be appended."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _board(folder: Path) -> "SummaryWriter | None":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the training extra brings it; a run needs it for nothing else
        return None
    return SummaryWriter(str(folder))
