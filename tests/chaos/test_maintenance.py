"""Cleaners at once, and a device that hangs."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from tests.chaos.service import LEASES, QUEUE, Service
from tests.chaos.tiny import MODEL, picture_request
from tests.chaos.worker import HANG, Mishap
from worker import protocol
from worker.heart import HUNG
from worker.maintenance import Maintenance

CLEANERS = 6


def clean(url: str, together: threading.Barrier) -> None:
    """As a worker does it every few seconds, with a connection of its own."""
    with Redis.from_url(url, protocol=2) as redis:
        maintenance = Maintenance(redis)
        queue = Queue(protocol.queue_name(MODEL), connection=redis, serializer=JSONSerializer)
        for _ in range(10):
            together.wait()
            maintenance.clean(MODEL, queue)


def test_many_cleaners_at_once_queue_each_job_of_a_dead_worker_once(service: Service) -> None:
    jobs = [service.submit(picture_request(seed=seed))[0] for seed in range(12)]
    victim = service.worker(Mishap("step", 6))
    service.death(victim)
    expected = {job: 1 + service.attempts(job) for job in jobs}  # some wait that were never started
    assert 2 in expected.values()
    for lease in service.redis.zrange(LEASES, 0, -1):
        service.redis.zadd(LEASES, {lease: 1})  # what the clock does to a lease that nobody renews
    together = threading.Barrier(CLEANERS, timeout=60)  # else one that raises hides behind those who wait for it
    with ThreadPoolExecutor(CLEANERS) as pool:
        for cleaner in [pool.submit(clean, service.server.url, together) for _ in range(CLEANERS)]:
            cleaner.result()
    assert sorted(service.waiting()) == sorted(jobs)
    assert not service.redis.exists(LEASES, f"{QUEUE}:intermediate")
    service.worker()
    service.settle()
    for job in jobs:
        assert service.ended[job].attempts == expected[job]
        assert [name for name, _ in service.ended[job].events].count("queued") == expected[job]


def test_a_worker_whose_device_hangs_ends_itself_and_its_job_runs_elsewhere(service: Service) -> None:
    survivor = service.worker()
    survivor.signal(signal.SIGSTOP)
    (job,) = service.submit(picture_request())
    hung = service.worker(Mishap("step", 6, HANG), hang_s=3.0)
    assert service.death(hung) == HUNG
    assert "a step has taken more than 3 s" in hung.log.read_text()
    survivor.signal(signal.SIGCONT)
    service.runs_again(job)
    service.settle()
    assert service.ended[job].attempts == 2
