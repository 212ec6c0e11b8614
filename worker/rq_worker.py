"""An rq worker that runs many jobs at once in one process: rq's queue, leases, retries and maintenance around the engine.

rq's own `work()` waits for the first job; `execute_job` then runs the engine until it is empty, topping up from the queue between ticks.
rq's seams used here are private and pinned; `tests/worker/test_rq_contract.py` holds them.
"""

import logging
import math
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from redis import Redis
from rq import Queue, worker_registration
from rq.exceptions import AbandonedJobError, DeserializationError
from rq.executions import Execution
from rq.job import Job
from rq.registry import clean_registries
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty
from rq.utils import now as rq_now
from rq.worker import BaseWorker

from worker import protocol
from worker.engine import Engine, Event, ImageReady, JobFailed
from worker.protocol import GenerationRequest, ModelRecord
from worker.results import JobResults

log = logging.getLogger("dit.worker")

RENEW_EVERY_S = 2.0  # leases, the worker's heartbeat, the model's record
TELL_EVERY_S = 0.1  # progress events and the look for cancels
MAINTENANCE_EVERY_S = 5
STUCK_AFTER_S = 10  # a job popped but not leased for this long was popped by a worker that died


@dataclass
class Lease:
    """A job this worker runs."""

    job: Job
    execution: Execution
    request: GenerationRequest
    ttl_s: int
    images: list[dict[str, Any]] = field(default_factory=list)
    step: int = -1


