"""A hundred people want the same picture at the same moment."""

from tests.chaos.service import Service
from tests.chaos.tiny import picture_request


def test_a_hundred_equal_submissions_at_once_are_a_hundred_jobs_with_one_picture(service: Service) -> None:
    workers = [service.worker() for _ in range(2)]
    jobs = service.submit(*[picture_request(steps=8)] * 100)
    service.settle()
    assert len(set(jobs)) == 100
    assert {(service.ended[job].status, service.ended[job].attempts) for job in jobs} == {("succeeded", 1)}
    assert len({service.ended[job].pictures[0] for job in jobs}) == 1
    assert all(worker.alive for worker in workers)
