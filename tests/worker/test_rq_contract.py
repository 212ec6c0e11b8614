"""rq's private seams that worker/rq_worker.py and app/jobs.py stand on, as rq 3.0.0 has them. After an upgrade this fails first."""

import importlib.metadata
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from redis import Redis
from rq import Queue, Retry, registry, worker_registration
from rq.exceptions import AbandonedJobError, DeserializationError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.worker import BaseWorker

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


def lease(worker: BaseWorker, job: Job) -> Execution:
    execution = worker.prepare_execution(job)
    worker.prepare_job_execution(job, remove_from_intermediate_queue=True)
    return execution


def pop(queue: Queue) -> Job:
    found = Queue.dequeue_any([queue], None, connection=queue.connection, serializer=JSONSerializer)
    assert found
    return found[0]


def keys(redis: Redis, pattern: str) -> set[str]:
    return {key.decode() for key in redis.keys(pattern)}


def test_the_version_is_the_one_that_was_read() -> None:
    assert importlib.metadata.version("rq") == "3.0.0"


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (BaseWorker.prepare_execution, ["self", "job"]),
        (BaseWorker.prepare_job_execution, ["self", "job", "remove_from_intermediate_queue"]),
        (BaseWorker._finalize_success, ["self", "job", "queue", "execution", "return_value"]),
        (BaseWorker._finalize_failure, ["self", "job", "queue", "execution", "exc_info"]),
        (BaseWorker.maintain_heartbeats, ["self", "job", "execution"]),
        (BaseWorker.cleanup_execution, ["self", "job", "pipeline", "execution"]),
        (BaseWorker.execute_job, ["self", "job", "queue"]),
        (BaseWorker.heartbeat, ["self", "timeout", "pipeline"]),
        (BaseWorker.get_heartbeat_ttl, ["self", "job", "working_time"]),
        (BaseWorker.clean_registries, ["self"]),
        (BaseWorker.run_maintenance_tasks, ["self"]),
        (BaseWorker.teardown, ["self"]),
        (BaseWorker._install_signal_handlers, ["self"]),
        (BaseWorker.set_state, ["self", "state", "pipeline"]),
        (BaseWorker.count, ["connection", "queue"]),
        (Queue.dequeue_any, ["queues", "timeout", "connection", "job_class", "serializer", "death_penalty_class"]),
        (Queue.enqueue_job, ["self", "job", "pipeline", "at_front", "unique"]),
        (Queue._enqueue_job, ["self", "job", "pipeline", "at_front", "unique"]),
        (Job.exists, ["job_id", "connection"]),
        (registry.clean_registries, ["queue", "exception_handlers"]),
        (registry.StartedJobRegistry.get_job_and_execution_ids, ["self", "start", "end", "desc", "cleanup"]),
        (worker_registration.clean_worker_registry, ["queue"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_a_seam_has_the_parameters_it_had(function: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_the_names_of_the_keys_are_those_that_scripts_and_the_api_use(redis: Redis, queue: Queue, enqueue: Callable[..., Job]) -> None:
    job = enqueue()
    assert (queue.key, queue.intermediate_queue_key) == (f"rq:queue:{NAME}", f"rq:queue:{NAME}:intermediate")
    assert (Queue.redis_queue_namespace_prefix, Job.redis_job_namespace_prefix) == ("rq:queue:", "rq:job:")
    assert job.key == f"rq:job:{job.id}"
    assert queue.started_job_registry.key == f"rq:wip:{NAME}"
    assert redis.lrange(queue.key, 0, -1) == [job.id.encode()]


def test_one_queue_is_popped_into_the_intermediate_list(redis: Redis, queue: Queue, enqueue: Callable[..., Job]) -> None:
    job = enqueue()
    assert pop(queue).id == job.id
    assert (redis.llen(queue.key), redis.lrange(queue.intermediate_queue_key, 0, -1)) == (0, [job.id.encode()])
    assert Queue.dequeue_any([queue], None, connection=redis, serializer=JSONSerializer) is None, "and does not block"


def test_a_popped_job_is_not_imported_and_its_name_is_data(queue: Queue, enqueue: Callable[..., Job]) -> None:
    enqueue(name="no.such.module.function")
    assert pop(queue).func_name == "no.such.module.function"


def test_a_job_whose_data_is_not_ours_is_leased_before_its_name_is_read(
    redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]
) -> None:
    """prepare_job_execution reads the name last, for the process title: by then all that it writes is written."""
    job = enqueue()
    redis.hset(job.key, "data", b"\x80\x04N.")
    popped = pop(queue)
    worker.prepare_execution(popped)
    with pytest.raises(DeserializationError):
        worker.prepare_job_execution(popped, remove_from_intermediate_queue=True)
    assert popped.started_at is not None
    assert redis.hget(job.key, "status") == b"started"
    assert redis.llen(queue.intermediate_queue_key) == 0


def test_a_lease_is_an_execution_with_a_score_that_ends(
    redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]
) -> None:
    enqueue()
    job = pop(queue)
    worker.get_heartbeat_ttl = lambda job, working_time=0.0: 15
    execution = lease(worker, job)
    score = redis.zscore(queue.started_job_registry.key, f"{job.id}:{execution.id}")
    assert now().timestamp() < score <= now().timestamp() + 15
    assert queue.started_job_registry.get_job_and_execution_ids(cleanup=False) == [(job.id, execution.id)]
    assert redis.llen(queue.intermediate_queue_key) == 0
    assert job.started_at is not None and job.get_status() == JobStatus.STARTED
    assert keys(redis, "rq:execution*") == {f"rq:execution:{job.id}:{execution.id}", f"rq:executions:{job.id}"}


def test_many_leases_at_once_are_renewed_apart(redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]) -> None:
    leases = [(job, lease(worker, job)) for job in (enqueue(), enqueue())]
    worker.get_heartbeat_ttl = lambda job, working_time=0.0: 1000
    worker.maintain_heartbeats(*leases[0])
    one, other = (redis.zscore(queue.started_job_registry.key, f"{job.id}:{execution.id}") for job, execution in leases)
    assert one > other + 800


