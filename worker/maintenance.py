"""What died with another worker, and what ended long ago. Several workers may do it at once."""

import json
import logging
import random
import time
from typing import Any

from redis import Redis
from rq import Queue, worker_registration
from rq.registry import FailedJobRegistry, FinishedJobRegistry

from worker import protocol, scripts

log = logging.getLogger("dit.worker")

CLEANERS = 10  # workers of a model that look after rq's list of workers each time; where there are fewer, all
STUCK_AFTER_S = 10  # a job popped but not leased for this long was popped by a worker that died
TRIED_TOO_OFTEN = f"given up: its worker died {protocol.MAX_ATTEMPTS} times"


class Maintenance:
    """rq's own cleaning of leases is left out: two of it at once would queue a job twice."""

    def __init__(self, connection: Redis) -> None:
        self._connection: Any = connection
        self._reap, self._unstick = connection.register_script(scripts.REAP), connection.register_script(scripts.UNSTICK)
        self._tidy, self._unleased = connection.register_script(scripts.TIDY), connection.register_script(scripts.UNLEASED)
        self._popped: dict[str, dict[str, float]] = {}  # by model: jobs without a lease, and when they were first seen so
        self._workers: dict[str, int] = {}  # by model: those that rq knows

    @property
    def workers(self) -> int:
        """Of the model that has most, when it was last cleaned."""
        return max(self._workers.values(), default=1)

    def clean(self, model: str, queue: Queue) -> None:
        self._requeue_abandoned(model)
        self._requeue_stuck(model, queue)
        for registry in (FinishedJobRegistry, FailedJobRegistry):  # what has ended is forgotten here too
            registry(queue=queue).cleanup()
        self._forget_workers(model, queue)
        self._tidy()

    def _forget_workers(self, model: str, queue: Queue) -> None:
        """rq asks for each worker there is. If each of a thousand did so, Redis would do little else; so, of many, some do, by lot."""
        count = self._workers[model] = int(self._connection.scard(worker_registration.WORKERS_BY_QUEUE_KEY % queue.name))
        if random.random() * count < CLEANERS:
            worker_registration.clean_worker_registry(queue)

    def _requeue_abandoned(self, model: str) -> None:
        done = {"status": protocol.FAILED, "error": TRIED_TOO_OFTEN}
        told = self._reap([], [model, TRIED_TOO_OFTEN, json.dumps({"retry": True}), json.dumps(done)])
        for verdict, job_id in zip(told[::2], told[1::2], strict=True):
            what = "it waits again" if verdict == b"again" else "it is given up, after the last attempt"
            log.warning("job %s lost its worker; %s", job_id.decode(), what, extra={"job_id": job_id.decode()})

    def _requeue_stuck(self, model: str, queue: Queue) -> None:
        unleased = {i.decode() for i in self._unleased([queue.intermediate_queue_key, queue.started_job_registry.key])}
        now, before = time.monotonic(), self._popped.get(model, {})
        self._popped[model] = {job_id: before.get(job_id, now) for job_id in unleased}
        for job_id, since in self._popped[model].items():
            if now - since > STUCK_AFTER_S and self._unstick([], [model, job_id]):
                log.warning("job %s was popped by a worker that died; it waits again", job_id, extra={"job_id": job_id})
