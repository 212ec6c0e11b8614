"""Where a job's pictures are read from: Redis, or the image store that its record names."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from app.problems import Problem
from worker import protocol
from worker.stores import ImageStore, StoreRefusal, StoreTrouble, picture_name, read_mark

log = logging.getLogger("dit.api")

READERS = 32  # threads: a store that is slow keeps nobody else waiting
STORE_S = 15.0  # that a request waits for the store
T = TypeVar("T")


class Pictures:
    """For one event loop. What a store does not do is 503."""

    def __init__(self, redis: Any, store: ImageStore | None) -> None:
        self._redis, self._store = redis, store
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="store")
        self._mark = ""  # of the store, once it was read

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def bytes_key(self) -> str:
        """Of what is reserved for pictures."""
        return protocol.kept_bytes_key(self._mark) if self._store else protocol.BYTES_KEY

    async def mark(self) -> str:
        """By which the record of a new job names the store; empty for Redis."""
        if self._store and not self._mark:
            await self.check()
        return self._mark

    async def check(self) -> None:
        """503 unless a picture could be read that was there."""
        if self._store is None:
            return
        found = await self._ask(read_mark, self._store)
        if found is None:
            log.warning("%s", unopened(self._store))
            raise away("no worker has opened the image store that this server reads; is it the workers'?")
        self._mark = self._mark or found
        if found != self._mark:
            log.error("image store %s is another one than before (%s, not %s)", self._store.address, found, self._mark)
            raise away("the image store is another one than before")

    async def read(self, job_id: str, record: Mapping[bytes, bytes], indexes: Sequence[int]) -> list[bytes | None]:
        """PNGs of the execution that the record names; None for each that is not there."""
        execution, wanted = (record.get(field, b"").decode(errors="replace") for field in (b"execution", b"store"))
        if not execution:
            return [None] * len(indexes)
        if not wanted:
            return list(await self._redis.mget([protocol.image_key(job_id, execution, index) for index in indexes]))
        if self._store is None or wanted != await self.mark():
            log.error("pictures of job %s are in image store %s, which this server does not read", job_id, wanted, extra={"job_id": job_id})
            detail = f"the pictures of job {job_id} are in an image store that this server does not read; whoever runs it has to mend that"
            raise Problem(503, detail, kind="other-store", retry_after_s=60)
        try:
            names = [picture_name(job_id, execution, index) for index in indexes]
        except ValueError as error:
            log.error("job %s: %s", job_id, error, extra={"job_id": job_id})
            raise Problem(500, f"the record of job {job_id} is damaged; the server's log says how") from error
        return list(await asyncio.gather(*(self._ask(self._store.get, name) for name in names)))

    async def _ask(self, work: Callable[..., T], *arguments: Any) -> T:
        try:
            async with asyncio.timeout(STORE_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        except StoreTrouble as error:
            log.warning("image store %s", error)
        except TimeoutError:
            log.warning("the image store has not answered for %g s", STORE_S)
        raise away("the image store does not answer; try again shortly")


def away(detail: str) -> Problem:
    return Problem(503, detail, kind="store-away", retry_after_s=5)


def unopened(store: ImageStore) -> str:
    return f"image store {store.address}: no worker has opened it yet; if one runs, its DIT_IMAGE_STORE is another"


def open_to_read(store: ImageStore | None) -> None:
    """At the start. ValueError if it does not let itself be read; one that is away may come."""
    if store is None:
        return
    try:
        if read_mark(store) is None:
            log.warning("%s", unopened(store))
    except StoreRefusal as error:
        raise ValueError(f"pictures cannot be read from {error}") from error
    except StoreTrouble as error:
        log.warning("image store %s; it may come", error)
