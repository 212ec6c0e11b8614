"""rq's private seams that the worker and app/jobs.py stand on, as rq 3.0.0 has them. After an upgrade this fails first."""

import importlib.metadata
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from redis import Redis
from rq import Callback, Queue, Retry, command, registry, suspension, worker_registration
from rq.exceptions import DeserializationError, StopRequested
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.worker import BaseWorker, WorkerStatus

NAME = "dit-contract"


@pytest.fixture
def queue(redis: Redis) -> Queue:
    return Queue(NAME, connection=redis, serializer=JSONSerializer)


@pytest.fixture
def worker(queue: Queue, redis: Redis) -> BaseWorker:
    return BaseWorker([queue], connection=redis, serializer=JSONSerializer)


@pytest.fixture
def enqueue(queue: Queue, redis: Redis) -> Callable[..., Job]:
    """As app.jobs does."""

    def put(retries: int = 2, name: str = "dit.generate", **options: Any) -> Job:
        retry = Retry(max=retries) if retries else None
        job = Job.create(
            name, connection=redis, serializer=JSONSerializer, timeout=-1, result_ttl=60, failure_ttl=60, retry=retry, **options
        )
        return queue.enqueue_job(job)

    return put


def lease(worker: BaseWorker, job: Job, ttl: int = 15) -> Execution:
    """As worker/rq_worker.py does."""
    with worker.connection.pipeline() as pipeline:
        execution = Execution.create(job, ttl, pipeline, worker.name)
        worker.set_state(WorkerStatus.BUSY, pipeline)
        job.prepare_for_execution(worker.name, pipeline)
        pipeline.persist(job.key)
        pipeline.lrem(f"rq:queue:{NAME}:intermediate", 1, job.id)
        pipeline.execute()
    worker.executions[execution.id] = execution
    return execution


def success(worker: BaseWorker, job: Job, execution: Execution) -> None:
    job.ended_at = now()
    with worker.connection.pipeline() as pipeline:
        worker.increment_successful_job_count(pipeline)
        worker.increment_total_working_time(job.ended_at - job.started_at, pipeline)
        job._handle_success(job.get_result_ttl(500), pipeline, worker.name, execution.id, execution.created_at, job.ended_at)
        job.cleanup(job.get_result_ttl(500), pipeline, remove_from_queue=False)
        worker.cleanup_execution(job, pipeline, execution)
        pipeline.execute()


def failure(worker: BaseWorker, queue: Queue, job: Job, execution: Execution) -> None:
    job.retries_left, job.webhooks, job.ended_at = 0, [], now()
    worker.handle_job_failure(job, queue, exc_string="why", execution=execution)


def keys(redis: Redis, pattern: str) -> set[str]:
    return {key.decode() for key in redis.keys(pattern)}


