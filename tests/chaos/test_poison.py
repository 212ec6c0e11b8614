"""A job that kills whichever worker runs it, among good ones."""

import signal

from tests.chaos.service import Service
from tests.chaos.tiny import picture_request
from tests.chaos.worker import Mishap
from worker import protocol

POISON = 3  # the class of the picture that kills


def test_a_poison_job_ends_after_five_attempts_and_every_good_one_succeeds(service: Service) -> None:
    deadly = Mishap("step", None, signal.SIGKILL, class_label=POISON)
    requests = [picture_request(seed=seed) for seed in range(8)]
    requests.insert(2, picture_request(POISON))
    jobs = [service.submit(request)[0] for request in requests]

    def supervise() -> bool:
        """Two workers, as an orchestrator keeps them."""
        for _ in range(2 - sum(worker.alive for worker in service.workers)):
            service.worker(deadly)
        return service.look()

    service.wait(supervise, "the end of all jobs", timeout_s=500)  # five deaths, each with a lease to run out
    poisoned = jobs.pop(2)
    poison = service.ended[poisoned]
    assert (poison.status, poison.attempts) == ("failed", protocol.MAX_ATTEMPTS)
    assert "5 times" in poison.record["error"] and poison.record["error"] == poison.events[-1][1]["error"]
    assert [status for worker in service.workers if (status := worker.status) is not None] == [-signal.SIGKILL] * protocol.MAX_ATTEMPTS
    assert service.redis.zrange(protocol.DEAD_KEY, 0, -1) == [poisoned.encode()]
    assert {service.ended[job].status for job in jobs} == {"succeeded"}
    assert max(service.ended[job].attempts for job in jobs) <= protocol.ALONE_FROM  # from then on it dies alone
