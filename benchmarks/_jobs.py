"""The books of a benchmark: every job that was accepted, and what became of it, as Redis tells it before the record expires."""

import asyncio
import re
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from worker import protocol
from worker.counts import stats_key

EVERY_S = 0.5


@dataclass
class Books:
    """`async with Books(redis, model)`: looks at the jobs that are open, twice a second."""

    redis: Redis
    model: str
    open: dict[str, float] = field(default_factory=dict)  # job → monotonic seconds of its acceptance
    ended: Counter[str] = field(default_factory=Counter)  # by status
    lost: list[str] = field(default_factory=list)  # accepted, and their record is gone before an end was seen
    attempts: Counter[int] = field(default_factory=Counter)

    async def __aenter__(self) -> "Books":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    def accept(self, job_id: str) -> None:
        self.open[job_id] = time.monotonic()

    @property
    def accepted(self) -> int:
        return len(self.open) + self.ended.total() + len(self.lost)

    async def _run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """What has ended since leaves the open ones. In a thread, since Redis may be away, on purpose."""
        ids = list(self.open)
        with suppress(RedisError, OSError):
            self._note(ids, await asyncio.to_thread(self._read, ids))

    def _read(self, ids: list[str]) -> list[Any]:
        with self.redis.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hmget(protocol.job_key(job_id), "status", "attempts")
            return pipeline.execute()

    def _note(self, ids: list[str], records: list[Any]) -> None:
        for job_id, (status, attempts) in zip(ids, records, strict=True):
            if status is None:
                self.lost.append(job_id)
            elif status.decode() in protocol.FINAL:
                self.ended[status.decode()] += 1
                self.attempts[int(attempts or 0)] += 1
            else:
                continue
            del self.open[job_id]

    async def settle(self, limit_s: float) -> None:
        """Until every job has ended, or `limit_s` has passed."""
        deadline = time.monotonic() + limit_s
        while self.open and time.monotonic() < deadline:
            await asyncio.sleep(EVERY_S)  # while the task of this looks

    def counted(self) -> dict[str, int]:
        """Ends as the service itself counted them, by status."""
        told: Any = self.redis.hgetall(stats_key(self.model))
        found: Counter[str] = Counter()
        for name, value in told.items():
            if ended := re.match(r"ended\|(\w+)\|", name.decode()):
                found[ended[1]] += int(float(value))
        return dict(found)

    def failures(self) -> list[str]:
        """What does not hold, in words: an accepted job that did not end, or that was not counted once."""
        told = [f"{len(self.lost)} jobs lost: {self.lost[:3]}"] if self.lost else []
        told += [f"{len(self.open)} jobs have not ended: {list(self.open)[:3]}"] if self.open else []
        told += [f"{self.ended['failed']} jobs failed"] if self.ended["failed"] else []
        counted = self.counted()
        return told + ([f"ends seen {dict(self.ended)}, counted {counted}"] if counted != dict(self.ended) else [])
