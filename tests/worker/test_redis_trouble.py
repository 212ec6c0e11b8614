"""Redis away, restarting, full or without its disk, under a worker with jobs: it neither dies nor loses work."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from worker import protocol, rq_process
from worker.protocol import GenerationRequest
from worker.rq_worker import DiTWorker

MakeRequest = Callable[..., GenerationRequest]
MakeWorker = Callable[..., DiTWorker]

pytestmark = [pytest.mark.usefixtures("in_this_process", "quick"), pytest.mark.timeout(180)]


@pytest.fixture
def redis_url(mortal: Any) -> str:
    """Of a server that a test may ill-treat: all clients here are its."""
    return str(mortal.url)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can wait is tried again soon."""
    monkeypatch.setattr(rq_process, "LATER_S", 0.05)


@pytest.fixture
def clean(jobs: Any, make_worker: MakeWorker, make_request: MakeRequest) -> list[bytes]:
    """The pictures of `job` where nothing happens."""
    job = jobs.submit(make_request(steps=9, class_labels=(1, 2)))
    make_worker().work(burst=True)
    return list(jobs.images(job))


@pytest.fixture
def job(clean: list[bytes], jobs: Any, make_request: MakeRequest) -> str:
    return str(jobs.submit(make_request(steps=9, class_labels=(1, 2))))


def while_pictures_wait(worker: DiTWorker, mend: Callable[[], object]) -> None:
    """Mend it, in a thread, some time after there is a first picture to store."""
    ready, store = threading.Event(), worker._store

    def watched(*arguments: Any) -> None:
        ready.set()
        store(*arguments)

    def wait() -> None:
        if ready.wait(60):
            time.sleep(0.5)
            mend()

    worker._store = watched
    threading.Thread(target=wait).start()


def assert_done_once(jobs: Any, job: str, clean: list[bytes]) -> None:
    assert jobs.images(job) == clean
    assert (jobs.record(job)["attempts"], jobs.rq_status(job)) == ("1", "finished")
    assert jobs.leftovers() == []


def test_steps_go_on_while_redis_is_away(mortal: Any, jobs: Any, worker: DiTWorker, job: str, clean: list[bytes]) -> None:
    worker.engine.before = {2: mortal.kill, 7: mortal.start}
    worker.work(burst=True)
    assert 9 <= worker.engine.ticks <= 11
    assert_done_once(jobs, job, clean)


def test_pictures_that_are_done_wait_for_redis_to_come_back(
    mortal: Any, jobs: Any, worker: DiTWorker, job: str, clean: list[bytes]
) -> None:
    worker.engine.before = {2: mortal.kill, 3: lambda: while_pictures_wait(worker, mortal.start)}
    worker.work(burst=True)
    assert_done_once(jobs, job, clean)
    assert worker.engine.ticks <= 11, "nothing was stepped again"


def test_pictures_that_are_done_wait_for_memory(
    redis: Redis, jobs: Any, worker: DiTWorker, job: str, clean: list[bytes], make_request: MakeRequest
) -> None:
    def fill() -> None:
        jobs.submit(make_request())
        redis.config_set("maxmemory", 1)
        while_pictures_wait(worker, lambda: redis.config_set("maxmemory", 0))

    worker.engine.before = {3: fill}
    worker.work(burst=True)
    assert_done_once(jobs, job, clean)


def test_pictures_that_are_done_wait_for_the_disk(
    redis: Redis, jobs: Any, worker: DiTWorker, job: str, clean: list[bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "gone"

    def lose_disk() -> None:
        folder.mkdir()
        redis.config_set("dir", str(folder))
        redis.config_set("save", "3600 1")
        shutil.rmtree(folder)
        redis.bgsave()
        while redis.info("persistence")["rdb_last_bgsave_status"] == "ok":
            time.sleep(0.02)
        while_pictures_wait(worker, mend)

    def mend() -> None:
        folder.mkdir()
        redis.config_set("dir", str(folder))
        redis.bgsave()

    worker.engine.before = {3: lose_disk}
    worker.work(burst=True)
    assert_done_once(jobs, job, clean)


def test_after_its_patience_the_process_ends_and_the_job_is_anothers(
    redis: Redis, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, job: str, clean: list[bytes]
) -> None:
    worker.patience.seconds = 0.5
    worker.engine.before = {3: lambda: redis.config_set("maxmemory", 1)}
    with pytest.raises(SystemExit) as ended:
        worker.work(burst=True)
    assert ended.value.code == 1 and not worker.heart.is_alive()
    redis.config_set("maxmemory", 0)
    assert jobs.status(job) == "running"
    jobs.expire_leases()
    make_worker().work(burst=True)
    assert jobs.images(job) == clean and jobs.record(job)["attempts"] == "2"


@pytest.mark.usefixtures("never_tells")
def test_where_the_lease_was_lost_meanwhile_the_fence_decides(
    mortal: Any, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, job: str, clean: list[bytes]
) -> None:
    other = make_worker()

    def back() -> None:
        worker.heart.end()
        mortal.start()
        jobs.expire_leases()
        other.work(burst=True)

    worker.engine.before = {2: mortal.kill, 6: back}
    worker.work(burst=True)
    assert jobs.images(job) == clean
    assert jobs.record(job)["attempts"] == "2" and jobs.events(job)[-1] == ("done", {"status": "succeeded"})
    assert worker.leases == {} and jobs.leftovers() == []


def test_a_server_that_has_lost_its_data_has_no_job_to_finish_and_gets_new_ones(
    redis: Redis, jobs: Any, worker: DiTWorker, job: str, make_request: MakeRequest
) -> None:
    new: list[str] = []

    def lose() -> None:
        redis.flushall()
        new.append(jobs.submit(make_request()))

    worker.engine.before = {3: lose}
    worker.work(burst=True)
    assert not redis.exists(protocol.job_key(job)) and jobs.status(new[0]) == "succeeded"
    assert worker.leases == {} and not worker.engine.busy


def test_an_idle_worker_waits_for_redis_and_then_works(mortal: Any, jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> None:
    thread = threading.Thread(target=worker.work)
    thread.start()
    while not worker._listening:
        time.sleep(0.01)
    mortal.kill()
    time.sleep(0.5)
    mortal.start()
    job = jobs.submit(make_request())
    while jobs.status(job) != "succeeded" and thread.is_alive():
        time.sleep(0.02)
    worker._stop_requested = True
    thread.join(30)
    assert jobs.status(job) == "succeeded"


def test_a_stop_while_redis_is_away_ends_the_process_soon(
    mortal: Any, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, job: str, clean: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rq_process, "FAREWELL_S", 0.3)

    def stop() -> None:
        mortal.kill()
        worker._shutdown()

    worker.engine.before = {3: stop}
    with pytest.raises(SystemExit):
        worker.work(burst=True)
    mortal.start()
    jobs.expire_leases()
    make_worker().work(burst=True)
    assert jobs.images(job) == clean
