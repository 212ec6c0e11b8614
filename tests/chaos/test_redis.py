"""Redis is killed, full, or cannot write its disk, while jobs run: workers wait for it, and nothing is lost."""

import signal
import time
from contextlib import suppress
from dataclasses import dataclass

import pytest
from redis.exceptions import ConnectionError, ResponseError

from app.problems import Problem
from tests.chaos.service import Service, Worker
from tests.chaos.tiny import picture_request
from tests.chaos.worker import Mishap
from worker import protocol
from worker.heart import RENEW_EVERY_S

LONGER_THAN_A_LEASE_S = 20.0
REQUESTS = [picture_request(seed=seed) for seed in range(3)]


@dataclass(frozen=True)
class Middle:
    """A worker that stands still with three jobs, beside one that is idle and cleans up."""

    busy: Worker
    jobs: list[str]
    alive_at: float  # monotonic; when it was last seen to run

    def go_on(self) -> set[int]:
        """→ how often each of its jobs may be started: on a machine so slow that its leases ran out meanwhile, also twice."""
        self.busy.signal(signal.SIGCONT)
        return self.attempts()

    def attempts(self) -> set[int]:
        return {1} if time.monotonic() - self.alive_at < protocol.LEASE_S - 2 * RENEW_EVERY_S else {1, 2}


def in_the_middle(service: Service, point: str, call: int) -> Middle:
    idle = service.worker()
    idle.signal(signal.SIGSTOP)
    jobs = [service.submit(request)[0] for request in REQUESTS]
    busy, alive_at = service.worker(Mishap(point, call, signal.SIGSTOP)), time.monotonic()

    def stopped() -> bool:
        nonlocal alive_at
        now = time.monotonic()
        if not busy.stopped:
            alive_at = now
            return False
        return True

    service.wait(stopped, "the middle of the batch")
    idle.signal(signal.SIGCONT)
    return Middle(busy, jobs, alive_at)


def cannot_write(service: Service) -> bool:
    """Redis acknowledges one write before it finds that it cannot keep it: this one, or the heartbeat of the idle worker."""
    with suppress(ResponseError):
        service.redis.set("chaos:last-drop", "x", ex=1)
    return service.redis.info("persistence")["aof_last_write_status"] == "err"


def attempts(service: Service, jobs: list[str]) -> list[int]:
    """Of each job, when all have ended; no worker has died of it."""
    service.settle()
    assert all(worker.alive for worker in service.workers)
    return [service.ended[job].attempts for job in jobs]


@pytest.mark.parametrize(("point", "call"), [("step", 6), ("drawn", 1), ("stored", 1), ("committing", 1)])
def test_redis_killed_and_restarted_in_the_middle_of_a_batch(service: Service, point: str, call: int) -> None:
    middle = in_the_middle(service, point, call)
    service.server.kill()
    middle.busy.signal(signal.SIGCONT)
    with pytest.raises(ConnectionError):
        service.submit(REQUESTS[0])
    time.sleep(2.0)
    service.server.start()
    expected = middle.attempts()
    service.submit(REQUESTS[0])
    assert set(attempts(service, middle.jobs)) <= expected


def test_redis_away_for_longer_than_a_lease(service: Service) -> None:
    middle = in_the_middle(service, "step", 6)
    service.server.kill()
    middle.busy.signal(signal.SIGCONT)
    time.sleep(LONGER_THAN_A_LEASE_S)
    service.server.start()
    assert set(attempts(service, middle.jobs)) <= {1, 2}  # 2 where a cleaner was quicker than the worker that came back


def test_redis_out_of_memory_keeps_its_leases_and_takes_the_pictures_later(service: Service) -> None:
    middle = in_the_middle(service, "step", 6)
    service.redis.config_set("maxmemory", 1)
    expected = middle.go_on()
    with pytest.raises(Problem, match="out of memory"):
        service.submit(REQUESTS[0])
    time.sleep(LONGER_THAN_A_LEASE_S)
    assert expected == {1, 2} or [service.record(job)["status"] for job in middle.jobs] == ["running"] * 3
    service.redis.config_set("maxmemory", 0)
    assert set(attempts(service, middle.jobs)) <= expected


@pytest.mark.parametrize("seconds", [4.0, LONGER_THAN_A_LEASE_S])
def test_redis_whose_disk_is_full(service: Service, seconds: float) -> None:
    middle = in_the_middle(service, "step", 6)
    service.server.fill_disk()
    service.wait(lambda: cannot_write(service), "the failure to write")
    expected = middle.go_on()
    with pytest.raises(Problem, match="cannot write its disk"):
        service.submit(REQUESTS[0])
    time.sleep(seconds)
    assert expected == {1, 2} or [service.record(job)["status"] for job in middle.jobs] == ["running"] * 3
    service.server.free_disk()
    assert set(attempts(service, middle.jobs)) <= {1, 2}  # 2 where a lease ran out and a cleaner was quicker
