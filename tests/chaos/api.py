"""The process of an API, as far as it matters here: it submits jobs until it is killed."""

import asyncio
import time

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.jobs import CONNECTION, JobStore
from tests.chaos.tiny import picture_request
from tests.chaos.worker import Mishap, end_with_parent

SEEDS = 4  # different requests
MOST = 50  # jobs, however late the kill comes


def run(url: str, checkpoint: str, result_ttl_s: int, mishap: Mishap | None) -> None:
    """One job after the other, until it is killed."""
    end_with_parent()
    if mishap:
        mishap.prepare()
    asyncio.run(_submit(url, checkpoint, result_ttl_s))


async def _submit(url: str, checkpoint: str, result_ttl_s: int) -> None:
    store = JobStore(
        Redis.from_url(url, **CONNECTION), AsyncRedis.from_url(url, **CONNECTION), queue_limit=10_000, result_ttl_s=result_ttl_s
    )
    for number in range(MOST):
        await store.submit(picture_request(steps=4, seed=number % SEEDS), checkpoint)
    time.sleep(3600)
