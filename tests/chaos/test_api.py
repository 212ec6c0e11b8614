"""An API that is killed while it submits: no place in the queue is lost, and no key points to nothing."""

import random
import signal
import time

import pytest

from app.jobs import JobStore
from app.problems import Problem
from tests.chaos import api
from tests.chaos.processes import Process
from tests.chaos.service import RESULT_TTL_S, Service
from tests.chaos.tiny import picture_request
from tests.chaos.worker import Mishap
from worker.protocol import GenerationRequest

KILLS = 24
WITHIN_S = 10.0  # that anything half done may be there


def ids(service: Service, pattern: str) -> set[str]:
    """Of the keys <prefix>:<id>, but not of those below them."""
    prefix = pattern.rstrip("*")
    found = {key.decode().removeprefix(prefix) for key in service.redis.scan_iter(pattern, count=1000)}
    return {name for name in found if ":" not in name}


def submit_until_killed(service: Service, mishap: Mishap | None, moment: random.Random) -> None:
    """An API that submits as fast as it can; SIGKILL comes out of the blue, or at a point of its own."""
    before = len(service.waiting())
    process = Process(api.run, service.server.url, service.checkpoint, RESULT_TTL_S, mishap)
    service.wait(lambda: not process.alive or len(service.waiting()) > before, "a first job")
    if mishap is None:
        time.sleep(moment.uniform(0, 0.02))
        process.signal(signal.SIGKILL)
    service.wait(lambda: process.status == -signal.SIGKILL, "the API's death")


def test_an_api_killed_at_any_moment_of_a_submission_leaves_whole_jobs_only(service: Service) -> None:
    moment = random.Random(0)
    for kill in range(KILLS):
        mishap = (None, Mishap("submitting", 1 + kill % 5), Mishap("submitted", 1 + kill % 5))[kill % 3]
        submit_until_killed(service, mishap, moment)

    def whole() -> bool:
        waiting = service.waiting()
        return len(waiting) == len(set(waiting)) and ids(service, "dit:job:*") == ids(service, "rq:job:*") == set(waiting)

    service.wait(whole, "a record, an rq job and a place for every job", timeout_s=WITHIN_S)
    service.accepted = {job: GenerationRequest.parse(service.record(job)["request"]) for job in service.waiting()}
    fill(service, 5)
    service.worker()
    service.settle()
    assert {(ended.status, ended.attempts) for ended in service.ended.values()} == {("succeeded", 1)}


def fill(service: Service, places: int) -> None:
    """So many are free under a bound of so many more than wait: none has leaked."""
    limit = len(service.waiting()) + places

    async def work(store: JobStore) -> None:
        for _ in range(places):
            service.accepted[await store.submit(picture_request(steps=4), service.checkpoint)] = picture_request(steps=4)
        with pytest.raises(Problem) as refused:
            await store.submit(picture_request(steps=4), service.checkpoint)
        assert refused.value.status == 429

    service.with_store(work, queue_limit=limit)
    assert len(service.waiting()) == limit
