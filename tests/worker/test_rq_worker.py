"""A real worker on a real Redis: every job ends once, whatever happens to those who run it."""

import io
import json
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from redis import Redis
from redis.exceptions import ConnectionError
from rq.utils import now

from worker import heart, maintenance, protocol
from worker.protocol import GenerationRequest, ModelRecord
from worker.rq_worker import DiTWorker
from worker.scheduler import Picture

MakeRequest = Callable[..., GenerationRequest]
MakeWorker = Callable[..., DiTWorker]

pytestmark = pytest.mark.usefixtures("in_this_process")


def work(worker: DiTWorker) -> None:
    """Until the queue is empty."""
    worker.work(burst=True)


def stop(worker: DiTWorker) -> None:
    """What SIGTERM does to a busy worker."""
    worker._shutdown_requested_date = now()
    worker._shutdown()


def take(worker: DiTWorker, jobs: Any) -> str:
    """The worker pops a job and leases it, and is not heard of again."""
    found = worker._take(idle=True)
    assert found, "nothing waits"
    worker._lease(found[0])
    return str(found[0].id)


def assert_clean(jobs: Any, worker: DiTWorker) -> None:
    """Nothing of any job is left in the queue, among the leases or in the engine."""
    assert jobs.leftovers() == []
    assert worker.leases == {} and not worker.engine.busy and worker.executions == {}
    for lane in worker.engine.lanes.values():
        assert not lane.scheduler.jobs and len(lane.scheduler.free_slots) == lane.runner.slots


def expected(make_worker: MakeWorker, jobs: Any, request: GenerationRequest) -> list[bytes]:
    """The pictures that the request gives where nothing happens."""
    job = jobs.submit(request)
    work(make_worker())
    return jobs.images(job)


# Jobs that end well.


def test_jobs_of_different_steps_all_succeed_and_leave_nothing_behind(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest
) -> None:
    requests = [make_request(steps=steps, seed=steps, class_labels=(0, None, 2)[: 1 + steps % 3]) for steps in (1, 9, 3, 5, 2)]
    ids = [jobs.submit(request) for request in requests]
    work(worker)
    for job, request in zip(ids, requests, strict=True):
        pictures = jobs.images(job)
        assert len(pictures) == request.num_images
        for index, png in enumerate(pictures):
            with Image.open(io.BytesIO(png)) as image:
                image.load()
                assert image.size == (16, 16)
                inside = json.loads(image.text["dit"])
            assert (inside["seed"], inside["checkpoint"]) == (request.seed + index, worker.records[0].checkpoint)
        assert jobs.rq_status(job) == "finished"
        assert 590 <= redis.ttl(protocol.job_key(job)) <= 600
    assert_clean(jobs, worker)
    assert redis.keys("rq:worker*") == [key for key in redis.keys("rq:worker*") if redis.ttl(key) > 0], "its registration ends too"


