"""Promises are kept beside the loop, until the worker ends or its steps do."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError
from rq.job import Job
from rq.serializers import JSONSerializer

from worker import heart, protocol
from worker.heart import Heart
from worker.leases import Lease, Promises
from worker.protocol import GenerationRequest
from worker.rq_worker import DiTWorker

MakeRequest = Callable[..., GenerationRequest]


class Ticking:
    """As much of an engine as the heart looks at."""

    ticking_since: float | None = None
    slowest_tick_s = 0.0


@pytest.fixture
def engine() -> Ticking:
    return Ticking()


@pytest.fixture
def quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heart, "RENEW_EVERY_S", 0.02)


def never() -> None:
    raise AssertionError("nothing hangs")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.usefixtures("quick_heart")
def test_it_beats_until_it_ends(engine: Any) -> None:
    beats: list[int] = []
    beating = Heart(engine, lambda: beats.append(1), None, never)
    beating.start()
    until(lambda: len(beats) >= 3)
    beating.end()
    count = len(beats)
    time.sleep(0.1)
    assert len(beats) == count and not beating.is_alive()


def test_one_that_never_began_can_end(engine: Any) -> None:
    Heart(engine, never, None, never).end()


@pytest.mark.usefixtures("quick_heart")
def test_where_redis_is_away_it_tries_again_and_says_so_once(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    beats: list[int] = []

    def renew() -> None:
        beats.append(1)
        if 1 < len(beats) < 5:
            raise ConnectionError("away")

    beating = Heart(engine, renew, None, never)
    beating.start()
    until(lambda: len(beats) >= 6)
    beating.end()
    assert [record.message for record in caplog.records] == ["leases cannot be renewed: away"]


@pytest.mark.usefixtures("quick_heart")
def test_a_step_that_hangs_is_told_with_the_stack_and_nothing_is_renewed_any_more(engine: Any, capfd: pytest.CaptureFixture[str]) -> None:
    beats: list[int] = []
    hung = threading.Event()
    engine.ticking_since = time.monotonic()
    beating = Heart(engine, lambda: beats.append(1), 0.2, hung.set)
    beating.start()
    assert hung.wait(30)
    beating.join(30)
    count = len(beats)
    assert count >= 1, "it was late, and not hung, for a while"
    told = capfd.readouterr().err
    assert "test_a_step_that_hangs_is_told" in told, "the stack of the thread that steps"
    beating.end()
    assert len(beats) == count


@pytest.mark.usefixtures("quick_heart")
def test_steps_that_go_on_do_not_hang(engine: Any) -> None:
    beating = Heart(engine, lambda: None, 2.0, never)
    beating.start()
    for _ in range(300):
        engine.ticking_since = time.monotonic()
        time.sleep(0.01)
    assert beating.is_alive()
    beating.end()


def test_a_process_that_was_stopped_for_a_minute_is_late_and_not_hung(engine: Any) -> None:
    beating = Heart(engine, lambda: None, 10.0, never)
    engine.ticking_since = time.monotonic() - 60
    assert not beating._hangs()
    beating._last = time.monotonic() - 60
    assert not beating._hangs()
    for _ in range(3):  # awake for 2 × RENEW_EVERY_S each time
        beating._last = time.monotonic() - 60
        hangs = beating._hangs()
    assert hangs


@pytest.mark.parametrize(("slowest_tick_s", "hang_s", "limit_s"), [(0.1, None, 20), (3.0, None, 30), (3.0, 5.0, 5)])
def test_a_slow_device_gets_more_time_unless_it_is_said(engine: Any, slowest_tick_s: float, hang_s: float | None, limit_s: float) -> None:
    engine.slowest_tick_s = slowest_tick_s
    assert Heart(engine, never, hang_s, never).limit_s == limit_s


# What it renews.


@pytest.fixture
def lease(jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> Lease:
    """A job that the worker runs."""
    job = jobs.submit(make_request())
    worker.register_birth()
    found = worker._take(idle=True)
    assert found
    worker._lease(found[0])
    return worker.leases[job]


def renew(worker: DiTWorker, *leases: Lease) -> bool:
    return Promises(worker.connection).renew(worker, worker.records, leases)


def test_a_lease_and_all_that_belongs_to_it_lasts_longer(redis: Redis, jobs: Any, worker: DiTWorker, lease: Lease) -> None:
    member = f"{lease.job.id}:{lease.execution.id}"
    redis.zadd(jobs.started, {member: time.time() + 1})
    keys = [worker.key, worker.executions_key, lease.execution.key, f"rq:executions:{lease.job.id}"]
    for key in keys:
        redis.expire(key, 1)
    assert renew(worker, lease)
    assert 2 < redis.zscore(jobs.started, member) - time.time() <= protocol.LEASE_S + 1
    assert all(redis.ttl(key) > 10 for key in keys)
    assert redis.ttl(protocol.model_key("tiny")) > 10 and redis.smembers(protocol.MODELS_KEY) == {b"tiny"}


def everything(redis: Redis) -> dict[bytes, Any]:
    return {key: (redis.type(key), redis.dump(key)) for key in redis.keys("*") if not key.startswith((b"rq:worker", b"dit:model"))}


@pytest.mark.parametrize("way", ["finished", "failed", "given back", "lost", "deleted"])
def test_a_job_that_ends_while_it_is_renewed_is_not_brought_back(
    redis: Redis, jobs: Any, worker: DiTWorker, make_worker: Callable[..., DiTWorker], lease: Lease, way: str
) -> None:
    job, execution = lease.job, lease.execution
    if way == "finished":
        worker._close(lease, worker.results.succeed(job.id, execution.id, []))
        worker._finish(job, execution)
    elif way == "failed":
        worker._close(lease, worker.results.fail(job.id, execution.id, "why"))
        worker._finish_failed(job, execution, "why")
    elif way == "given back":
        worker._give_back()
    elif way == "lost":
        jobs.expire_leases()
        make_worker().clean_registries()
        redis.delete(execution.key, f"rq:executions:{job.id}")
    else:
        redis.delete(*redis.keys("rq:job*"), *redis.keys("rq:exec*"), jobs.started)
    before = everything(redis)
    assert renew(worker, lease)
    assert everything(redis) == before


def test_many_leases_are_renewed_in_one_step(redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest, lease: Lease) -> None:
    jobs.submit(make_request())
    found = worker._take(idle=False)
    assert found
    worker._lease(found[0])
    jobs.expire_leases()
    calls = redis.info("commandstats")["cmdstat_evalsha"]["calls"]
    renew(worker, *worker.leases.values())
    assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] - calls <= 2  # one, and one more if the server did not know the script
    assert [score > time.time() for _, score in redis.zrange(jobs.started, 0, -1, withscores=True)] == [True, True]


def test_leases_are_renewed_also_when_memory_has_run_out(redis: Redis, jobs: Any, worker: DiTWorker, lease: Lease) -> None:
    jobs.expire_leases()
    renew(worker)  # so that the server knows the script
    redis.config_set("maxmemory", 1)
    try:
        assert renew(worker, lease)
    finally:
        redis.config_set("maxmemory", 0)
    assert redis.zrange(jobs.started, 0, -1, withscores=True)[0][1] > time.time()


def test_a_worker_that_the_server_has_forgotten_registers_again(redis: Redis, worker: DiTWorker, lease: Lease) -> None:
    redis.delete(worker.key, "rq:workers", "rq:workers:dit-tiny")
    assert not renew(worker, lease)
    assert not redis.exists(worker.key), "a hash with a heartbeat and nothing else would be no worker"
    worker._renew()
    found = DiTWorker.all_keys(connection=redis, queue=worker.queues[0])
    assert found == [worker.key] and 0 < redis.ttl(worker.key) <= 30
    told = redis.hgetall(worker.key)
    assert (told[b"queues"], told[b"state"], told[b"pid"]) == (b"dit-tiny", b"busy", str(worker.pid).encode())


# The process.

HANGING = """
import sys, time
from pathlib import Path
from redis import Redis
from worker.engine import Engine
from worker.rq_worker import DiTWorker
import worker.heart
from worker.models import OneModel
from worker.load import Loader
from worker.protocol import ModelRecord
import torch

