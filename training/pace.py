"""How fast a run goes, and how long it will take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Counts steps and time, of which previews and saves are set aside."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._began = self._since = time.perf_counter()
        self._steps = self._all_steps = 0
        self._waited_s = 0.0

    def step(self) -> None:
        self._steps += 1
        self._all_steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count into images/s."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def read(self, steps_left: int, waited_s: float) -> dict[str, float]:
        """images/s and the share of the time spent waiting for data since the last reading, and the seconds left, pauses included.

        `waited_s` is what was waited for data in all.
        """
        elapsed = time.perf_counter() - self._since
        told = {
            "images_per_s": round(self._batch_size * self._steps / elapsed, 1),
            "data_wait": round((waited_s - self._waited_s) / elapsed, 4),
            "eta_s": round(self.seconds() / self._all_steps * steps_left, 1),
        }
        self._since, self._steps, self._waited_s = time.perf_counter(), 0, waited_s
        return told
