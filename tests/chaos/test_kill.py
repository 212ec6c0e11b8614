"""kill -9 at every point of a job's life: the job runs again elsewhere, and ends as if nothing had been."""

import signal

import pytest

from tests.chaos.service import Service
from tests.chaos.tiny import picture_request
from tests.chaos.worker import Mishap

# The second has more pictures than a forward has rows, so that some of them are in Redis while others are drawn.
CAT, DOGS = picture_request(0), picture_request(1, seed=30, num_images=10)


@pytest.mark.parametrize(
    ("point", "call", "attempts"),
    [
        ("popped", 2, [2, 1]),
        ("leased", 2, [2, 2]),
        ("prepared", 2, [2, 2]),
        ("step", 6, [2, 2]),
        ("drawn", 1, [2, 2]),
        ("stored", 1, [1, 2]),
        ("committing", 1, [2, 2]),
        ("committed", 1, [1, 2]),
    ],
)
def test_jobs_of_a_worker_that_is_killed_run_again_elsewhere(service: Service, point: str, call: int, attempts: list[int]) -> None:
    survivor = service.worker()
    survivor.signal(signal.SIGSTOP)  # until the other one has taken the jobs
    jobs = [service.submit(request)[0] for request in (CAT, DOGS)]
    victim = service.worker(Mishap(point, call))
    assert service.death(victim) == -signal.SIGKILL
    survivor.signal(signal.SIGCONT)
    service.lease_ends_soon(victim)
    for job, expected in zip(jobs, attempts, strict=True):
        service.runs_again(job, expected)
    service.settle()
    assert [service.ended[job].attempts for job in jobs] == attempts