def test_the_version_is_the_one_that_was_read() -> None:
    assert importlib.metadata.version("rq") == "3.0.0"


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (BaseWorker.bootstrap, ["self", "logging_level", "date_format", "log_format"]),
        (BaseWorker.register_birth, ["self"]),
        (BaseWorker.serialize, ["self"]),
        (BaseWorker.subscribe, ["self"]),
        (BaseWorker.heartbeat, ["self", "timeout", "pipeline"]),
        (BaseWorker.get_heartbeat_ttl, ["self", "job", "working_time"]),
        (BaseWorker.teardown, ["self"]),
        (BaseWorker._install_signal_handlers, ["self"]),
        (BaseWorker.request_stop, ["self", "signum", "frame"]),
        (BaseWorker.request_force_stop, ["self", "signum", "frame"]),
        (BaseWorker._shutdown, ["self"]),
        (BaseWorker.handle_payload, ["self", "message"]),
        (BaseWorker._pubsub_exception_handler, ["self", "exc", "pubsub", "pubsub_thread"]),
        (BaseWorker.check_for_suspension, ["self", "burst"]),
        (BaseWorker.run_maintenance_tasks, ["self"]),
        (BaseWorker.clean_registries, ["self"]),
        (BaseWorker.dequeue_job_and_maintain_ttl, ["self", "timeout", "max_idle_time"]),
        (BaseWorker.execute_job, ["self", "job", "queue"]),
        (BaseWorker.set_state, ["self", "state", "pipeline"]),
        (BaseWorker.procline, ["self", "message"]),
        (BaseWorker.count, ["connection", "queue"]),
        (BaseWorker.cleanup_execution, ["self", "job", "pipeline", "execution"]),
        (BaseWorker.increment_successful_job_count, ["self", "pipeline"]),
        (BaseWorker.increment_total_working_time, ["self", "job_execution_time", "pipeline"]),
        (BaseWorker.handle_job_failure, ["self", "job", "queue", "started_job_registry", "exc_string", "execution"]),
        (Execution.create, ["job", "ttl", "pipeline", "worker_name"]),
        (ExecutionRegistry.__init__, ["self", "job_id", "connection"]),
        (Job.prepare_for_execution, ["self", "worker_name", "pipeline"]),
        (Job.get_result_ttl, ["self", "default_ttl"]),
        (
            Job._handle_success,
            ["self", "result_ttl", "pipeline", "worker_name", "execution_id", "execution_started_at", "execution_ended_at"],
        ),
        (Job.cleanup, ["self", "ttl", "pipeline", "remove_from_queue"]),
        (Queue.enqueue_job, ["self", "job", "pipeline", "at_front", "unique"]),
        (registry.FinishedJobRegistry.cleanup, ["self", "timestamp", "exception_handlers"]),
        (registry.FailedJobRegistry.cleanup, ["self", "timestamp", "exception_handlers"]),
        (registry.StartedJobRegistry.get_job_and_execution_ids, ["self", "start", "end", "desc", "cleanup"]),
        (worker_registration.register, ["worker", "pipeline"]),
        (worker_registration.clean_worker_registry, ["queue"]),
        (command.parse_payload, ["payload"]),
        (command.handle_command, ["worker", "payload"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_a_seam_has_the_parameters_it_had(function: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_the_names_of_the_keys_are_those_that_scripts_and_the_api_use(
    redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]
) -> None:
    job = enqueue()
    assert (queue.key, queue.intermediate_queue_key) == (f"rq:queue:{NAME}", f"rq:queue:{NAME}:intermediate")
    assert (Queue.redis_queue_namespace_prefix, Job.redis_job_namespace_prefix) == ("rq:queue:", "rq:job:")
    assert job.key == f"rq:job:{job.id}"
    assert (queue.started_job_registry.key, queue.failed_job_registry.key) == (f"rq:wip:{NAME}", f"rq:failed:{NAME}")
    assert redis.lrange(queue.key, 0, -1) == [job.id.encode()]
    execution = lease(worker, job)
    assert execution.key == f"rq:execution:{job.id}:{execution.id}"
    assert ExecutionRegistry(job_id=job.id, connection=redis).key == f"rq:executions:{job.id}"
    assert (worker.key, worker.executions_key) == (f"rq:worker:{worker.name}", f"rq:worker:{worker.name}:executions")
    assert worker_registration.WORKERS_BY_QUEUE_KEY == "rq:workers:%s"
    assert suspension.WORKERS_SUSPENDED == "rq:suspended"


def test_a_job_that_is_enqueued_in_a_transaction_is_written_by_nothing_else(redis: Redis, queue: Queue) -> None:
    """All or nothing of a submission depends on it."""
    with redis.monitor() as monitor, redis.pipeline() as pipeline:
        job = Job.create("dit.generate", connection=redis, serializer=JSONSerializer, timeout=-1, retry=Retry(max=2))
        queue.enqueue_job(job, pipeline=pipeline)
        assert pipeline.explicit_transaction
        pipeline.execute()
        redis.echo("end")
        said: list[str] = []
        for entry in monitor.listen():
            said.append(entry["command"].split()[0].upper())
            if said[-1] == "ECHO":
                break
    written = [name for name in said if name not in ("INFO", "ECHO", "CLIENT")]
    assert written[0] == "MULTI" and written[-1] == "EXEC" and written.count("MULTI") == 1, said


def test_what_makes_a_job_can_be_taken_from_a_pipeline_that_is_never_sent(redis: Redis, queue: Queue) -> None:
    """A submission hands these commands to its script: app/admission.py."""
    with redis.pipeline() as pipeline:
        job = Job.create("dit.generate", connection=redis, serializer=JSONSerializer, timeout=-1, retry=Retry(max=2))
        queue.enqueue_job(job, pipeline=pipeline)
        commands = [arguments for arguments, _ in pipeline.command_stack]
    assert redis.keys("*") == []
    assert {words[0] for words in commands} <= {"HSET", "SADD", "RPUSH"}
    for words in commands:
        redis.execute_command(*words)
    assert redis.lrange(queue.key, 0, -1) == [job.id.encode()] and redis.smembers("rq:queues") == {queue.key.encode()}
    assert Job.fetch(job.id, connection=redis, serializer=JSONSerializer).func_name == "dit.generate"


def test_a_job_reads_its_name_as_data_and_imports_nothing(enqueue: Callable[..., Job], redis: Redis) -> None:
    job = enqueue(name="no.such.module.function")
    assert Job.fetch(job.id, connection=redis, serializer=JSONSerializer).func_name == "no.such.module.function"


def test_a_job_whose_data_is_not_ours_is_read_and_says_so_when_asked_its_name(redis: Redis, enqueue: Callable[..., Job]) -> None:
    job = enqueue()
    redis.hset(job.key, "data", b"\x80\x04N.")
    fetched = Job.fetch(job.id, connection=redis, serializer=JSONSerializer)
    with pytest.raises(DeserializationError):
        _ = fetched.func_name


def test_our_lease_is_in_rqs_books_what_rqs_own_is(redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]) -> None:
    """Which takes two transactions, prepare_execution and prepare_job_execution, and no script between."""

    def books(take: Callable[[Job], Execution]) -> dict[str, Any]:
        redis.flushall()
        job = enqueue()
        redis.lmove(queue.key, queue.intermediate_queue_key)
        execution = take(job)
        found: dict[str, Any] = {}
        for key in redis.keys("*"):
            name = key.decode().replace(job.id, "JOB").replace(execution.id, "EXECUTION")
            kind = redis.type(key)
            value = (
                sorted(redis.hgetall(key)) if kind == b"hash" else redis.zcard(key) if kind == b"zset" else redis.object("encoding", key)
            )
            found[name] = (kind, value, redis.ttl(key) > 0)
        assert redis.hget(job.key, "status") == b"started" and redis.hget(job.key, "worker_name") == worker.name.encode()
        assert redis.hget(worker.key, "state") == b"busy" and execution.id in worker.executions
        return found

    def rqs(job: Job) -> Execution:
        execution = worker.prepare_execution(job)
        worker.prepare_job_execution(job, remove_from_intermediate_queue=True)
        redis.hdel(worker.key, "last_heartbeat")  # ours is the heart's
        redis.persist(worker.key)
        return execution

    assert books(lambda job: lease(worker, job)) == books(rqs)


def test_a_lease_is_an_execution_with_a_score_that_ends(
    redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]
) -> None:
    job = enqueue()
    execution = lease(worker, job)
    score = redis.zscore(queue.started_job_registry.key, f"{job.id}:{execution.id}")
    assert now().timestamp() < score <= now().timestamp() + 15
    assert queue.started_job_registry.get_job_and_execution_ids(cleanup=False) == [(job.id, execution.id)]
    assert job.started_at is not None and job.get_status() == JobStatus.STARTED
    assert keys(redis, "rq:execution*") == {f"rq:execution:{job.id}:{execution.id}", f"rq:executions:{job.id}"}


