"""What has expired leaves the image store: a thread beside the loop, in every worker; a key in Redis says whose turn it is.

Two sweeps. Of each job whose pictures may be there Redis has an entry; when the job's record has expired its pictures are deleted, and
then their bytes are given back, so that a store that cannot be emptied is not filled further. Besides, the store itself is walked for what
no entry tells of: pictures of a worker that came back after their job had expired, or all, where Redis has lost its data.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from worker import protocol, scripts
from worker.patience import impatient_client
from worker.stores import ImageStore, StoreTrouble, job_folder, jobs_before

log = logging.getLogger("dit.worker")

EXPIRED_EVERY_S, STRAYS_EVERY_S = 5, 600
_FAREWELL_S = 2.0
AT_ONCE = 100  # jobs that Redis is asked for
THREADS = 8  # that delete
STRAYS_AT_ONCE = 1000  # jobs that are looked at in one turn


class Sweeper(threading.Thread):
    """From `start()` until `end()`."""

    def __init__(self, store: ImageStore, mark: Callable[[], str], connection: Redis, worker: str, result_ttl_s: int) -> None:
        """`mark`: the store's, empty while it is not known."""
        super().__init__(name="sweeper", daemon=True)
        self._store, self._mark, self._worker, self._result_ttl_s = store, mark, worker, result_ttl_s
        self._redis: Any = impatient_client(connection)
        self._expired, self._deleted = self._redis.register_script(scripts.EXPIRED), self._redis.register_script(scripts.DELETED)
        self._ended = threading.Event()
        self._walked = ""  # the job that was looked at last
        self._failing = False

    def run(self) -> None:
        while not self._ended.wait(EXPIRED_EVERY_S):
            try:
                self.sweep()
                self._failing = False
            except (RedisError, OSError, StoreTrouble) as error:
                if not self._failing:
                    log.warning("what has expired stays in the image store for now: %s", error)
                self._failing = True

    def end(self) -> None:
        """A file that is being deleted gets a moment."""
        self._ended.set()
        if self.is_alive():
            self.join(_FAREWELL_S)

    def sweep(self) -> None:
        """What it is this worker's turn to do. Raises RedisError or StoreTrouble."""
        mark = self._mark()
        if mark and self._is_its_turn(mark, "expired", EXPIRED_EVERY_S):
            self._delete_expired(mark)
        if mark and self._is_its_turn(mark, "strays", STRAYS_EVERY_S):
            self._delete_strays()

    def _is_its_turn(self, mark: str, what: str, every_s: int) -> bool:
        """Twice at the same time is harmless: files are deleted by name, and bytes given back once."""
        return bool(self._redis.set(protocol.sweep_key(mark, what), self._worker, nx=True, ex=every_s))

    def _delete_expired(self, mark: str) -> None:
        until = time.monotonic() + EXPIRED_EVERY_S
        with ThreadPoolExecutor(THREADS, thread_name_prefix="sweeper") as pool:
            while not self._ended.is_set() and time.monotonic() < until:
                entries = self._expired([protocol.kept_key(mark)], [AT_ONCE])
                list(pool.map(partial(self._remove, mark), entries))  # the first that raises ends the turn
                if len(entries) < AT_ONCE:
                    return

    def _remove(self, mark: str, entry: bytes) -> None:
        self._store.remove(job_folder(entry.decode().partition("|")[0]))
        self._deleted([protocol.kept_key(mark), protocol.kept_bytes_key(mark)], [entry])

    def _delete_strays(self) -> None:
        """Older than any result lives, and of no job that Redis knows. The next turn goes on where this one ends."""
        old = time.time() - self._result_ttl_s
        jobs = (job for job in jobs_before(self._store, old) if job > self._walked)
        looked_at = list(islice(jobs, STRAYS_AT_ONCE))
        self._walked = looked_at[-1] if len(looked_at) == STRAYS_AT_ONCE else ""
        for job in looked_at:
            if self._ended.is_set():
                return
            if not self._redis.exists(protocol.job_key(job)) and self._store.newest(job_folder(job)) <= old:
                log.info("pictures of job %s, which nobody knows any more, are deleted", job)
                self._store.remove(job_folder(job))
