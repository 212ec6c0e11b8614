"""Redis away, restarting, out of memory or unable to write its disk: a call waits and is sent again, for a bounded time.

It stands at redis-py's own seam for this, so it covers rq's commands too. A command may so be sent twice, after an answer that was lost.
Ours are harmless then (worker/scripts.py). rq's set fields and members, remove them, or count a worker's ended jobs: perhaps one too many.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

log = logging.getLogger("dit.worker")

PATIENCE_S = 60.0
_PAUSE_S = 0.2
_QUICK_TIMEOUT_S = 5.0
_PASSING = ("MISCONF", "OOM command", "READONLY", "NOREPLICAS")

T = TypeVar("T")


def is_trouble(error: Exception) -> bool:
    """Whether the server may do tomorrow what it refused today; BusyLoadingError is a ConnectionError."""
    if isinstance(error, AuthenticationError | AuthorizationError):
        return False
    if isinstance(error, ConnectionError | TimeoutError | OSError | OutOfMemoryError | ReadOnlyError):
        return True
    text = str(error)[:500]  # what has no error class of its own, or is the reason why a transaction was discarded
    return isinstance(error, ResponseError) and any(reason in text for reason in _PASSING)


class Patience(Retry):
    """One for all connections of a worker: a call that fails for a passing reason is sent again until `seconds` are over."""

    def __init__(self, seconds: float = PATIENCE_S) -> None:
        super().__init__(NoBackoff(), -1)
        self.seconds = seconds
        self.until = math.inf  # monotonic; a worker that is ending has less time
        self._thread = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Patience":
        return self  # each new connection would copy it

    @contextmanager
    def none(self) -> Iterator[None]:
        """Inside, a call of this thread is tried once: for what can as well be done later."""
        before, self._thread.hurried = getattr(self._thread, "hurried", False), True
        try:
            yield
        finally:
            self._thread.hurried = before

    def call_with_retry(
        self,
        do: Callable[[], T],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        """redis-py's seam. It connects again inside a call, with another call of this, which leaves the waiting to the outer one."""
        if getattr(self._thread, "inside", False):
            return do()
        self._thread.inside = True
        try:
            return self._try(do, fail, with_failure_count)
        finally:
            self._thread.inside = False

    def _try(self, do: Callable[[], T], fail: Callable[..., Any], with_failure_count: bool) -> T:
        failures, give_up_at = 0, 0.0
        while True:
            try:
                return do()
            except (RedisError, OSError) as error:
                if not is_trouble(error):
                    raise
                if failures == 0:
                    give_up_at = time.monotonic() + self.seconds
                failures += 1
                trouble = error
                try:
                    fail(*((error, failures) if with_failure_count else (error,)))
                except (RedisError, OSError) as again:  # a subscription connects again in here, to a server that may still be away
                    if not is_trouble(again):
                        raise
                    trouble = again
                if getattr(self._thread, "hurried", False) or time.monotonic() >= min(give_up_at, self.until):
                    raise trouble from None
                if failures == 1:
                    log.warning("Redis: %s; trying again for up to %g s", trouble, self.seconds)
                time.sleep(_PAUSE_S)


def impatient_client(connection: Redis) -> Redis:
    """A second client of the same server, whose calls are tried once, and soon given up."""
    pool = connection.connection_pool
    options = {**pool.connection_kwargs, "retry": Retry(NoBackoff(), 0), "socket_timeout": _QUICK_TIMEOUT_S}
    return Redis(connection_pool=ConnectionPool(connection_class=pool.connection_class, **options))