def test_success_ends_the_lease_and_the_record(redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]) -> None:
    job = enqueue()
    success(worker, job, lease(worker, job))
    assert redis.hget(job.key, "status") == b"finished"
    assert 0 < redis.ttl(job.key) <= 60
    assert keys(redis, "rq:execution*") == keys(redis, "rq:worker:*:executions") == set()
    assert redis.zcard(queue.started_job_registry.key) == 0


def test_failure_without_retries_left_ends_the_lease(redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]) -> None:
    job = enqueue()
    redis.delete(queue.key)
    execution = lease(worker, job)
    failure(worker, queue, job, execution)
    assert redis.hget(job.key, "status") == b"failed"
    assert (redis.llen(queue.key), redis.zcard(queue.started_job_registry.key)) == (0, 0)
    assert redis.zscore(f"rq:failed:{NAME}", job.id) is not None
    assert keys(redis, "rq:execution*") == set()


def test_a_failure_that_is_booked_calls_nothing(redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]) -> None:
    """rq's own _finalize_failure would import what the job names."""
    job = enqueue(on_failure=Callback("no.such.module.function"))
    fetched = Job.fetch(job.id, connection=redis, serializer=JSONSerializer)
    failure(worker, queue, fetched, lease(worker, fetched))
    assert redis.hget(job.key, "status") == b"failed"


def test_cleanup_of_an_execution_leaves_the_job_as_it_is(
    redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]
) -> None:
    job = enqueue()
    execution, other = lease(worker, job), lease(worker, job)
    before = redis.hgetall(job.key)
    with redis.pipeline() as pipeline:
        worker.cleanup_execution(job, pipeline=pipeline, execution=execution)
        pipeline.execute()
    assert redis.hgetall(job.key) == before and redis.ttl(job.key) == -1
    assert queue.started_job_registry.get_job_and_execution_ids(cleanup=False) == [(job.id, other.id)]


def test_a_stopped_job_is_stopped_in_rqs_books_and_the_next_failure_is_one(
    redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]
) -> None:
    for expected in (b"stopped", b"failed"):
        job = enqueue()
        execution = lease(worker, job)
        if expected == b"stopped":
            worker._stopped_job_id = job.id
        failure(worker, queue, job, execution)
        assert redis.hget(job.key, "status") == expected
        assert redis.zscore(f"rq:failed:{NAME}", job.id) is not None and worker._stopped_job_id is None


