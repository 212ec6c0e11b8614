"""SIGTERM: stop taking, finish what runs within DIT_DRAIN_SECONDS, give back the rest."""

import signal

from tests.chaos.service import Service
from tests.chaos.tiny import MODEL, picture_request
from tests.chaos.worker import Mishap
from worker import protocol


def test_an_idle_worker_ends_at_once_and_its_model_is_served_no_more(service: Service) -> None:
    service.stop(service.worker())
    assert not service.redis.exists(protocol.model_key(MODEL), "rq:workers")


def test_a_busy_worker_ends_its_jobs_and_takes_no_more(service: Service) -> None:
    early = [service.submit(picture_request(seed=seed))[0] for seed in range(3)]
    worker = service.worker(Mishap("step", 6, signal.SIGTERM), Mishap("step", 7, signal.SIGSTOP), drain_s=120.0)
    service.wait(lambda: worker.stopped, "the step after the signal")
    late = service.submit(picture_request(seed=9))
    worker.signal(signal.SIGCONT)
    assert service.death(worker) == 0
    service.look()
    assert [service.ended[job].attempts for job in early] == [1, 1, 1]
    assert service.waiting() == late and service.attempts(late[0]) == 0


def test_a_busy_worker_whose_time_is_over_gives_its_jobs_back(service: Service) -> None:
    jobs = [service.submit(picture_request(seed=seed))[0] for seed in range(3)]
    worker = service.worker(Mishap("step", 6, signal.SIGTERM), drain_s=0.0)
    assert service.death(worker) == 0
    assert [service.record(job)["status"] for job in jobs] == ["queued"] * 3
    assert service.waiting() == jobs
    service.worker()
    service.settle()
    for job in jobs:
        assert service.ended[job].attempts == 1
        assert [data for name, data in service.ended[job].events if name == "queued"] == [{}, {"retry": True}]
