"""The log of a run: one JSON object a line, the first saying what was run and where."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


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
    """Appends to `log.jsonl`; each line is flushed, so that a killed run keeps what it logged."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "log.jsonl").open("a", encoding="utf-8")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def start(self, **facts: Any) -> None:
        self.write(
            event="start",
            command=command(),
            commit=commit(),
            hardware=hardware(),
            torch=torch.__version__,
            pid=os.getpid(),
            time=time.time(),
            **facts,
        )

    def write(self, **record: Any) -> None:
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()