def test_a_heartbeat_does_not_bring_back_a_lease_that_was_taken_away(
    redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]
) -> None:
    job = enqueue()
    execution = lease(worker, job)
    redis.delete(queue.started_job_registry.key)
    worker.maintain_heartbeats(job, execution)
    assert redis.zcard(queue.started_job_registry.key) == 0


def test_success_ends_the_lease_and_the_record(redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]) -> None:
    enqueue()
    job = pop(queue)
    worker._finalize_success(job, queue, lease(worker, job), None)
    assert redis.hget(job.key, "status") == b"finished"
    assert 0 < redis.ttl(job.key) <= 60
    assert keys(redis, "rq:execution*") == keys(redis, "rq:worker:*:executions") == set()
    assert redis.zcard(queue.started_job_registry.key) == 0


def test_failure_without_retries_left_ends_the_lease(redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]) -> None:
    enqueue()
    job = pop(queue)
    execution = lease(worker, job)
    job.retries_left = 0
    worker._finalize_failure(job, queue, execution, (RuntimeError, RuntimeError("why"), None))
    assert redis.hget(job.key, "status") == b"failed"
    assert (redis.llen(queue.key), redis.zcard(queue.started_job_registry.key)) == (0, 0)
    assert redis.zscore(f"rq:failed:{NAME}", job.id) is not None
    assert keys(redis, "rq:execution*") == set()


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


def test_a_job_can_be_put_back_at_the_front(redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]) -> None:
    first = enqueue()
    second = enqueue()
    job = pop(queue)
    lease(worker, job)
    with redis.pipeline() as pipeline:
        queue._enqueue_job(job, pipeline=pipeline, at_front=True)
        pipeline.execute()
    assert redis.lrange(queue.key, 0, -1) == [first.id.encode(), second.id.encode()]
    assert redis.hget(job.key, "status") == b"queued"
    assert Job.fetch(job.id, connection=redis, serializer=JSONSerializer).retries_left == 2, "no retry was spent"


@pytest.mark.parametrize("retries", [0, 1])
def test_an_abandoned_job_is_told_to_the_handlers_and_requeued_only_with_retries_left(
    redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job], retries: int
) -> None:
    job = enqueue(retries)
    lease(worker, pop(queue))
    redis.zadd(queue.started_job_registry.key, {entry: 1 for entry in redis.zrange(queue.started_job_registry.key, 0, -1)})
    told: list[tuple[str, Any, int | None]] = []

    def handler(job: Job, kind: Any, error: Any, trace: Any) -> bool:
        told.append((job.id, kind, job.retries_left))
        return True

    registry.clean_registries(queue, [handler])
    assert told == [(job.id, AbandonedJobError, retries or None)]
    assert redis.lrange(queue.key, 0, -1) == [job.id.encode()] * retries
    assert redis.hget(job.key, "status") == (b"queued" if retries else b"failed")
    assert redis.zcard(queue.started_job_registry.key) == 0


def test_a_lease_that_runs_is_not_abandoned(redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]) -> None:
    lease(worker, enqueue())
    registry.clean_registries(queue, [lambda *_: pytest.fail("it runs")])
    assert redis.zcard(queue.started_job_registry.key) == 1


def test_registries_forget_what_has_ended_only_when_they_are_cleaned(
    redis: Redis, queue: Queue, worker: BaseWorker, enqueue: Callable[..., Job]
) -> None:
    """Which is why our maintenance cleans them all: else the id of every job of all time would stay."""
    done, failed = enqueue(), enqueue(0)
    worker._finalize_success(done, queue, lease(worker, done), None)
    worker._finalize_failure(failed, queue, lease(worker, failed), (RuntimeError, RuntimeError("why"), None))
    sets = [f"rq:finished:{NAME}", f"rq:failed:{NAME}"]
    assert [redis.zcard(key) for key in sets] == [1, 1]
    assert [redis.ttl(key) for key in sets] == [-1, -1]
    for key, job in zip(sets, (done, failed), strict=True):
        redis.zadd(key, {job.id: 1})
    registry.clean_registries(queue)
    assert [redis.zcard(key) for key in sets] == [0, 0]


def test_maintenance_is_due_at_first_and_then_by_the_interval(worker: BaseWorker) -> None:
    assert worker.should_run_maintenance_tasks is True
    worker.last_cleaned_at = now()
    assert worker.should_run_maintenance_tasks is False
    worker.last_cleaned_at = now() - timedelta(seconds=worker.maintenance_interval + 1)
    assert worker.should_run_maintenance_tasks is True


def test_an_idle_worker_looks_around_after_worker_ttl_less_15_s(queue: Queue, redis: Redis) -> None:
    assert BaseWorker([queue], connection=redis, worker_ttl=20).dequeue_timeout == 5


def test_a_stop_while_busy_is_a_flag_that_execute_job_reads(worker: BaseWorker) -> None:
    assert worker._stop_requested is False
    worker.set_state("busy")
    worker._shutdown_requested_date = now()
    worker._shutdown()
    assert worker._stop_requested is True