@pytest.mark.parametrize("retries", [0, 1])
def test_rqs_own_cleaning_requeues_an_abandoned_job_only_with_retries_left_and_else_fails_it(
    redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job], retries: int
) -> None:
    """`rq info` does it too, behind our back; so app/jobs.py gives each job more retries than it will ever need."""
    job = enqueue(retries)
    redis.delete(queue.key)
    lease(worker, job)
    redis.zadd(queue.started_job_registry.key, {entry: 1 for entry in redis.zrange(queue.started_job_registry.key, 0, -1)})
    assert queue.started_job_registry.count == 0
    assert redis.lrange(queue.key, 0, -1) == [job.id.encode()] * retries
    assert redis.hget(job.key, "status") == (b"queued" if retries else b"failed")


def test_registries_forget_what_has_ended_only_when_they_are_cleaned(
    redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]
) -> None:
    """Which is why our maintenance cleans them all: else the id of every job of all time would stay."""
    done, failed = enqueue(), enqueue(0)
    success(worker, done, lease(worker, done))
    failure(worker, queue, failed, lease(worker, failed))
    sets = [f"rq:finished:{NAME}", f"rq:failed:{NAME}"]
    assert [redis.zcard(key) for key in sets] == [1, 1]
    assert [redis.ttl(key) for key in sets] == [-1, -1]
    for key, job in zip(sets, (done, failed), strict=True):
        redis.zadd(key, {job.id: 1})
    for kind in (registry.FinishedJobRegistry, registry.FailedJobRegistry):
        kind(queue=queue).cleanup()
    assert [redis.zcard(key) for key in sets] == [0, 0]


def test_maintenance_is_due_at_first_and_then_by_the_interval(worker: BaseWorker) -> None:
    assert worker.should_run_maintenance_tasks is True
    worker.last_cleaned_at = now()
    assert worker.should_run_maintenance_tasks is False
    worker.last_cleaned_at = now() - timedelta(seconds=worker.maintenance_interval + 1)
    assert worker.should_run_maintenance_tasks is True


def test_the_socket_times_out_before_the_server_is_taken_for_dead(queue: Queue, redis: Redis) -> None:
    worker = BaseWorker([queue], connection=redis, worker_ttl=16)
    assert worker.connection_timeout == redis.connection_pool.connection_kwargs["socket_timeout"] == 11


def test_a_stop_while_busy_is_a_flag_and_while_idle_an_exception(worker: BaseWorker) -> None:
    """Ours is a flag always; `work()` and check_for_suspension() read it, and `work()` ends on what either leaves."""
    assert worker._stop_requested is False
    worker._shutdown_requested_date = now()
    with pytest.raises(StopRequested):
        worker._shutdown()
    worker.set_state("busy")
    worker._shutdown()
    assert worker._stop_requested is True


class Idle(BaseWorker):
    """One whose next job is what `found` says."""

    found: Any = None

    def _install_signal_handlers(self) -> None:
        pass

    def subscribe(self) -> None:
        pass

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> Any:
        return self.found

    def execute_job(self, job: Job, queue: Queue) -> None:
        raise SystemExit(7)


def test_work_ends_where_there_is_no_job(queue: Queue, redis: Redis) -> None:
    worker = Idle([queue], connection=redis, serializer=JSONSerializer)
    assert worker.work() is False
    assert redis.hexists(worker.key, "death"), "it has signed off"


def test_work_signs_off_and_lets_a_system_exit_through(queue: Queue, redis: Redis, enqueue: Callable[..., Job]) -> None:
    worker = Idle([queue], connection=redis, serializer=JSONSerializer)
    worker.found = (enqueue(), queue)
    with pytest.raises(SystemExit) as ended:
        worker.work()
    assert ended.value.code == 7 and redis.hexists(worker.key, "death")


def test_a_suspended_worker_waits_for_the_end_of_it_or_a_stop(redis: Redis, worker: BaseWorker) -> None:
    suspension.suspend(redis)
    with pytest.raises(StopRequested):
        worker.check_for_suspension(True)
    worker._stop_requested = True
    worker.check_for_suspension(False)


def test_the_commands_are_what_the_worker_takes_them_for(redis: Redis, worker: BaseWorker, enqueue: Callable[..., Job]) -> None:
    job = enqueue()
    execution = lease(worker, job)
    with redis.pubsub() as pubsub:
        pubsub.subscribe(worker.pubsub_channel_name)
        command.send_stop_job_command(redis, job.id, serializer=JSONSerializer)
        command.send_stop_execution_command(redis, job.id, execution.id)
        command.send_shutdown_command(redis, worker.name)
        said = [
            command.parse_payload(message) for message in iter(lambda: pubsub.get_message(timeout=5), None) if message["type"] == "message"
        ]
    assert [payload["command"] for payload in said] == ["stop-job", "stop-execution", "shutdown"]
    assert [payload["job_id"] for payload in said[:2]] == [job.id, job.id]
