"""SIGSTOP past the lease, then SIGCONT: a worker that comes back finds its jobs done by another, and changes nothing."""

import signal

import pytest

from tests.chaos.service import Service, Worker
from tests.chaos.tiny import picture_request
from tests.chaos.worker import Mishap
from worker import protocol

# The second has more pictures than a forward has rows, so that some of them are in Redis while others are drawn.
CAT, DOGS = picture_request(0), picture_request(1, seed=30, num_images=10)


def freeze(service: Service, point: str, call: int, attempts: tuple[int, int]) -> tuple[Worker, list[str]]:
    """A worker that stands still at this point, with jobs; another one has taken them over and ended them."""
    other = service.worker()
    other.signal(signal.SIGSTOP)
    jobs = [service.submit(request)[0] for request in (CAT, DOGS)]
    frozen = service.worker(Mishap(point, call, signal.SIGSTOP))
    service.wait(lambda: frozen.stopped, "the freeze")
    other.signal(signal.SIGCONT)
    service.runs_again(jobs[attempts.index(2)])
    service.settle()
    assert tuple(service.ended[job].attempts for job in jobs) == attempts
    return frozen, jobs


# The point, which of the worker's visits there, and how often each of two jobs is started in all.
POPPED, LEASED, STEP = ("popped", 2, (2, 1)), ("leased", 2, (2, 2)), ("step", 6, (2, 2))
DRAWN, STORED, COMMITTING = ("drawn", 1, (2, 2)), ("stored", 1, (1, 2)), ("committing", 1, (2, 2))


@pytest.mark.parametrize(("point", "call", "attempts"), [POPPED, LEASED, STEP, DRAWN, STORED, COMMITTING])
def test_a_worker_frozen_past_its_lease_overwrites_nothing(service: Service, point: str, call: int, attempts: tuple[int, int]) -> None:
    frozen, _ = freeze(service, point, call, attempts)
    frozen.signal(signal.SIGCONT)
    service.stop(frozen)  # it gets time to end the jobs that it believes to have
    assert "another execution's now" in frozen.log.read_text()


@pytest.mark.parametrize(("point", "call", "attempts"), [POPPED, LEASED, STEP, COMMITTING])
def test_a_worker_frozen_until_its_jobs_have_expired_brings_no_key_back(
    service: Service, point: str, call: int, attempts: tuple[int, int]
) -> None:
    frozen, jobs = freeze(service, point, call, attempts)
    keys = [key for job in jobs for key in (protocol.job_key(job), protocol.events_key(job), f"rq:job:{job}")]
    service.wait(lambda: service.redis.exists(*keys) == 0, "the end of what was known of the jobs")
    frozen.signal(signal.SIGCONT)
    service.stop(frozen)


def test_a_worker_that_comes_back_while_another_runs_its_job_lets_it_run(service: Service) -> None:
    frozen = service.worker(Mishap("step", 6, signal.SIGSTOP))
    (job,) = service.submit(CAT)
    service.wait(lambda: frozen.stopped, "the freeze")
    other = service.worker(Mishap("step", 6, signal.SIGSTOP))
    service.wait(lambda: other.stopped, "the second freeze, in the middle of the same job")
    frozen.signal(signal.SIGCONT)
    service.stop(frozen)
    assert "another execution's now" in frozen.log.read_text()
    other.signal(signal.SIGCONT)
    service.settle()
    assert service.ended[job].attempts == 2


def test_a_worker_that_stood_still_until_rq_forgot_it_makes_itself_known_again(service: Service) -> None:
    frozen, other = service.worker(Mishap("popped", 1, signal.SIGSTOP)), service.worker()
    name = service.name(frozen)
    other.signal(signal.SIGSTOP)
    (job,) = service.submit(CAT)
    service.wait(lambda: frozen.stopped, "the freeze")
    other.signal(signal.SIGCONT)
    service.wait(lambda: not service.redis.exists(name) and not service.redis.sismember("rq:workers", name), "that rq forgets it")
    frozen.signal(signal.SIGCONT)
    service.wait(lambda: service.name(frozen), "that rq knows it again", timeout_s=60)
    service.settle()
    assert service.ended[job].attempts == 1
