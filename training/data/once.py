"""What takes long is done by one process while the others wait, and is found there by every later one."""

from collections.abc import Callable
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any


def once(path: Path, make: Callable[[Path], Any]) -> None:
    """Let `make` write the file under a temporary name, unless it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        flock(lock, LOCK_EX)
        if not path.is_file():
            temporary = path.with_suffix(".tmp")
            make(temporary)
            temporary.replace(path)
