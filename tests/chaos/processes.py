"""Processes forked from one that has imported torch: a worker so starts in a second, and the tests start dozens."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.chaos.worker"])
_one_asks = threading.Lock()  # multiprocessing can read an exit status once, and would do so in two threads


class Process:
    """A child that things may be done to, from any thread."""

    def __init__(self, target: Callable[..., None], *arguments: Any, **options: Any) -> None:
        self._process = _context.Process(target=target, args=arguments, kwargs=options, daemon=True)
        with _one_asks:
            self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status, minus the number of the signal that ended it; None while it lives."""
        with _one_asks:
            return self._process.exitcode

    @property
    def alive(self) -> bool:
        return self.status is None

    @property
    def stopped(self) -> bool:
        """Whether SIGSTOP holds it."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:  # it has just ended
            return False

    def signal(self, number: int) -> None:
        if self.alive:
            os.kill(self.pid, number)
