"""Who watches a job: an open event stream, or a request that waits for the end of its job. Each holds a connection to Redis.

So there are bounds, under which every other call finds a connection, and every key a place.
"""

import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from app.problems import Problem

MOST = 1000  # in one process
_OTHER_FILES = 200  # that a process opens besides: connections of other calls, libraries, the log


class Watchers:
    """Those of this process."""

    def __init__(self) -> None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = MOST if files == resource.RLIM_INFINITY else max(1, min(MOST, (files - _OTHER_FILES) // 2))
        self._by_owner: Counter[str] = Counter()

    def refusal(self, owner: str) -> Problem | None:
        """Why this owner finds no place now. One key may have as many as are left after it: there is always one for another key."""
        free = self.most - self._by_owner.total()
        if free <= 0:
            detail = f"{self.most} event streams are open or requests wait here, and no more may; ask for the job itself meanwhile"
            return Problem(503, detail, kind="streams-full", retry_after_s=5)
        if owner and self._by_owner[owner] >= free:
            detail = (
                f"key {owner} has {self._by_owner[owner]} event streams open or requests waiting here, and {free} places are left for all"
            )
            return Problem(429, detail, kind="too-many-streams", retry_after_s=5)
        return None

    @contextmanager
    def place(self, owner: str) -> Iterator[None]:
        """One of them, for as long as the block runs. Problem where there is none."""
        if problem := self.refusal(owner):
            raise problem
        self._by_owner[owner] += 1
        try:
            yield
        finally:
            self._by_owner[owner] -= 1
            if not self._by_owner[owner]:
                del self._by_owner[owner]
