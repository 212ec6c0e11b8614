"""What rq sees of a worker: a process that is registered, beats, is told to stop or to rest, looks after its queues, and waits for work.

rq's seams used here and in rq_worker.py are private and pinned; `tests/worker/test_rq_contract.py` holds them.
"""

import logging
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, TypeVar

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, worker_registration
from rq.command import handle_command, parse_payload
from rq.exceptions import NoSuchJobError, StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty
from rq.utils import now as rq_now
from rq.worker import BaseWorker, WorkerStatus

from worker import protocol
from worker.engine import Engine
from worker.heart import RENEW_EVERY_S, Heart, end_hung_process
from worker.intake import Intake
from worker.leases import Lease, Promises
from worker.maintenance import Maintenance
from worker.patience import PATIENCE_S, Patience, is_trouble
from worker.protocol import WORKER_TTL_S
from worker.pulse import Pulse
from worker.results import JobResults
from worker.stats import Sender
from worker.sweep import Sweeper
from worker.writer import Writer

log = logging.getLogger("dit.worker")

MAINTENANCE_EVERY_S = 5
LATER_S = 1.0  # after which what Redis did not do, and what can wait, is tried again
DAMAGED_TTL_S = 86_400  # a record of rq that it cannot read, kept for whoever wants to know why
FAREWELL_S = 5.0  # that Redis gets, after the drain, to take the jobs back

T = TypeVar("T")


