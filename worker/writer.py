"""Pictures on their way into the image store, beside the loop: a disk or a bucket takes its time, and the steps go on.

What can go wrong there passes, or can be mended: a full disk, a network, credentials. So a write is tried again, for a bounded time, and
then its job goes back to the queue; meanwhile the worker takes no more jobs, and does not before the store has taken something again.
"""

import logging
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from worker.engine import ImageReady
from worker.leases import Lease
from worker.patience import PATIENCE_S
from worker.stores import PROBE_BYTES, ImageStore, StoreRefusal, StoreTrouble, open_to_write, picture_name, read_mark, try_to_write

log = logging.getLogger("dit.worker")

THREADS = 8
MOST_WRITING = 64  # pictures that may wait for them; more would pile up in memory
PAUSE_S = 0.2  # between two attempts


class Unwritable(Exception):
    """A store that takes other files does not take this one."""


def _done() -> "Future[None]":
    future: Future[None] = Future()
    future.set_result(None)
    return future


@dataclass(eq=False)
class Write:
    """A picture, and whether it is where it belongs."""

    lease: Lease
    image: ImageReady
    task: "Future[None]" = field(default_factory=_done)  # of one for Redis nothing is left to do: it goes there with its event

    @property
    def error(self) -> BaseException | None:
        """Why a write that has ended did not succeed: Unwritable, or StoreTrouble while the store takes nothing."""
        return self.task.exception()


class Writer:
    """For the loop's thread. `mark` is that of the store, empty while there is none, or none that answers."""

    def __init__(self, store: ImageStore | None) -> None:
        self.store, self.mark = store, ""
        self.trouble = ""  # why the store did not do what was tried last
        self._since = 0.0  # monotonic; when that began
        self.seconds = PATIENCE_S  # that a picture is tried
        self._largest = PROBE_BYTES  # of the pictures so far
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
        self._writes: list[Write] = []
        self._look: Future[None] | None = None  # whether the store does it again
        self._ended = threading.Event()

    def open(self) -> None:
        """ValueError if the store does not let itself be written. One that is away may come."""
        if self.store is None:
            return
        try:
            self.mark = open_to_write(self.store)
        except StoreRefusal as error:
            raise ValueError(f"pictures cannot be kept in {error}") from error
        except StoreTrouble as error:
            self._in_trouble(error)

    def takes(self, mark: str) -> bool:
        """Whether pictures of a job whose record says this go into this store, or into Redis."""
        return mark in ("", self.mark)

    @property
    def crowded(self) -> bool:
        return len(self._writes) >= MOST_WRITING

    def put(self, lease: Lease, image: ImageReady) -> None:
        lease.writing += 1
        if not lease.order.store:
            self._writes.append(Write(lease, image))
            return
        name = picture_name(image.job_id, lease.execution.id, image.index)
        self._largest = max(self._largest, len(image.png))
        self._writes.append(Write(lease, image, self._pool.submit(self._write, name, image.png)))

    def take(self) -> list[Write]:
        """Those that have ended since."""
        done = [write for write in self._writes if write.task.done()]
        self._writes = [write for write in self._writes if write not in done]
        for write in done:
            write.lease.writing -= 1
        return done

    def wait(self, seconds: float) -> None:
        """Until a write has ended, but not for longer."""
        wait([write.task for write in self._writes], seconds, FIRST_COMPLETED)

    def look(self) -> None:
        """In trouble: see, beside the loop, whether it is over."""
        if self.trouble and (self._look is None or self._look.done()):
            self._look = self._pool.submit(self._look_again)

    def end(self) -> None:
        """What is not written yet will not be."""
        self._ended.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # In the threads.

    def _write(self, name: str, png: bytes) -> None:
        """Raises StoreTrouble when the time is over, or Unwritable."""
        assert self.store
        since = None
        while True:
            try:
                self.store.put(name, png)
                return self._well()
            except StoreTrouble as error:
                self._in_trouble(error)
                since = since or self._since  # others may have tried for long
                if self._ended.wait(PAUSE_S):
                    raise
                if time.monotonic() >= since + self.seconds:
                    return self._write_at_last(name, png)

    def _write_at_last(self, name: str, png: bytes) -> None:
        """If the store takes another file, it is there, and so it is this one that it does not take."""
        assert self.store
        try_to_write(self.store, len(png))
        try:
            self.store.put(name, png)
        except StoreTrouble as error:
            raise Unwritable(str(error)) from error
        finally:
            self._well()

    def _look_again(self) -> None:
        assert self.store
        try:
            if not self.mark:
                self.mark = open_to_write(self.store)
            try_to_write(self.store, self._largest)
            if read_mark(self.store) != self.mark:
                raise StoreRefusal(f"{self.store.address}: this is another store than when the worker began")
            self._well()
        except StoreTrouble as error:
            self._in_trouble(error)
            self._ended.wait(PAUSE_S)

    def _in_trouble(self, error: StoreTrouble) -> None:
        if not self.trouble:
            self._since = time.monotonic()
            log.warning("image store %s; trying again for up to %g s, and no more jobs are taken meanwhile", error, self.seconds)
        self.trouble = str(error)

    def _well(self) -> None:
        if self.trouble:
            log.info("the image store does it again")
        self.trouble = ""
