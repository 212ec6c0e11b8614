"""Ctrl-C and SIGTERM stop a run between two steps, with its state saved."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_LAUNCHED = "TORCHELASTIC_RUN_ID"  # set by torchrun


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state was saved, the run can go on with --resume."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a flag that is read between steps; a second one ends the process at once.

    Not under torchrun: there Ctrl-C reaches a process from the terminal and from torchrun, which itself kills who stays for 30 s.
    """
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if _LAUNCHED not in os.environ:
            signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