class WorkerProcess(BaseWorker):
    """Serves the queues of the engine's models; what it does with a job is `execute_job`."""

    death_penalty_class = TimerDeathPenalty

    def __init__(
        self,
        engine: Engine,
        connection: Redis,
        *,
        drain_s: float,
        hang_s: float | None,
        on_hang: Callable[[], None] = end_hung_process,
        pulse: Path | None = None,
        writer: Writer | None = None,
        result_ttl_s: int = 86_400,
    ) -> None:
        """`drain_s`: seconds that running jobs get after SIGTERM. `hang_s`: that a step may take; None: by how long steps take.

        `pulse`: the file in which it says how it fares. `writer`: into the image store; none keeps pictures in Redis. `result_ttl_s`: no
        result is younger whose job Redis does not know.
        """
        self.engine, self.drain_s = engine, drain_s
        self.records = engine.models.records()
        self.leases: dict[str, Lease] = {}
        self.patience = Patience()
        connection.set_retry(self.patience)
        super().__init__(
            [self._queue(model, connection) for model in self._models()],
            connection=connection,
            serializer=JSONSerializer,
            maintenance_interval=MAINTENANCE_EVERY_S,
            worker_ttl=16,  # from which rq makes the socket's timeout: 5 s less
            log_job_description=False,
        )
        self.results, self.intake = JobResults(connection), Intake(connection, self.name)
        self._maintenance, self._promises = Maintenance(connection), Promises(connection)
        self._sender = Sender(connection, self.name, engine.stats)
        self.writer = writer or Writer(None)
        self._new_sweeper = lambda store: Sweeper(store, lambda: self.writer.mark, connection, self.name, result_ttl_s)
        self._sweeper: Sweeper | None = None
        self._new_heart = lambda: Heart(engine, self._beat, hang_s, on_hang)
        self._pulse = pulse
        self._heard: float | None = None  # monotonic; when Redis last took the promises
        self._registered: list[str] = []
        self._stop_asked: SimpleQueue[str] = SimpleQueue()  # ids of the jobs that rq's commands shall end
        self._drain_until = math.inf  # monotonic
        self._redis_at = 0.0  # monotonic; in trouble, Redis is not asked before for what can wait
        self._clean_at = 0.0  # monotonic; other workers' leases are let be before
        self._listening = False
        self.came_round = time.monotonic()  # the loop, with jobs or without

    @staticmethod
    def _queue(model: str, connection: Redis) -> Queue:
        return Queue(protocol.queue_name(model), connection=connection, serializer=JSONSerializer)

    def _models(self) -> list[str]:
        return [record.id for record in self.records]

    # Birth, heartbeat, death.

    def bootstrap(self, *arguments: Any, **options: Any) -> None:
        self._install_signal_handlers()  # rq does so only afterwards, when the worker is known already and may be told to stop
        super().bootstrap(*arguments, **options)
        self._registered = self.queue_names()
        self.heart = self._new_heart()
        self.heart.beat()  # now, so that the models are known at once
        self.heart.start()
        if self.writer.store:
            self._sweeper = self._new_sweeper(self.writer.store)
            self._sweeper.start()

    def teardown(self) -> None:
        self.heart.end()
        self.writer.end()
        if self._sweeper:
            self._sweeper.end()
        self._send_counts()
        if self._pulse:
            self._pulse.unlink(missing_ok=True)
        try:
            for model, queue in zip(self._models(), self.queues, strict=True):
                if BaseWorker.count(queue=queue) <= 1:  # another worker of the model goes on renewing its record
                    self.connection.delete(protocol.model_key(model))
            super().teardown()
        except RedisError as error:
            log.warning("Redis was not told that this worker ends; what it holds of it expires: %s", error)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        return protocol.LEASE_S

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """The heart beats for the worker; rq only adds to what it sends anyway."""
        if pipeline is not None:
            super().heartbeat(WORKER_TTL_S, pipeline=pipeline)

    def _beat(self) -> None:
        """In the heart's thread: keep the promises, then say how it fares, also where Redis is in trouble."""
        try:
            self._renew()
            self._heard = time.monotonic()
        finally:
            self._tell_pulse()

    def _tell_pulse(self) -> None:
        if self._pulse is None:
            return
        now = time.monotonic()
        resting = self.get_state() == WorkerStatus.SUSPENDED  # then rq waits, in a loop of its own
        may_stand_s = 2 * max(self.heart.limit_s, PATIENCE_S)
        pulse = Pulse(self.pid, self._models(), now, now if resting else self.came_round, self._heard, may_stand_s)
        try:
            pulse.write(self._pulse)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._pulse, error)

    def _renew(self) -> None:
        if not self._promises.renew(self, self.records, list(self.leases.values()), self.writer.trouble):
            with self.patience.none():
                self._register()  # the server was restarted without its data, or this process stood still for long
        self._send_counts()

    def _send_counts(self) -> None:
        """Promises come first: what cannot be counted now is sent with the next beat."""
        try:
            self._sender.send()
        except RedisError as error:
            log.debug("counts wait for Redis: %s", error)

    def _register(self) -> None:
        """Tell rq of this worker and its queues. Twice changes nothing."""
        names = self.queue_names()
        with self.connection.pipeline() as pipeline:
            for gone in set(self._registered) - set(names):
                pipeline.srem(worker_registration.WORKERS_BY_QUEUE_KEY % gone, self.key)
            worker_registration.register(self, pipeline)
            pipeline.hset(self.key, mapping={**self.serialize(), "state": self.get_state()})
            pipeline.expire(self.key, WORKER_TTL_S)
            pipeline.execute()
        self._registered = names

    def _update_models(self) -> None:
        """Models come and go; the heart tells what this worker serves now."""
        before, self.records = self._models(), self.engine.models.records()
        if before != self._models():
            self.queues = [self._queue(model, self.connection) for model in self._models()]
        if self._registered != self.queue_names():
            self._if_it_answers(self._register)

    # Signals and commands come at any moment: they leave a note for the loop.

    def _shutdown(self) -> None:
        """An exception, as rq raises it, could lose a job between queue and lease; so only where this worker waits for a bell."""
        self._stop_requested = True
        self._drain_until = time.monotonic() + self.drain_s
        self.patience.until = self._drain_until + FAREWELL_S
        if self._listening:
            raise StopRequested

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """A second signal, unless it is the first one's double: what runs is given back at the next step."""
        if rq_now() - self._shutdown_requested_date >= timedelta(seconds=1):
            self._drain_until = 0.0
            self.patience.until = time.monotonic() + FAREWELL_S

    def handle_payload(self, message: dict[str, Any]) -> None:
        """rq's commands, in the thread that listens for them. rq itself would stop a job by killing a process of its own."""
        try:
            payload = parse_payload(message)
            if payload["command"] in ("stop-job", "stop-execution"):
                self._stop_asked.put(str(payload["job_id"]))
            else:
                handle_command(self, payload)
        except (ValueError, LookupError, TypeError) as error:
            log.warning("not a command: %s", error)

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """rq would end the thread on a timeout, and commands would be heard no more."""
        if not is_trouble(exc):
            super()._pubsub_exception_handler(exc, pubsub, pubsub_thread)
        time.sleep(LATER_S)

    # What is due between two jobs, or two steps.

    def check_for_suspension(self, burst: bool) -> None:
        self._if_it_answers(lambda: BaseWorker.check_for_suspension(self, burst))

    def run_maintenance_tasks(self) -> None:
        self._if_it_answers(lambda: BaseWorker.run_maintenance_tasks(self))

    def clean_registries(self) -> None:
        """After an outage nobody's lease is taken away before its worker had time to renew it."""
        if time.monotonic() < self._clean_at:
            return
        if self.leases:
            self._promises.renew(self, self.records, list(self.leases.values()), self.writer.trouble)
        for model, queue in zip(self._models(), self.queues, strict=True):
            self._maintenance.clean(model, queue)
        self.last_cleaned_at = rq_now()

    def _if_it_answers(self, action: Callable[[], T]) -> T | None:
        """What can wait does so while Redis is in trouble, and the steps go on: until a picture is done, they need nothing of it."""
        if time.monotonic() < self._redis_at:
            return None
        try:
            with self.patience.none():
                result = action()
            self._redis_at = 0.0
            return result
        except RedisError as error:
            if not is_trouble(error):
                raise
            if not self._redis_at:
                log.warning("Redis: %s; the steps go on without it for now", error)
            self._redis_at = time.monotonic() + LATER_S
            self._clean_at = time.monotonic() + 2 * RENEW_EVERY_S
            return None

    # Waiting for work.

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> tuple[Job, Queue] | None:
        """The next job, waited for; None if there is none (without a timeout), after `max_idle_time` seconds, or for a stop."""
        idle_since = time.monotonic()
        self._if_it_answers(lambda: self.set_state(WorkerStatus.IDLE))
        self.procline("Listening on " + ",".join(self.queue_names()))
        while not self._stop_requested:
            self.came_round = time.monotonic()
            if self.should_run_maintenance_tasks:
                self.run_maintenance_tasks()
            self.engine.rest()
            self._update_models()
            found = self._take(idle=True)
            if found:
                return found
            if self.intake.suspended:
                self.check_for_suspension(timeout is None)
            elif timeout is None or (max_idle_time is not None and time.monotonic() - idle_since > max_idle_time):
                return None
            else:
                self._listen()
        return None

    def _take(self, *, idle: bool) -> tuple[Job, Queue] | None:
        if self.writer.trouble:
            self.writer.look()
            return None
        while found := self._if_it_answers(lambda: self.intake.take(self._models(), self.engine.wants, idle=idle)):
            model, job_id = found
            queue = self._queue(model, self.connection)
            try:
                job = Job.fetch(job_id, connection=self.connection, serializer=JSONSerializer)
                job.origin = queue.name  # where it was found, whatever its record says: its lease belongs there
                return job, queue
            except NoSuchJobError:
                self._forget(job_id, queue, "it was deleted from the queue")
            except (RedisError, StopRequested):
                raise
            except Exception as error:  # noqa: BLE001  # a damaged field makes rq raise anything, for every worker alike
                self._forget(job_id, queue, f"rq's record of it cannot be read: {type(error).__name__}: {error}")
                self.connection.expire(Job.key_for(job_id), DAMAGED_TTL_S)
        return None

    def _forget(self, job_id: str, queue: Queue, message: str) -> None:
        """rq cannot give the job any more; ours ends too, and leaves the list from which a dead worker's jobs are taken last."""
        self.results.start(job_id, self.name)
        self.results.fail(job_id, self.name, message)
        self.connection.lrem(queue.intermediate_queue_key, 0, job_id)

    def _listen(self) -> None:
        """Wait for a bell; a signal may end this at any moment."""
        self._listening = True
        try:
            if self._stop_requested:
                return
            if self.records and time.monotonic() >= self._redis_at and not self.writer.trouble:
                self._if_it_answers(lambda: self.intake.listen(self._models()))
            else:
                time.sleep(LATER_S)
        finally:
            self._listening = False
