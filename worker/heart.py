"""A thread beside the loop that keeps the worker's promises (leases, heartbeat, the models' records) while a long step runs.

It stops keeping them when steps stop: a device that hangs ends the process, so that its supervisor starts another.
"""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from worker.engine import Engine

log = logging.getLogger("dit.worker")

RENEW_EVERY_S = 2.0
HUNG = 70  # exit status (sysexits.h: an internal software error)
_LEAST_HANG_S = 20.0
_SLOWEST_TICKS = 10  # that a step may take before it is called hung


def end_hung_process() -> None:
    """Without any of Python's farewells, which would wait for the step that hangs."""
    os._exit(HUNG)


class Heart(threading.Thread):
    """Calls `renew` every RENEW_EVERY_S, from `start()` until `end()` or until a step has taken longer than `hang_s`."""

    def __init__(self, engine: Engine, renew: Callable[[], None], hang_s: float | None, on_hang: Callable[[], None]) -> None:
        super().__init__(name="heart", daemon=True)
        self._engine, self._renew, self._hang_s, self._on_hang = engine, renew, hang_s, on_hang
        self._ended = threading.Event()
        self._last = time.monotonic()
        self._tick: float | None = None  # the step that was in progress at the last beat
        self._stood_s = 0.0  # how long it has been in progress
        self._failing = False

    def run(self) -> None:
        while not self._ended.wait(RENEW_EVERY_S):
            if self._hangs():
                log.critical("a step has taken more than %.0f s; the process ends. What it does:", self.limit_s)
                faulthandler.dump_traceback(file=2, all_threads=True)  # standard error, whatever sys.stderr is
                self._on_hang()
                return
            self.beat()

    def beat(self) -> None:
        """Once; where Redis is in trouble, or whatever else it is, the next beat tries again: without a heart, all jobs would run twice."""
        try:
            self._renew()
            self._failing = False
        except Exception as error:
            if not self._failing:
                log.warning("leases cannot be renewed: %s", error, exc_info=not isinstance(error, RedisError))
            self._failing = True

    def end(self) -> None:
        """No beat comes after this, so that nothing is written again of a worker that has signed off."""
        self._ended.set()
        if self.is_alive():
            self.join()

    @property
    def limit_s(self) -> float:
        return self._hang_s or max(_LEAST_HANG_S, _SLOWEST_TICKS * self._engine.slowest_tick_s)

    def _hangs(self) -> bool:
        """Only time that this thread was awake counts: a process that was stopped for a minute is late, not hung."""
        now, tick = time.monotonic(), self._engine.ticking_since
        awake_s, self._last = min(now - self._last, 2 * RENEW_EVERY_S), now
        self._stood_s = self._stood_s + awake_s if tick is not None and tick == self._tick else 0.0
        self._tick = tick
        return self._stood_s > self.limit_s
