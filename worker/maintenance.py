"""What died with another worker, and what ended long ago. Several workers may do it at once."""

import json
import logging
import time
from typing import Any

from redis import Redis
from rq import Queue, worker_registration
from rq.registry import FailedJobRegistry, FinishedJobRegistry

from worker import protocol, scripts

log = logging.getLogger("dit.worker")

STUCK_AFTER_S = 10  # a job popped but not leased for this long was popped by a worker that died
TRIED_TOO_OFTEN = f"given up: its worker died {protocol.MAX_ATTEMPTS} times"


class Maintenance:
    """rq's own cleaning of leases is left out: two of it at once would queue a job twice."""

    def __init__(self, connection: Redis) -> None:
        self._connection: Any = connection
        self._reap, self._unstick = connection.register_script(scripts.REAP), connection.register_script(scripts.UNSTICK)
        self._tidy = connection.register_script(scripts.TIDY)
        self._popped: dict[str, dict[str, float]] = {}  # by model: jobs without a lease, and when they were first seen so

    def clean(self, model: str, queue: Queue) -> None:
        self._requeue_abandoned(model)
        self._requeue_stuck(model, queue)
        for registry in (FinishedJobRegistry, FailedJobRegistry):  # what has ended is forgotten here too
            registry(queue=queue).cleanup()
        worker_registration.clean_worker_registry(queue)
        self._tidy()

    def _requeue_abandoned(self, model: str) -> None:
        done = {"status": protocol.FAILED, "error": TRIED_TOO_OFTEN}
        told = self._reap([], [model, TRIED_TOO_OFTEN, json.dumps({"retry": True}), json.dumps(done)])
        for verdict, job_id in zip(told[::2], told[1::2], strict=True):
            what = "it waits again" if verdict == b"again" else "it is given up, after the last attempt"
            log.warning("job %s lost its worker; %s", job_id.decode(), what)

    def _requeue_stuck(self, model: str, queue: Queue) -> None:
        waiting = {i.decode() for i in self._connection.lrange(queue.intermediate_queue_key, 0, -1)}
        leased = {job for job, _ in queue.started_job_registry.get_job_and_execution_ids(cleanup=False)} if waiting else set()
        now, before = time.monotonic(), self._popped.get(model, {})
        self._popped[model] = {job_id: before.get(job_id, now) for job_id in waiting - leased}
        for job_id, since in self._popped[model].items():
            if now - since > STUCK_AFTER_S and self._unstick([], [model, job_id]):
                log.warning("job %s was popped by a worker that died; it waits again", job_id)
