"""Which checkpoints are needed just now: by jobs that have not ended, and by workers that serve them. Redis, no torch."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from app.embedded import EmbeddedServer
from worker import protocol
from worker.connect import connect
from worker.protocol import FINAL, ModelRecord

_AT_ONCE = 1000  # records asked for in one round trip


class UsageUnknown(Exception):
    """Jobs may be pinned to any checkpoint; the message says why nobody can tell."""


@dataclass(frozen=True)
class Usage:
    """What Redis says of checkpoints at one moment."""

    jobs: dict[str, int]  # by hash: jobs that wait or run
    served: set[tuple[str, str]]  # (model, hash) of live workers

    def of(self, model: str, checkpoint: str) -> str | None:
        """Why this version must stay, or None."""
        if (model, checkpoint) in self.served:
            return "a worker serves it"
        count = self.jobs.get(checkpoint, 0)
        return f"{count} {'job waits for it or runs' if count == 1 else 'jobs wait for it or run'} on it" if count else None


def open_redis(redis_url: str | None, data: Path, password: str | None = None) -> Redis | None:
    """A client of DIT_REDIS_URL, or of the server of a `dit up` over this data folder; None where there is neither.

    Whether it answers is not asked. ValueError for a URL that is none.
    """
    embedded = EmbeddedServer(data)
    if redis_url is None and not embedded.socket.exists():
        return None
    return connect(redis_url or embedded.url, password=password, protocol=2, socket_timeout=5)


def find_usage(redis_url: str | None, data: Path, password: str | None = None) -> Usage | None:
    """None where no Redis is configured and no `dit up` has ever kept jobs in this data folder. Raises UsageUnknown."""
    try:
        client = open_redis(redis_url, data, password)
        if client is None:
            if EmbeddedServer(data).folder.exists():
                raise UsageUnknown(f"jobs may wait in {data}, whose server does not run: `dit up` starts it")
            return None
        with client:
            return Usage(checkpoints_in_use(client), checkpoints_served(client))
    except (RedisError, OSError, ValueError, TypeError, AttributeError) as error:  # the last three: a record that cannot be read
        raise UsageUnknown(f"Redis does not answer: {error}") from error


def checkpoints_in_use(redis: Redis) -> dict[str, int]:
    """Checkpoint hash → jobs pinned to it that have not ended."""
    connection: Any = redis  # its answers are bytes here, which its types do not say
    keys = list(set(connection.scan_iter(protocol.job_key("*"), count=_AT_ONCE, _type="hash")))  # a scan may tell a key twice
    found: Counter[str] = Counter()
    for start in range(0, len(keys), _AT_ONCE):
        with connection.pipeline(transaction=False) as pipeline:
            for key in keys[start : start + _AT_ONCE]:
                pipeline.hmget(key, "status", "checkpoint")
            found.update(checkpoint.decode() for status, checkpoint in pipeline.execute() if status and status.decode() not in FINAL)
    return dict(found)


def checkpoints_served(redis: Redis) -> set[tuple[str, str]]:
    """(model, checkpoint hash) of each record that a live worker keeps."""
    connection: Any = redis
    keys = list(connection.scan_iter(protocol.MODEL_KEYS, count=_AT_ONCE))
    records = [ModelRecord.parse(value) for value in connection.mget(keys) if value] if keys else []
    return {(record.id, record.checkpoint) for record in records}