def wait_for_the_device_for_ever():
    time.sleep(600)

class Hanging(Engine):
    def tick(self):
        self.ticking_since = time.monotonic()
        wait_for_the_device_for_ever()

folder, url, identity = sys.argv[1:]
worker.heart.RENEW_EVERY_S = 0.1
runner = Loader(torch.device("cpu"), torch.float32, max_rows=8, compile=False)(Path(folder))
record = ModelRecord("tiny", identity, [], 16, 1, "flow", ["euler"], 1000, {})
DiTWorker(Hanging(OneModel(runner, record)), Redis.from_url(url, protocol=2), drain_s=10, hang_s=1.0).work()
"""


def test_a_process_whose_device_hangs_ends_and_another_does_the_job(
    redis: Redis,
    redis_url: str,
    jobs: Any,
    worker: DiTWorker,
    make_checkpoint: Callable[..., Path],
    make_request: MakeRequest,
    tmp_path: Path,
    in_this_process: None,
) -> None:
    folder = make_checkpoint(tmp_path / "registry")
    job = jobs.submit(make_request())
    command = [sys.executable, "-c", HANGING, str(folder), redis_url, protocol.ModelRecord.parse(worker.records[0].dump()).checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == heart.HUNG, done.stderr
    assert "wait_for_the_device_for_ever" in done.stderr
    assert jobs.status(job) == "running" and redis.zcard(jobs.started) == 1
    jobs.expire_leases()
    worker.work(burst=True)
    assert jobs.status(job) == "succeeded" and jobs.record(job)["attempts"] == "2"
    assert Job.fetch(job, connection=redis, serializer=JSONSerializer).worker_name == worker.name