class DiTWorker(BaseWorker):
    """Serves one model's queue with one engine."""

    death_penalty_class = TimerDeathPenalty

    def __init__(self, engine: Engine, record: ModelRecord, connection: Redis) -> None:
        queue = Queue(protocol.queue_name(record.id), connection=connection, serializer=JSONSerializer)
        self.engine, self.record = engine, record
        self.results = JobResults(connection)
        self.leases: dict[str, Lease] = {}
        self._last_renewal = self._last_told = 0.0
        self._stuck_since: dict[str, float] = {}
        super().__init__(
            [queue],
            connection=connection,
            serializer=JSONSerializer,
            maintenance_interval=MAINTENANCE_EVERY_S,
            worker_ttl=15 + MAINTENANCE_EVERY_S,  # rq waits worker_ttl − 15 s for a job before it looks around
            log_job_description=False,
            exception_handlers=[self._abandoned],
        )
        self.queue = queue

    # What rq calls.

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        return self._while_away(protocol.LEASE_S)

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """rq's own heartbeat, also while idle; the model's record is renewed with it."""
        super().heartbeat(timeout, pipeline=pipeline)
        self.connection.set(protocol.model_key(self.record.id), self.record.dump(), ex=self._while_away(protocol.MODEL_TTL_S))
        self.connection.sadd(protocol.MODELS_KEY, self.record.id)

    def _while_away(self, least_s: int) -> int:
        """Seconds that a promise must hold: one tick of a large model on a slow device may take longer than any fixed time."""
        return max(least_s, math.ceil(4 * self.engine.runner.slowest_tick_s))

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run this job and all that join it, until the engine is empty or a stop was asked for."""
        self._lease(job)
        while self.leases and not self._stop_requested:
            self._top_up()
            for event in self.engine.tick():
                self._handle(event)
            now = time.monotonic()
            if now - self._last_told >= TELL_EVERY_S:
                self._last_told = now
                self._tell_progress()
            if now - self._last_renewal >= RENEW_EVERY_S:
                self._last_renewal = now
                self._renew()
            if self.should_run_maintenance_tasks:
                self.run_maintenance_tasks()
        self._give_back()
        self.set_state("idle")

    def teardown(self) -> None:
        if BaseWorker.count(queue=self.queue) <= 1:  # another worker of the model goes on renewing the record
            self.connection.delete(protocol.model_key(self.record.id))
        super().teardown()

    # Jobs in.

    def _top_up(self) -> None:
        while self.engine.wants_jobs:
            found = Queue.dequeue_any([self.queue], None, connection=self.connection, serializer=JSONSerializer)
            if found is None:
                return
            self._lease(found[0])

    def _lease(self, job: Job) -> None:
        """Take a popped job under a lease and hand it to the engine, or end it here if it shall not or cannot run."""
        if job.id in self.leases:  # this worker stood still so long that another gave the job to the queue
            self._drop(self.leases[job.id])
        execution = self.prepare_execution(job)
        try:
            self.prepare_job_execution(job, remove_from_intermediate_queue=True)
            operation = job.func_name
        except DeserializationError:  # reading the name is the last that rq does there
            operation = None
        verdict = self.results.start(job.id, execution.id)
        if operation != protocol.OPERATION:
            self._refuse(job, execution, f"operation {operation!r} is not known; only {protocol.OPERATION!r} is")
        elif verdict == "run":
            self._admit(job, execution)
        elif verdict == "exhausted":
            self._refuse(job, execution, f"given up after {protocol.MAX_ATTEMPTS} attempts, each ended by its worker's death")
        else:
            if verdict == "cancel":
                self.results.cancel(job.id, execution.id)
            self._finalize_success(job, self.queue, execution, None)

    def _admit(self, job: Job, execution: Execution) -> None:
        try:
            request = self.results.request(job.id, self.record.checkpoint)
            self.engine.add(job.id, request)
        except ValueError as error:
            self._refuse(job, execution, str(error))
            return
        self.leases[job.id] = Lease(job, execution, request, self.results.ttl_s(job.id))
        self.results.tell(job.id, execution.id, "progress", {"step": 0, "steps": request.steps}, step=0)

    def _refuse(self, job: Job, execution: Execution, message: str) -> None:
        self.results.fail(job.id, execution.id, message)
        self._finalize_as_failed(job, execution, message)

    # What came of a tick.

    def _handle(self, event: Event) -> None:
        lease = self.leases[event.job_id]
        if isinstance(event, ImageReady):
            self._store(lease, event)
        elif isinstance(event, JobFailed):
            if self.results.fail(event.job_id, lease.execution.id, event.message):
                del self.leases[event.job_id]
                self._finalize_as_failed(lease.job, lease.execution, event.message)
            else:
                self._drop(lease)
        else:
            images = sorted(lease.images, key=lambda image: image["index"])
            self._succeed(lease, self.results.succeed(event.job_id, lease.execution.id, images))

    def _succeed(self, lease: Lease, told: bool) -> None:
        """For rq a canceled job has succeeded too. Not told: another execution has the job."""
        if told:
            del self.leases[lease.job.id]
            self._finalize_success(lease.job, self.queue, lease.execution, None)
        else:
            self._drop(lease)

    def _store(self, lease: Lease, image: ImageReady) -> None:
        job_id, execution = lease.job.id, lease.execution.id
        self.results.store_image(job_id, execution, image.index, image.png, lease.ttl_s)
        entry = {"index": image.index, "seed": image.seed, "sha256": image.sha256, "bytes": len(image.png)}
        lease.images.append(entry)
        self.results.tell(job_id, execution, "image", {**entry, "url": f"/jobs/{job_id}/images/{image.index}"})

    def _tell_progress(self) -> None:
        for lease in list(self.leases.values()):
            step = int(self.engine.progress(lease.job.id) * lease.request.steps)
            news = step != lease.step
            data = {"step": step, "steps": lease.request.steps}
            answer = self.results.tell(lease.job.id, lease.execution.id, "progress" if news else "", data, step)
            lease.step = step
            if answer == "run":
                continue
            self.engine.remove(lease.job.id)
            if answer == "cancel":
                self._succeed(lease, self.results.cancel(lease.job.id, lease.execution.id))
            else:
                self._drop(lease)

    def _drop(self, lease: Lease) -> None:
        """The lease was lost while this worker stood still. rq's record of the job is another execution's too by now, so it is let be."""
        log.warning("job %s is another execution's now; dropped here", lease.job.id)
        self.engine.remove(lease.job.id)
        del self.leases[lease.job.id]
        with self.connection.pipeline() as pipeline:
            self.cleanup_execution(lease.job, pipeline=pipeline, execution=lease.execution)
            pipeline.execute()

    def _finalize_as_failed(self, job: Job, execution: Execution, message: str) -> None:
        log.error("job %s failed: %s", job.id, message)
        job.retries_left = 0  # a failure is final; only a worker's death is tried again
        self._finalize_failure(job, self.queue, execution, (RuntimeError, RuntimeError(message), None))

    # Leases.

    def _renew(self) -> None:
        for lease in self.leases.values():
            self.maintain_heartbeats(lease.job, lease.execution)
        self.heartbeat()

    def _give_back(self) -> None:
        """A stop was asked for: jobs that have not ended go to the front of the queue, the oldest first."""
        for lease in reversed(list(self.leases.values())):
            if not self.results.give_back(lease.job.id, lease.execution.id):
                self._drop(lease)
                continue
            self.engine.remove(lease.job.id)
            del self.leases[lease.job.id]
            with self.connection.pipeline() as pipeline:
                self.cleanup_execution(lease.job, pipeline=pipeline, execution=lease.execution)
                self.queue._enqueue_job(lease.job, pipeline=pipeline, at_front=True)
                pipeline.execute()
            log.info("job %s goes back to the queue", lease.job.id)

    # Maintenance: what died with another worker.

    def clean_registries(self) -> None:
        """Requeue jobs whose lease has run out, or that were popped and never leased. Harmless if two workers do it at once."""
        if self.connection.set(f"dit:reaper:{self.queue.name}", self.name, nx=True, ex=MAINTENANCE_EVERY_S - 1):
            clean_registries(self.queue, self._exc_handlers)  # what has ended is forgotten here too
            worker_registration.clean_worker_registry(self.queue)
            self._requeue_stuck()
        self.last_cleaned_at = rq_now()

    def _requeue_stuck(self) -> None:
        waiting = {i.decode() for i in self.connection.lrange(self.queue.intermediate_queue_key, 0, -1)}
        leased = {job for job, _ in self.queue.started_job_registry.get_job_and_execution_ids(cleanup=False)}
        now = time.monotonic()
        self._stuck_since = {job_id: self._stuck_since.get(job_id, now) for job_id in waiting - leased}
        for job_id, since in self._stuck_since.items():
            if now - since > STUCK_AFTER_S:
                known = Job.exists(job_id, connection=self.connection)
                with self.connection.pipeline() as pipeline:
                    pipeline.lrem(self.queue.intermediate_queue_key, 1, job_id)
                    if known:
                        pipeline.lpush(self.queue.key, job_id)
                    pipeline.execute()
                log.warning("job %s was popped by a worker that died; it %s", job_id, "waits again" if known else "is no more")

    def _abandoned(self, job: Job, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> bool:
        """rq calls this for each abandoned job, before it requeues it or, without attempts left, fails it."""
        if kind is not AbandonedJobError:
            return True
        if job.retries_left:
            self.results.give_back(job.id)
            log.warning("job %s lost its worker; it waits again", job.id)
        else:
            self.results.fail(job.id, self.results.execution(job.id), f"given up: its worker died {protocol.MAX_ATTEMPTS} times")
        return True
