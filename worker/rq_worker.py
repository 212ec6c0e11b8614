"""An rq worker that runs many jobs at once in one process: leases, results and ends of jobs around the engine.

rq's own `work()` waits for the first job; `execute_job` then runs the engine until it is empty, topping up from the queues between ticks.
"""

import logging
import time
from collections.abc import Sequence
from functools import partial

from redis.client import Pipeline
from rq import Queue
from rq.exceptions import DeserializationError
from rq.executions import Execution
from rq.job import Job
from rq.utils import now as rq_now
from rq.worker import WorkerStatus

from worker import counts, protocol
from worker.engine import Event, ImageReady, JobDone, JobFailed, Preview
from worker.heart import RENEW_EVERY_S
from worker.leases import Lease
from worker.results import News, Order, Record, about
from worker.rq_process import WorkerProcess
from worker.stores import StoreTrouble
from worker.writer import Write

log = logging.getLogger("dit.worker")

LOOK_EVERY_S = 0.01  # into the queues, while jobs run and there is room for more
TELL_EVERY_S = 0.1  # progress events and the look for cancels
CALLS_PER_S = 2000  # of all workers of a model together, for each of both: of more than 20, each does it less often


class DiTWorker(WorkerProcess):
    """Runs the jobs of its queues together."""

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run this job and all that join it, until the engine is empty, or the time after a stop is over."""
        self._look_at = self._models_at = 0.0  # monotonic; when each is due
        self._tell_at = time.monotonic() + TELL_EVERY_S
        try:
            self._lease(job)
            while self.leases and time.monotonic() < self._drain_until:
                self._round()
            self._give_back()
        except Exception:
            log.exception("this worker cannot go on; its jobs go to others when their leases have run out")
            self.patience.until = 0.0
            raise SystemExit(1) from None

    def _round(self) -> None:
        """One step of the jobs that run, and what is due between two."""
        now = self.came_round = time.monotonic()
        if now >= self._look_at and not self._stop_requested:
            self._look_at = now + self._every(LOOK_EVERY_S)
            self._top_up()
        if self.engine.busy and not self.writer.crowded:
            self._handle(self.engine.tick())
        else:
            self.writer.wait(LOOK_EVERY_S)
            self._commit()
        self._stop_jobs()
        now = time.monotonic()
        if now >= self._tell_at:
            self._tell_at = now + self._every(TELL_EVERY_S)
            self._tell_progress()
        if now >= self._models_at:
            self._models_at = now + RENEW_EVERY_S
            self._update_models()
        if self.should_run_maintenance_tasks:
            self.run_maintenance_tasks()

    def _every(self, seconds: float) -> float:
        """Of four thousand workers each looks every two seconds, and so one of them every half millisecond; idle ones are rung for."""
        return max(seconds, self._maintenance.workers / CALLS_PER_S)

    # Jobs that come.

    def _top_up(self) -> None:
        while found := self._take(idle=False):
            self._lease(found[0])

    def _lease(self, job: Job) -> None:
        """Take a popped job under a lease and hand it to the engine, or end it here if it shall not or cannot run."""
        execution, verdict, record = self._start(job)
        if verdict == "elsewhere":  # it was in the queue twice
            self._leave(job, execution)
            return
        if job.id in self.leases:  # this worker stood still so long that its lease ran out
            self._drop(self.leases[job.id])
        try:
            operation = job.func_name
        except DeserializationError:
            operation = None
        if operation != protocol.OPERATION:
            self._refuse(job, execution, record, f"operation {operation!r} is not known; only {protocol.OPERATION!r} is")
        elif verdict == "exhausted":
            message = f"given up after {protocol.MAX_ATTEMPTS} attempts, each ended by its worker's death"
            self._refuse(job, execution, record, message, kind=counts.WORKER_DIED, dead=True)
        elif verdict == "alone" and self.leases:
            self._return(job, execution, about(job.id, record))
        elif verdict in ("run", "alone"):
            self._admit(job, execution, record, alone=verdict == "alone")
        else:
            if verdict == "cancel":
                self.results.cancel(job.id, execution.id)
            self._finish(job, execution)

    def _start(self, job: Job) -> tuple[Execution, str, Record]:
        """The lease, rq's books of a start and ours in one transaction: what rq's prepare_execution and prepare_job_execution do in two."""
        with self.connection.pipeline() as pipeline:
            execution = Execution.create(job, protocol.LEASE_S, pipeline, self.name)
            self.set_state(WorkerStatus.BUSY, pipeline)
            job.prepare_for_execution(self.name, pipeline)
            pipeline.persist(job.key)
            pipeline.lrem(self._queue_of(job).intermediate_queue_key, 1, job.id)
            verdict, record = self.results.start_in(pipeline, job.id, execution.id)
        self.executions[execution.id] = execution
        return execution, verdict, record

    def _admit(self, job: Job, execution: Execution, record: Record, *, alone: bool) -> None:
        try:
            order = Order.parse(record)
            if not self.writer.takes(order.store):
                raise ValueError(self._other_store(order.store))
            pinned, previews, request_id = order.checkpoint, order.previews, order.request_id
            self.engine.add(job.id, order.request, pinned, alone=alone, previews=previews, request_id=request_id)
        except ValueError as error:
            self._refuse(job, execution, record, str(error))
        else:
            lease = self.leases[job.id] = Lease(job, execution, order)
            log.info("job %s runs here", job.id, extra=lease.about)

    def _other_store(self, wanted: str) -> str:
        here = f"has {self.writer.mark}" if self.writer.store else "keeps pictures in Redis"
        return f"its pictures belong into image store {wanted}, and this worker {here}: DIT_IMAGE_STORE must be the same for all"

    def _refuse(
        self, job: Job, execution: Execution, record: Record, message: str, *, kind: str = counts.REFUSED, dead: bool = False
    ) -> None:
        self.results.fail(job.id, execution.id, message, kind=kind, dead=dead)
        self._finish_failed(job, execution, message, about(job.id, record))

    # What came of a tick.

    def _handle(self, events: Sequence[Event]) -> None:
        events = [event for event in events if event.job_id in self.leases]  # else another's by now
        self._show([event for event in events if isinstance(event, Preview)])
        for event in events:
            lease = self.leases.get(event.job_id)
            if lease and isinstance(event, ImageReady):
                self.writer.put(lease, event)
            elif lease and isinstance(event, JobDone):
                lease.drawn = True
        self._commit()
        for event in events:
            if isinstance(event, JobFailed) and (lease := self.leases.get(event.job_id)):
                self._fail(lease, event.message, event.kind)

    def _fail(self, lease: Lease, message: str, kind: str) -> None:
        if self._close(lease, self.results.fail(lease.job.id, lease.execution.id, message, kind=kind)):
            self._finish_failed(lease.job, lease.execution, message, lease.about)

    def _commit(self) -> None:
        """Redis is told of pictures that are in their store, or are for Redis itself, and of jobs that have ended by it."""
        writes = [write for write in self.writer.take() if self.leases.get(write.lease.job.id) is write.lease]  # else another's by now
        for write in writes:
            if write.error and write.lease.job.id in self.leases:
                self._not_stored(write, write.error)
        ready = [write.image for write in writes if write.lease.job.id in self.leases]
        done = [lease for lease in self.leases.values() if lease.drawn and not lease.writing]
        if ready or done:
            self._store(ready, done)

    def _not_stored(self, write: Write, error: BaseException) -> None:
        """A store that takes nothing may come back: the job waits for that, or for a worker that has a better way there."""
        if isinstance(error, StoreTrouble):
            self._put_back(write.lease)
        else:
            self._fail(write.lease, f"picture {write.image.index} could not be stored: {error}", counts.STORE)

    def _show(self, previews: Sequence[Preview]) -> None:
        """Where Redis is in trouble, nobody sees them."""
        news: list[News] = []
        for preview in previews:
            lease = self.leases[preview.job_id]
            steps = lease.order.request.steps
            data = {"index": preview.index, "step": int(preview.share * steps), "steps": steps, "image": preview.url}
            news.append((preview.job_id, lease.execution.id, "preview", data, None))
        if news:
            self._obey(news, self._if_it_answers(lambda: self.results.tell_all(news)[0]) or [])

    def _store(self, ready: Sequence[ImageReady], done: Sequence[Lease]) -> None:
        """The pictures of one tick, their events and the ends of jobs in one round trip; they are kept here until Redis has taken them."""
        pipeline, news = self.connection.pipeline(), list[News]()
        for image in ready:
            lease, ttl_s = self.leases[image.job_id], self.leases[image.job_id].order.result_ttl_s
            entry = {"index": image.index, "seed": image.seed, "sha256": image.sha256, "bytes": len(image.png)}
            lease.images.append(entry)
            if not lease.order.store:
                self.results.store_image(image.job_id, lease.execution.id, image.index, image.png, ttl_s, pipeline)
            data = {**entry, "url": f"/jobs/{image.job_id}/images/{image.index}"}
            news.append((image.job_id, lease.execution.id, "image", data, None))
        for lease in {image.job_id: self.leases[image.job_id] for image in ready}.values():
            self._keep_pictures(lease, pipeline)
        ends = [(lease.job.id, lease.execution.id, sorted(lease.images, key=lambda image: int(image["index"]))) for lease in done]
        answers, ended = self.results.tell_all(news, pipeline, ends)
        for (job_id, *_), answer in zip(news, answers, strict=True):
            if answer != "lost":
                self.engine.stats.count(self.leases[job_id].order.request.model, "images")
        for lease, told in zip(done, ended, strict=True):  # also if it was to be canceled: the script has seen to that
            if self._close(lease, told):
                self._finish(lease.job, lease.execution)
                log.info("job %s has ended", lease.job.id, extra=lease.about)
        self._obey(news, answers)

    def _keep_pictures(self, lease: Lease, pipeline: Pipeline) -> None:
        """In Redis; a store keeps them until the job's record has expired."""
        lease.kept_at = time.monotonic()
        if not lease.order.store:
            self.results.keep_images(lease.job.id, lease.execution.id, lease.images, lease.order.result_ttl_s, pipeline)

    def _tell_progress(self) -> None:
        """And pictures of a job that takes longer than they live are kept: they live from its end on."""
        pipeline, news = self.connection.pipeline(transaction=False), list[News]()
        for lease in self.leases.values():
            step = int(self.engine.progress(lease.job.id) * lease.order.request.steps)
            event = "progress" if step != lease.step else ""
            news.append((lease.job.id, lease.execution.id, event, {"step": step, "steps": lease.order.request.steps}, step))
            lease.step = step
            if lease.images and time.monotonic() - lease.kept_at > lease.order.result_ttl_s / 3:
                self._keep_pictures(lease, pipeline)
        if news:
            self._obey(news, self._if_it_answers(lambda: self.results.tell_all(news, pipeline)[0]) or [])

    def _obey(self, news: Sequence[News], answers: Sequence[str]) -> None:
        """End what was canceled, or is another's by now."""
        for (job_id, *_), answer in zip(news, answers, strict=False):  # without answers Redis was in trouble
            lease = self.leases.get(job_id)
            if lease and answer == "cancel":
                if self._close(lease, self.results.cancel(job_id, lease.execution.id)):
                    # For rq a canceled job has succeeded too. If Redis is full, its books wait until the lease has run out.
                    self._if_it_answers(partial(self._finish, lease.job, lease.execution))
            elif lease and answer == "lost":
                self._drop(lease)

    def _stop_jobs(self) -> None:
        """What rq's commands asked for: ours is canceled, rq's is stopped."""
        while not self._stop_asked.empty():
            lease = self.leases.get(self._stop_asked.get())
            if lease and self._close(lease, self.results.cancel(lease.job.id, lease.execution.id)):
                self._stopped_job_id = lease.job.id  # rq's word for it, which its own books take
                self._finish_failed(lease.job, lease.execution, "stopped by a command of rq", lease.about)

    # Jobs that leave.

    def _close(self, lease: Lease, told: bool) -> bool:
        """The job has ended; if it could not be told, it is another execution's."""
        if not told:
            self._drop(lease)
            return False
        self.engine.remove(lease.job.id)
        del self.leases[lease.job.id]
        return True

    def _drop(self, lease: Lease) -> None:
        """The lease was lost while this worker stood still. rq's record of the job is another execution's too by now, so it is let be."""
        log.warning("job %s is another execution's now; dropped here", lease.job.id, extra=lease.about)
        self.engine.remove(lease.job.id)
        del self.leases[lease.job.id]
        self._leave(lease.job, lease.execution)

    def _leave(self, job: Job, execution: Execution) -> None:
        """Of this execution nothing stays; the job is untouched."""
        with self.connection.pipeline() as pipeline:
            self.cleanup_execution(job, pipeline=pipeline, execution=execution)
            pipeline.execute()

    def _finish(self, job: Job, execution: Execution) -> None:
        """rq's books of a success, in one round trip: rq's own way takes four, to look for callbacks and dependents that ours have not."""
        job.ended_at = rq_now()
        result_ttl = job.get_result_ttl(self.default_result_ttl)
        with self.connection.pipeline() as pipeline:
            self.increment_successful_job_count(pipeline)
            self.increment_total_working_time(job.ended_at - job.started_at, pipeline)
            job._handle_success(result_ttl, pipeline, self.name, execution.id, execution.created_at, job.ended_at)
            job.cleanup(result_ttl, pipeline, remove_from_queue=False)
            self.cleanup_execution(job, pipeline, execution)
            pipeline.execute()

    def _finish_failed(self, job: Job, execution: Execution, message: str, told: dict[str, str]) -> None:
        """`told`: what lines of the log about the job carry."""
        log.error("job %s failed: %s", job.id, message, extra=told)
        job.retries_left = 0  # a failure is final; only a worker's death is tried again
        job.webhooks = []  # whatever the queue says of the job, nothing is called
        job.ended_at = rq_now()
        self.handle_job_failure(job, self._queue_of(job), exc_string=message, execution=execution)

    def _queue_of(self, job: Job) -> Queue:
        return Queue(job.origin, connection=self.connection, serializer=job.serializer)

    def _give_back(self) -> None:
        """A stop was asked for: jobs that have not ended go to the front of the queue, the oldest first."""
        for lease in reversed(list(self.leases.values())):
            self._put_back(lease)

    def _put_back(self, lease: Lease) -> None:
        self.engine.remove(lease.job.id)
        del self.leases[lease.job.id]
        self._return(lease.job, lease.execution, lease.about)

    def _return(self, job: Job, execution: Execution, told: dict[str, str]) -> None:
        back = self.results.give_back(job.id, execution.id)
        self._leave(job, execution)
        log.info("job %s %s", job.id, "goes back to the queue" if back else "is another execution's now", extra=told)
