"""A cancel at every moment of a job's life: a worker that stops itself at each is stepped through it."""

import itertools
import signal

from tests.chaos.service import Service, Worker
from tests.chaos.tiny import picture_request
from tests.chaos.worker import Mishap
from worker.protocol import FINAL

STEPS = 5
STOPS = ("leased", "prepared", "step", "drawn", "committing")


def advance(service: Service, worker: Worker, job: str) -> None:
    """To the next stop, or the end of the job."""
    worker.signal(signal.SIGCONT)
    service.wait(lambda: worker.stopped or service.record(job)["status"] in FINAL, "the next stop")


def cancel_after(service: Service, worker: Worker, stops: int) -> tuple[str, str]:
    """Submit a job, cancel it when it has come so far, and see it end. → the answer to the cancel, and the job's id."""
    worker.signal(signal.SIGSTOP)
    (job,) = service.submit(picture_request(steps=STEPS))
    for _ in range(stops):
        advance(service, worker, job)
    answer = service.cancel(job)
    worker.signal(signal.SIGCONT)
    while not service.look():
        advance(service, worker, job)
    return answer, job


def test_a_cancel_at_every_step_ends_the_job_once(service: Service) -> None:
    worker = service.worker(*(Mishap(point, None, signal.SIGSTOP) for point in STOPS))
    answers = list[str]()
    for stops in itertools.count():
        answer, job = cancel_after(service, worker, stops)
        answers.append(answer)
        assert service.ended[job].status == ("succeeded" if answer == "succeeded" else "canceled")
        assert service.ended[job].attempts == (0 if answer == "queued" else 1)
        if answer == "succeeded":
            break
    assert answers == ["queued", *["running"] * (len(STOPS) - 1 + STEPS), "succeeded"]


def test_a_job_canceled_after_its_worker_died_is_canceled_by_another(service: Service) -> None:
    victim = service.worker(Mishap("step", 6))
    (job,) = service.submit(picture_request())
    service.death(victim)
    assert service.cancel(job) == "running"
    service.worker()
    service.settle()
    assert (service.ended[job].status, service.ended[job].attempts) == ("canceled", 1)