def test_the_record_of_a_job_that_succeeded_is_whole(jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> None:
    job = jobs.submit(make_request(class_labels=(0, 1), seed=30))
    work(worker)
    record = jobs.record(job)
    assert float(record["created_at"]) <= float(record["started_at"]) <= float(record["finished_at"])
    assert (record["attempts"], record["error"]) == ("1", "")
    entries = json.loads(record["images"])
    assert [(entry["index"], entry["seed"], entry["bytes"]) for entry in entries] == [
        (i, 30 + i, len(png)) for i, png in enumerate(jobs.images(job))
    ]


@pytest.mark.usefixtures("quick")
def test_the_events_of_a_job_tell_its_story(jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> None:
    job = jobs.submit(make_request(steps=4))
    work(worker)
    events = jobs.events(job)
    assert [name for name, _ in events if name != "progress"] == ["queued", "image", "done"]
    steps = [data["step"] for name, data in events if name == "progress"]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] <= 4
    assert {data["steps"] for name, data in events if name == "progress"} == {4}
    image = next(data for name, data in events if name == "image")
    assert (image["index"], image["seed"], image["url"]) == (0, 7, f"/jobs/{job}/images/0")
    assert events[-1] == ("done", {"status": "succeeded"})


def test_a_job_that_comes_late_joins_those_that_run(jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> None:
    long = jobs.submit(make_request(steps=30))
    late: list[str] = []
    worker.engine.before[3] = lambda: late.append(jobs.submit(make_request(steps=2, seed=9)))
    work(worker)
    assert jobs.status(long) == jobs.status(late[0]) == "succeeded"
    assert worker.engine.ticks <= 32, "it took no step of its own"
    assert float(jobs.record(late[0])["finished_at"]) <= float(jobs.record(long)["finished_at"])


def test_the_same_request_gives_the_same_bytes_alone_and_in_company(jobs: Any, make_worker: MakeWorker, make_request: MakeRequest) -> None:
    request = make_request(steps=5, guidance_scale=1.0)
    alone = expected(make_worker, jobs, request)
    ids = [jobs.submit(make_request(steps=steps, seed=100 + steps, guidance_scale=3.0)) for steps in (2, 7, 4)]
    again = jobs.submit(request)
    work(make_worker())
    assert jobs.images(again) == alone
    assert all(jobs.images(job) != alone for job in ids)


def test_a_worker_tells_what_it_serves_until_it_stops(redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> None:
    jobs.submit(make_request())
    told: list[Any] = []
    worker.engine.before[1] = lambda: told.extend(
        [redis.get("dit:model:tiny"), redis.ttl("dit:model:tiny"), redis.smembers(protocol.MODELS_KEY)]
    )
    work(worker)
    assert ModelRecord.parse(told[0]) == worker.records[0]
    assert 0 < told[1] <= protocol.MODEL_TTL_S and told[2] == {b"tiny"}
    assert redis.get("dit:model:tiny") is None


def test_a_worker_that_stops_leaves_the_record_to_another_of_its_model(redis: Redis, make_worker: MakeWorker) -> None:
    one, other = make_worker(), make_worker()
    other.register_birth()
    work(one)
    assert redis.get("dit:model:tiny") is not None


def test_promises_are_kept_while_a_step_runs(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases, the worker's own heartbeat and the model's record, all about to end, are renewed beside a step that takes its time."""
    monkeypatch.setattr(heart, "RENEW_EVERY_S", 0.05)
    for _ in range(2):
        jobs.submit(make_request(steps=6))
    left: list[float] = []

    def long_step() -> None:
        for entry in redis.zrange(jobs.started, 0, -1):
            redis.zadd(jobs.started, {entry: time.time() + 1})
        redis.expire(worker.key, 5)
        redis.delete(protocol.model_key("tiny"))
        deadline = time.monotonic() + 30
        while not redis.exists(protocol.model_key("tiny")) and time.monotonic() < deadline:
            time.sleep(0.01)
        left.extend(score - time.time() for _, score in redis.zrange(jobs.started, 0, -1, withscores=True))
        left.append(redis.ttl(worker.key))

    worker.engine.before = {2: long_step}
    work(worker)
    assert len(left) == 3
    assert all(2 < seconds <= protocol.LEASE_S for seconds in left[:2]) and left[2] > 20


# Jobs that cannot be done.


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `trap` that leaves a file when it is imported, and another when it is called."""
    (tmp_path / "trap.py").write_text(
        f"from pathlib import Path\nfolder = Path({str(tmp_path)!r})\n(folder / 'imported').touch()\n"
        "def spring(*args, **kwargs):\n    (folder / 'called').touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["trap.spring", "os.system", "worker.rq_worker.DiTWorker", "", None, ["dit.generate"]], ids=str)
def test_a_job_that_names_another_operation_fails_and_nothing_is_imported_or_called(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest, trap: Path, name: Any
) -> None:
    job, neighbour = jobs.submit(make_request()), jobs.submit(make_request(seed=1))
    data = json.dumps([name, None, [f"touch {trap}/called"], {}]).encode()
    redis.hset(f"rq:job:{job}", "data", data)
    work(worker)
    assert (jobs.status(job), jobs.rq_status(job)) == ("failed", "failed")
    assert jobs.record(job)["error"] == f"operation {name!r} is not known; only 'dit.generate' is"
    assert jobs.status(neighbour) == "succeeded"
    assert [path.name for path in trap.iterdir() if path.suffix != ".py"] == [] and "trap" not in sys.modules
    assert_clean(jobs, worker)


class Spring:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import trap; trap.spring()",)


@pytest.mark.parametrize("data", [pickle.dumps(Spring()), b"\xff\x00", b"", b"{}", b"[]", b'"dit.generate"', b"[" * 5], ids=str)
def test_a_job_of_other_data_fails_and_does_not_stop_the_worker(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest, trap: Path, data: bytes
) -> None:
    job, neighbour = jobs.submit(make_request()), jobs.submit(make_request(seed=1))
    redis.hset(f"rq:job:{job}", "data", data)
    work(worker)
    assert (jobs.status(job), jobs.rq_status(job), jobs.status(neighbour)) == ("failed", "failed", "succeeded")
    assert "is not known" in jobs.record(job)["error"]
    assert [path.name for path in trap.iterdir() if path.suffix != ".py"] == []
    assert_clean(jobs, worker)


def test_a_job_that_someone_else_put_into_the_queue_fails_without_a_record(redis: Redis, jobs: Any, worker: DiTWorker, trap: Path) -> None:
    job = worker.queues[0].enqueue("trap.spring", 1, job_timeout=10)
    work(worker)
    assert jobs.rq_status(job.id) == "failed"
    assert redis.keys("dit:job:*") == []
    assert [path.name for path in trap.iterdir() if path.suffix != ".py"] == []
    assert_clean(jobs, worker)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", "99", "payload version b'99' is not understood by this worker (version 3)"),
        ("checkpoint", "f" * 64, "checkpoint ffffffffffff of tiny is not here"),
        ("request", "no JSON", "not a generation request: "),
    ],
)
def test_a_record_that_is_not_for_this_worker_fails_with_a_clear_message(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest, field: str, value: str, message: str
) -> None:
    job, neighbour = jobs.submit(make_request()), jobs.submit(make_request(seed=1))
    redis.hset(protocol.job_key(job), field, value)
    work(worker)
    assert (jobs.status(job), jobs.rq_status(job), jobs.status(neighbour)) == ("failed", "failed", "succeeded")
    assert jobs.record(job)["error"].startswith(message)
    assert jobs.events(job)[-1][1]["status"] == "failed"
    assert_clean(jobs, worker)


@pytest.mark.parametrize("change", [{"sampler": "ddpm"}, {"class_labels": (0, 9)}], ids=["sampler", "class"])
def test_a_request_that_the_model_cannot_do_fails(jobs: Any, worker: DiTWorker, make_request: MakeRequest, change: dict[str, Any]) -> None:
    job = jobs.submit(make_request(**change))
    work(worker)
    assert jobs.status(job) == "failed" and jobs.record(job)["error"]
    assert_clean(jobs, worker)


def test_a_job_whose_step_throws_fails_alone_and_is_not_tried_again(
    jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    clean = expected(make_worker, jobs, make_request(steps=6))
    step = worker.engine.runner.step

    def run(pictures: Sequence[Picture]) -> None:
        if any(picture.class_label == 3 for picture in pictures):
            raise RuntimeError("class 3 is too much")
        step(pictures)

    worker.engine.runner.step = run
    good, bad = jobs.submit(make_request(steps=6)), jobs.submit(make_request(class_labels=(0, 3)))
    work(worker)
    assert jobs.images(good) == clean
    assert jobs.record(bad)["error"] == "the step failed: class 3 is too much"
    assert (jobs.rq_status(bad), jobs.record(bad)["attempts"]) == ("failed", "1")
    assert_clean(jobs, worker)


# Cancels.


def test_a_job_canceled_before_it_starts_is_never_run(jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> None:
    job = jobs.submit(make_request())
    assert jobs.cancel(job) == "queued"
    work(worker)
    assert (jobs.status(job), worker.engine.ticks) == ("canceled", 0)
    assert_clean(jobs, worker)


def test_a_job_canceled_between_queue_and_lease_is_never_run(jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> None:
    job = jobs.submit(make_request())
    found = worker._take(idle=True)
    assert found and jobs.cancel(job) == "queued"
    worker.execute_job(*found)
    assert (jobs.status(job), jobs.rq_status(job), worker.engine.ticks) == ("canceled", "finished", 0)
    assert_clean(jobs, worker)


@pytest.mark.usefixtures("quick")
def test_a_running_job_is_canceled_at_its_next_step_and_its_neighbour_goes_on(
    jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    clean = expected(make_worker, jobs, make_request(steps=9))
    job, neighbour = jobs.submit(make_request(steps=1000, class_labels=(0, 1))), jobs.submit(make_request(steps=9))
    worker.engine.before[3] = lambda: jobs.cancel(job)
    work(worker)
    assert jobs.status(job) == "canceled" and jobs.events(job)[-1] == ("done", {"status": "canceled"})
    assert 9 <= worker.engine.ticks <= 10, "the last may wait for its PNG alone"
    assert jobs.images(neighbour) == clean
    assert_clean(jobs, worker)


@pytest.mark.usefixtures("never_tells")
def test_a_cancel_in_the_last_step_still_wins(
    jobs: Any, worker: DiTWorker, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit itself sees it: nothing more is told."""
    monkeypatch.setattr(worker.results, "cancel", None)
    job = jobs.submit(make_request(steps=4))
    worker.engine.before[3] = lambda: jobs.cancel(job)
    work(worker)
    assert (jobs.status(job), jobs.record(job)["images"], jobs.rq_status(job)) == ("canceled", "[]", "finished")
    assert_clean(jobs, worker)


def test_a_job_canceled_while_its_worker_was_dead_ends_with_the_next(jobs: Any, make_worker: MakeWorker, make_request: MakeRequest) -> None:
    job = jobs.submit(make_request())
    take(make_worker(), jobs)
    assert jobs.cancel(job) == "running"
    jobs.expire_leases()
    worker = make_worker()
    work(worker)
    assert (jobs.status(job), worker.engine.ticks) == ("canceled", 0)


# Workers that die.


def assert_only_what_expires(redis: Redis, jobs: Any) -> None:
    """A dead worker's executions are left to their TTL."""
    assert jobs.waiting() == [] and redis.zcard(jobs.started) == 0 and redis.llen(jobs.intermediate) == 0
    assert all(redis.ttl(key) > 0 for key in jobs.leftovers())


def test_a_job_whose_worker_died_succeeds_with_the_next_and_gives_the_same_bytes(
    redis: Redis, jobs: Any, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    request = make_request(steps=6, class_labels=(1, 2))
    clean = expected(make_worker, jobs, request)
    dead = make_worker()
    job = jobs.submit(request)
    assert take(dead, jobs) == job
    for _ in range(3):
        dead.engine.tick()
    worker = make_worker()
    work(worker)
    assert jobs.status(job) == "running", "its lease has not run out"
    jobs.expire_leases()
    work(make_worker())
    assert jobs.images(job) == clean
    assert (jobs.record(job)["attempts"], jobs.rq_status(job)) == ("2", "finished")
    assert ("queued", {"retry": True}) in jobs.events(job)
    assert_only_what_expires(redis, jobs)


def test_a_busy_worker_looks_for_the_jobs_of_dead_ones_too(jobs: Any, make_worker: MakeWorker, make_request: MakeRequest) -> None:
    lost = jobs.submit(make_request())
    take(make_worker(), jobs)
    busy = make_worker()
    jobs.submit(make_request(steps=20))

    def time_passes() -> None:
        jobs.expire_leases(lost)
        busy.last_cleaned_at = None

    busy.engine.before[3] = time_passes
    work(busy)
    assert jobs.status(lost) == "succeeded"
    assert busy.engine.ticks <= 22, "it joined the job that ran"


def test_a_worker_that_could_not_renew_its_leases_does_not_take_them_from_itself(
    jobs: Any, worker: DiTWorker, make_request: MakeRequest
) -> None:
    """As when Redis comes back after it was away for longer than a lease."""
    job = jobs.submit(make_request(steps=9))

    def redis_comes_back() -> None:
        jobs.expire_leases()
        worker.last_cleaned_at = None

    worker.engine.before[3] = redis_comes_back
    work(worker)
    assert (jobs.status(job), jobs.record(job)["attempts"]) == ("succeeded", "1") and worker.engine.ticks < 12, "no step was made twice"


def test_after_an_outage_other_workers_get_time_to_renew_their_leases(
    jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.submit(make_request())
    take(make_worker(), jobs)
    jobs.expire_leases()

    def away() -> None:
        raise ConnectionError("Redis is away")

    worker._if_it_answers(away)
    worker.clean_registries()
    assert jobs.status(job) == "running"
    worker._clean_at = time.monotonic()
    worker.clean_registries()
    assert jobs.status(job) == "queued"


def test_the_pictures_of_a_job_live_as_long_as_the_last_of_them(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest
) -> None:
    job, stored = jobs.submit(make_request(class_labels=(0,) * 20)), worker._store

    def store_and_wait(*arguments: Any) -> None:
        stored(*arguments)
        for key in redis.keys(f"dit:image:{job}:*") if jobs.status(job) == "running" else ():
            redis.expire(key, 10)

    worker._store = store_and_wait  # type: ignore[method-assign]
    work(worker)
    ttls = [redis.ttl(key) for key in redis.keys(f"dit:image:{job}:*")]
    assert len(ttls) == 20 and all(590 <= ttl <= 600 for ttl in ttls)


def test_the_pictures_of_a_job_that_takes_longer_than_they_live_are_kept(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest, quick: None
) -> None:
    job, stored, tell, lives = jobs.submit(make_request(class_labels=(0,) * 20)), worker._store, worker._tell_progress, list[int]()

    def store_and_let_time_pass(*arguments: Any) -> None:
        stored(*arguments)
        for lease in worker.leases.values():
            lease.kept_at -= 300
            for key in redis.keys(f"dit:image:{job}:*"):
                redis.expire(key, 10)

    def tell_and_look() -> None:
        tell()
        lives.extend(redis.ttl(key) for key in redis.keys(f"dit:image:{job}:*"))

    worker._store, worker._tell_progress = store_and_let_time_pass, tell_and_look  # type: ignore[method-assign]
    work(worker)
    assert lives and all(590 <= life <= 600 for life in lives)


def test_after_so_many_dead_workers_the_job_fails_and_says_why(
    redis: Redis, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    job, dead = jobs.submit(make_request()), make_worker()
    for attempt in range(protocol.MAX_ATTEMPTS):
        assert jobs.status(job) == "queued"
        take(dead, jobs)
        assert jobs.record(job)["attempts"] == str(attempt + 1)
        dead.engine.remove(job)
        dead.leases.clear()
        jobs.expire_leases()
        worker.clean_registries()
    assert (jobs.status(job), jobs.rq_status(job)) == ("failed", "failed")
    assert jobs.record(job)["error"] == "given up: its worker died 5 times"
    work(worker)
    assert worker.engine.ticks == 0
    assert_only_what_expires(redis, jobs)


def test_a_job_popped_but_never_leased_waits_again(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "STUCK_AFTER_S", 0)
    job, behind = jobs.submit(make_request()), jobs.submit(make_request())
    worker._take(idle=True)
    worker.clean_registries()
    assert jobs.waiting() == [behind], "seen once, it may be on its way to a lease"
    jobs.expire_leases()
    worker.clean_registries()
    assert jobs.waiting() == [job, behind] and redis.llen(jobs.intermediate) == 0
    work(worker)
    assert jobs.status(job) == jobs.status(behind) == "succeeded"
    assert_clean(jobs, worker)


def test_a_job_popped_but_never_leased_whose_record_rq_has_lost_ends(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "STUCK_AFTER_S", 0)
    job = jobs.submit(make_request())
    redis.delete(f"rq:job:{job}")
    redis.lmove(jobs.queue, jobs.intermediate)
    for _ in range(2):
        worker.clean_registries()
    work(worker)
    assert jobs.status(job) == "failed" and jobs.waiting() == [] and redis.llen(jobs.intermediate) == 0


def test_what_is_popped_and_unknown_is_forgotten(redis: Redis, jobs: Any, worker: DiTWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "STUCK_AFTER_S", 0)
    redis.rpush(jobs.intermediate, "nobody")
    for _ in range(2):
        jobs.expire_leases()
        worker.clean_registries()
    assert_clean(jobs, worker)


def test_a_leased_job_is_not_taken_for_a_stuck_one(
    redis: Redis, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "STUCK_AFTER_S", 0)
    job = jobs.submit(make_request())
    take(make_worker(), jobs)
    redis.rpush(jobs.intermediate, job)  # as between prepare_execution and prepare_job_execution
    for _ in range(3):
        worker.clean_registries()
    assert jobs.waiting() == []


def test_a_worker_that_died_after_the_result_was_written_loses_nothing(
    redis: Redis, jobs: Any, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    job, dead = jobs.submit(make_request()), make_worker()
    take(dead, jobs)
    assert dead.results.succeed(job, jobs.record(job)["execution"], [])
    before = jobs.record(job)
    jobs.expire_leases()
    worker = make_worker()
    work(worker)
    assert (jobs.record(job), jobs.rq_status(job), worker.engine.ticks) == (before, "finished", 0)
    assert_only_what_expires(redis, jobs)


def test_maintenance_forgets_what_ended_long_ago(redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> None:
    good, bad = jobs.submit(make_request()), jobs.submit(make_request(sampler="none"))
    work(worker)
    sets = {"rq:finished:dit-tiny": good, "rq:failed:dit-tiny": bad}
    for key, job in sets.items():
        assert redis.zrange(key, 0, -1) == [job.encode()]
        redis.zadd(key, {job: 1})
    redis.sadd("rq:workers:dit-tiny", "rq:worker:killed")
    jobs.expire_leases()
    worker.clean_registries()
    assert not redis.exists(*sets, "rq:workers:dit-tiny")


def test_the_dead_leave_the_list_of_workers_however_many_there_are(
    redis: Redis, jobs: Any, worker: DiTWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of many workers looks now and then, so that Redis is not asked for every one by every one."""
    redis.sadd("rq:workers:dit-tiny", *(f"rq:worker:dead-{number}" for number in range(10 * maintenance.CLEANERS)))
    lots = iter([0.9, 0.5, 0.1, 0.09])
    monkeypatch.setattr(maintenance.random, "random", lambda: next(lots))
    for _ in range(3):
        worker.clean_registries()
        assert redis.scard("rq:workers:dit-tiny") == 10 * maintenance.CLEANERS
    worker.clean_registries()
    assert not redis.exists("rq:workers:dit-tiny")


@pytest.mark.parametrize(("others", "every"), [(0, 0.01), (20 - 1, 0.01), (100 - 1, 0.05), (4000 - 1, 2.0)])
def test_many_workers_ask_together_as_often_as_a_few(redis: Redis, jobs: Any, worker: DiTWorker, others: int, every: float) -> None:
    with redis.pipeline() as pipeline:
        for number in range(others + 1):
            pipeline.hset(f"rq:worker:{number}", "pid", 1)
            pipeline.sadd("rq:workers:dit-tiny", f"rq:worker:{number}")
        pipeline.execute()
    worker.clean_registries()
    assert worker._every(0.01) == pytest.approx(every)


def test_two_cleaners_at_once_requeue_each_job_once(
    redis: Redis, jobs: Any, make_worker: MakeWorker, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of jobs whose worker died, and of jobs that were popped and never leased."""
    monkeypatch.setattr(maintenance, "STUCK_AFTER_S", 0)
    ids = [jobs.submit(make_request()) for _ in range(40)]
    dead = make_worker()
    for _ in ids[:20]:
        found = dead._take(idle=True)
        assert found
        dead._start(found[0])
    for _ in ids[20:]:
        dead._take(idle=True)
    jobs.expire_leases()
    cleaners = [make_worker() for _ in range(3)]
    for _ in range(2):
        threads = [threading.Thread(target=cleaner.clean_registries) for cleaner in cleaners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(jobs.waiting()) == sorted(ids)
    assert redis.zcard(jobs.started) == 0 and redis.llen(jobs.intermediate) == 0
    assert all(jobs.events(job).count(("queued", {"retry": True})) == 1 for job in ids[:20])


def test_a_job_that_is_in_the_queue_twice_runs_once(
    jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    job, other = jobs.submit(make_request(steps=9)), make_worker()
    worker.engine.before[2] = lambda: jobs.redis.rpush(jobs.queue, job)
    worker.engine.before[4] = lambda: work(other)
    work(worker)
    assert (jobs.status(job), jobs.record(job)["attempts"], other.engine.ticks) == ("succeeded", "1", 0)
    assert_clean(jobs, worker)


@pytest.mark.parametrize("damage", [{"created_at": "soon"}, {"timeout": "long"}, {"data": b"\xff\xfe"}])
def test_a_job_whose_record_rq_cannot_read_fails_and_ends_no_worker(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest, damage: dict[str, Any]
) -> None:
    job, neighbour = jobs.submit(make_request()), jobs.submit(make_request())
    redis.hset(f"rq:job:{job}", mapping=damage)
    work(worker)
    assert (jobs.status(job), jobs.status(neighbour)) == ("failed", "succeeded")
    assert jobs.record(job)["error"]
    assert redis.llen(jobs.intermediate) == 0
    assert redis.ttl(f"rq:job:{job}") > 0


def test_a_number_of_attempts_that_is_none_counts_as_no_attempt(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest
) -> None:
    job = jobs.submit(make_request())
    redis.hset(f"dit:job:{job}", "attempts", "many")
    work(worker)
    assert (jobs.status(job), jobs.record(job)["attempts"]) == ("succeeded", "1")
    assert_clean(jobs, worker)


def test_a_job_that_was_deleted_in_rq_ends_here_too(redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> None:
    job, neighbour = jobs.submit(make_request()), jobs.submit(make_request())
    redis.delete(f"rq:job:{job}")
    work(worker)
    assert (jobs.status(job), jobs.record(job)["error"]) == ("failed", "it was deleted from the queue")
    assert jobs.status(neighbour) == "succeeded"
    assert_clean(jobs, worker)


# Jobs that may be what kills their workers.


def abandon(jobs: Any, dead: DiTWorker, times: int) -> None:
    """The next job's worker dies, so often."""
    for _ in range(times):
        job = take(dead, jobs)
        dead.engine.remove(job)
        dead.leases.clear()
        jobs.expire_leases()
        dead.clean_registries()


def company(worker: DiTWorker) -> list[set[str]]:
    """The jobs of each tick to come."""
    seen: list[set[str]] = []
    tick = worker.engine.tick

    def watched() -> Any:
        seen.append(set(worker.engine.jobs))
        return tick()

    worker.engine.tick = watched
    return seen


@pytest.mark.usefixtures("quick")
def test_from_its_third_attempt_a_job_runs_alone(jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest) -> None:
    suspect = jobs.submit(make_request(steps=5))
    abandon(jobs, make_worker(), 2)
    jobs.redis.lmove(jobs.queue, jobs.queue, "RIGHT", "LEFT")
    others = [jobs.submit(make_request(steps=5, seed=seed)) for seed in range(3)]
    seen = company(worker)
    work(worker)
    assert jobs.images(suspect) and all(jobs.images(job) for job in others)
    assert jobs.record(suspect)["attempts"] == "3"
    assert all(together == {suspect} for together in seen if suspect in together)
    assert set(others) in seen, "the others shared their steps"
    assert all(key.endswith(":executions") and jobs.redis.ttl(key) > 0 for key in jobs.leftovers()), "of the dead worker"


@pytest.mark.usefixtures("quick")
def test_a_busy_worker_ends_its_jobs_before_it_takes_one_that_runs_alone(
    redis: Redis, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    busy = jobs.submit(make_request(steps=12))
    later: list[str] = []

    def comes_back() -> None:
        later.append(jobs.submit(make_request(steps=3)))
        redis.hset(protocol.job_key(later[0]), "attempts", 2)
        later.append(jobs.submit(make_request(steps=3)))

    def look() -> None:
        assert jobs.waiting() == later, "not popped, while another worker might take it"
        assert redis.zcard(jobs.started) == 1

    worker.engine.before = {2: comes_back, 8: look}
    seen = company(worker)
    work(worker)
    suspect, behind = later
    assert [jobs.status(job) for job in (busy, suspect, behind)] == ["succeeded"] * 3
    order = [next(iter(together)) for together in seen if len(together) == 1]
    assert len(seen) == len(order) and list(dict.fromkeys(order)) == [busy, suspect, behind]
    assert jobs.record(suspect)["attempts"] == "3"
    assert_clean(jobs, worker)


def test_a_busy_worker_waits_only_as_long_as_no_idle_one_takes_the_suspect(
    redis: Redis, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    busy, idle = jobs.submit(make_request(steps=12)), make_worker()
    suspect: list[str] = []

    def comes_back() -> None:
        suspect.append(jobs.submit(make_request(steps=3)))
        redis.hset(protocol.job_key(suspect[0]), "attempts", 2)

    worker.engine.before = {2: comes_back, 8: lambda: work(idle)}
    work(worker)
    assert jobs.status(suspect[0]) == jobs.status(busy) == "succeeded"
    assert idle.engine.ticks >= 3 and worker.engine.ticks <= 13


def test_a_job_that_must_run_alone_and_was_popped_by_a_busy_worker_goes_back(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest
) -> None:
    """Where its attempts changed between queue and lease."""
    neighbour, job = jobs.submit(make_request()), jobs.submit(make_request())
    take(worker, jobs)
    found = worker._take(idle=False)
    redis.hset(protocol.job_key(job), "attempts", 2)
    worker._lease(found[0])
    assert list(worker.leases) == [neighbour] and jobs.waiting() == [job]
    assert (jobs.status(job), jobs.record(job)["attempts"]) == ("queued", "2")
    assert redis.zcard(jobs.started) == 1 and len(worker.executions) == 1


def test_a_job_that_killed_five_workers_is_dead_and_is_listed(
    redis: Redis, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    job = jobs.submit(make_request())
    abandon(jobs, make_worker(), protocol.MAX_ATTEMPTS)
    assert jobs.status(job) == "failed" and jobs.dead() == [job] and jobs.waiting() == []
    assert 590 <= redis.ttl(protocol.DEAD_KEY) <= 600
    assert redis.zscore("rq:failed:dit-tiny", job) and 590 <= redis.ttl(f"rq:job:{job}") <= 600
    assert redis.ttl(protocol.job_key(job)) > 0 and redis.ttl(protocol.events_key(job)) > 0
    assert jobs.events(job)[-1] == ("done", {"status": "failed", "error": "given up: its worker died 5 times"})
    work(worker)
    assert worker.engine.ticks == 0


# Workers that stop, or stand still.


def test_a_stop_in_mid_job_gives_the_jobs_back_at_the_front_in_order_and_the_next_worker_gives_the_same_bytes(
    jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    requests = [make_request(steps=9), make_request(steps=7, seed=50, class_labels=(2,) * 8), make_request(seed=90)]
    clean = [expected(make_worker, jobs, request) for request in requests]
    ids = [jobs.submit(request) for request in requests[:2]]
    worker.engine.before = {2: lambda: ids.append(jobs.submit(requests[2])), 4: lambda: stop(worker)}
    work(worker)
    assert worker.engine.ticks == 5
    assert jobs.waiting() == ids, "two ran and the third found no room"
    for job in ids:
        record = jobs.record(job)
        assert (record["status"], record.get("execution", ""), record.get("step", "0")) == ("queued", "", "0")
        assert jobs.rq_status(job) == "queued"
    assert jobs.leftovers() == [jobs.queue] and worker.leases == {} and not worker.engine.busy
    work(make_worker())
    assert [jobs.images(job) for job in ids] == clean
    assert jobs.leftovers() == []


def test_many_restarts_do_not_use_up_a_jobs_attempts(jobs: Any, make_worker: MakeWorker, make_request: MakeRequest) -> None:
    job = jobs.submit(make_request(steps=4))
    for _ in range(protocol.MAX_ATTEMPTS + 2):
        worker = make_worker()
        worker.engine.before[1] = partial(stop, worker)
        work(worker)
        assert jobs.waiting() == [job] and worker.engine.ticks == 2
    work(make_worker())
    assert jobs.status(job) == "succeeded"


def test_a_job_being_canceled_when_its_worker_stops_is_canceled_by_the_next(
    jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest, never_tells: None
) -> None:
    job = jobs.submit(make_request(steps=9))

    def cancel_and_stop() -> None:
        jobs.cancel(job)
        stop(worker)

    worker.engine.before[2] = cancel_and_stop
    work(worker)
    assert jobs.status(job) == "canceling" and jobs.waiting() == [job]
    next_worker = make_worker()
    work(next_worker)
    assert (jobs.status(job), next_worker.engine.ticks) == ("canceled", 0)
    assert_clean(jobs, next_worker)


def frozen(worker: DiTWorker, jobs: Any, at_tick: int, meanwhile: Callable[[], object]) -> None:
    """At this tick the worker stands still for so long that its leases run out, and this happens."""

    def freeze() -> None:
        worker.heart.end()
        jobs.expire_leases()
        meanwhile()

    worker.engine.before[at_tick] = freeze


@pytest.mark.usefixtures("never_tells")
@pytest.mark.parametrize("late", ["result", "failure"])
def test_a_frozen_workers_late_end_is_dropped(
    redis: Redis, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest, late: str
) -> None:
    job, other = jobs.submit(make_request(steps=6)), make_worker()
    seen: list[Any] = []

    def meanwhile() -> None:
        work(other)
        seen.append((jobs.record(job), jobs.events(job), redis.ttl(f"rq:job:{job}") > 0))
        if late == "failure":
            worker.engine.runner.step = None

    frozen(worker, jobs, 3, meanwhile)
    work(worker)
    assert jobs.images(job), "they are of the other's execution"
    assert (jobs.record(job), jobs.events(job), True) == seen[0]
    assert jobs.record(job)["attempts"] == "2"
    assert jobs.rq_status(job) == "finished"
    assert_clean(jobs, worker)


@pytest.mark.usefixtures("never_tells")
@pytest.mark.parametrize("late", ["result", "failure"])
def test_a_frozen_workers_late_end_takes_nothing_from_the_job_that_waits_again(
    redis: Redis, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest, late: str
) -> None:
    """rq's record is the waiting job's too: marked as ended it would expire, and the job with it."""
    job, other = jobs.submit(make_request(steps=6)), make_worker()

    def meanwhile() -> None:
        other.clean_registries()
        assert jobs.waiting() == [job]
        redis.rename(jobs.queue, "aside")  # so that the frozen worker does not take it itself
        if late == "failure":
            worker.engine.runner.step = None

    frozen(worker, jobs, 3, meanwhile)
    work(worker)
    assert (jobs.status(job), jobs.rq_status(job), redis.ttl(f"rq:job:{job}")) == ("queued", "queued", -1)
    redis.rename("aside", jobs.queue)
    work(other)
    assert jobs.status(job) == "succeeded"
    assert_clean(jobs, other)


@pytest.mark.usefixtures("quick")
def test_a_frozen_worker_drops_the_job_as_soon_as_it_looks(
    jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    job, other = jobs.submit(make_request(steps=50)), make_worker()
    frozen(worker, jobs, 3, lambda: work(other))
    work(worker)
    assert worker.engine.ticks == 4
    assert jobs.images(job)
    assert_clean(jobs, worker)


@pytest.mark.usefixtures("never_tells")
def test_a_frozen_worker_that_takes_its_own_job_again_runs_it_once(
    jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    request = make_request(steps=6, class_labels=(0, 1, 2))
    clean = expected(make_worker, jobs, request)
    job, other = jobs.submit(request), make_worker()
    frozen(worker, jobs, 3, other.clean_registries)
    work(worker)
    assert jobs.images(job) == clean
    assert 4 + 6 <= worker.engine.ticks <= 4 + 6 + 1
    assert jobs.record(job)["attempts"] == "2"
    assert_clean(jobs, worker)


@pytest.mark.usefixtures("never_tells")
def test_a_frozen_worker_that_is_stopped_gives_back_only_what_is_still_its_own(
    redis: Redis, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    lost, other = jobs.submit(make_request(steps=9)), make_worker()
    kept: list[str] = []

    def meanwhile() -> None:
        other.clean_registries()
        assert take(other, jobs) == lost
        kept.append(jobs.submit(make_request(seed=3, steps=9)))

    frozen(worker, jobs, 3, meanwhile)
    worker.engine.before[6] = lambda: stop(worker)
    work(worker)
    assert jobs.waiting() == kept
    assert (jobs.status(lost), jobs.rq_status(lost)) == ("running", "started")
    assert [entry.decode().split(":")[0] for entry in redis.zrange(jobs.started, 0, -1)] == [lost]
