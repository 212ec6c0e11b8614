"""A store that is away, full or gone: jobs wait for it, clients are told to come again, and what is lost is told as lost."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests.worker.stores.served import MakeWorker, Open, assert_served, in_the_way, submit, work
from worker import protocol
from worker.counts import STORE, ended_field, stats_key
from worker.rq_worker import DiTWorker
from worker.stores import job_folder, kind, picture_name

pytestmark = [pytest.mark.usefixtures("in_this_process", "quick"), pytest.mark.timeout(180)]


def test_a_picture_waits_for_its_store_and_nothing_is_drawn_again(
    open_api: Open, make_worker: MakeWorker, jobs: Any, folder: Path, expected: list[bytes]
) -> None:
    worker = make_worker(image_store=str(folder))
    tried, put = threading.Event(), worker.writer.store.put

    def watched(name: str, data: bytes) -> None:
        try:
            put(name, data)
        finally:
            tried.set()

    def mend_later(mend: Callable[[], None]) -> None:
        assert tried.wait(60)
        mend()

    worker.writer.store.put = watched
    with open_api(image_store=str(folder)) as client:
        job = submit(client)
        worker.engine.before[2] = lambda: threading.Thread(target=mend_later, args=(in_the_way(folder),)).start()
        work(worker)
        assert_served(client, job, expected)
    assert jobs.record(job)["attempts"] == "1" and worker.writer.trouble == "" and worker.engine.ticks < 10


@contextmanager
def working(*workers: DiTWorker) -> Iterator[None]:
    """Meanwhile they wait for jobs, each in a thread."""
    threads = [threading.Thread(target=worker.work) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for worker in workers:
            worker._stop_requested = True
            worker.connection.lpush(protocol.bell_key("tiny"), "1")
        for thread in threads:
            thread.join(60)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_when_the_time_is_over_jobs_wait_in_the_queue_until_the_store_is_back(
    open_api: Open, make_worker: MakeWorker, jobs: Any, folder: Path, expected: list[bytes]
) -> None:
    worker = make_worker(image_store=str(folder))
    worker.writer.seconds = 0.5
    mend: list[Callable[[], None]] = []
    worker.engine.before[2] = lambda: mend.append(in_the_way(folder))
    with open_api(image_store=str(folder)) as client, working(worker):
        first = submit(client)
        until(lambda: ("queued", {"retry": True}) in jobs.events(first))
        second = submit(client)
        assert worker.writer.trouble == f"{folder}: Not a directory"
        not_ready = client.get("/readyz")
        assert not_ready.status_code == 503 and int(not_ready.headers["retry-after"]) > 0
        assert [jobs.status(job) for job in (first, second)] == ["queued", "queued"]
        mend[0]()
        for job in (first, second):
            until(lambda job=job: jobs.status(job) not in ("queued", "running"))
            assert_served(client, job, expected)
        assert jobs.record(first)["attempts"] == "1", "none is lost"
    assert worker.writer.trouble == "" and jobs.leftovers() == []


def test_a_job_that_one_worker_cannot_store_is_done_by_another(
    open_api: Open, make_worker: MakeWorker, jobs: Any, folder: Path, tmp_path: Path, expected: list[bytes]
) -> None:
    """Each has its own way to the store, as on two machines."""
    other, way = make_worker(image_store=str(folder)), tmp_path / "way"
    way.symlink_to(folder)
    cut_off = make_worker(image_store=str(way))
    cut_off.writer.seconds = 0.5
    cut_off.engine.before[2] = way.unlink

    def queue() -> tuple[int, int]:
        cut_off.heart.beat()
        [told] = client.get("/queues").json()["queues"]
        return told["workers"], told["troubled"]

    with open_api(image_store=str(folder)) as client, working(cut_off):
        job = submit(client)
        until(lambda: ("queued", {"retry": True}) in jobs.events(job))
        assert queue() == (1, 1)
        assert client.get("/readyz").json()["detail"] == "model tiny: no worker of it can store pictures"
        with working(other):
            until(lambda: jobs.status(job) == "succeeded")
            assert_served(client, job, expected)
            until(lambda: queue() == (2, 1))
            assert client.get("/readyz").status_code == 200
            way.symlink_to(folder)
            until(lambda: queue() == (2, 0))
    assert jobs.leftovers() == []


def test_a_picture_that_a_store_takes_never_fails_its_job_and_no_other(
    open_api: Open, make_worker: MakeWorker, redis: Redis, jobs: Any, folder: Path, expected: list[bytes]
) -> None:
    worker = make_worker(image_store=str(folder))
    worker.writer.seconds = 0.2
    with open_api(image_store=str(folder)) as client:
        doomed, other = submit(client), submit(client)
        place = folder / job_folder(doomed)
        place.parent.mkdir()
        place.write_text("where its pictures belong")
        work(worker)
        view = client.get(f"/jobs/{doomed}").json()
        assert view["status"] == "failed" and view["error"].endswith(f"could not be stored: {folder}: File exists"), view
        assert int(redis.hget(stats_key("tiny"), ended_field("failed", STORE)) or 0) == 1
        work(worker)  # what joined meanwhile was done, or waits
        assert_served(client, other, expected)
    assert worker.writer.trouble == "" and jobs.leftovers() == []


@pytest.mark.parametrize("address", ["folder", "s3"], indirect=True)
def test_the_api_answers_503_while_its_store_is_away_and_then_goes_on(
    request: pytest.FixtureRequest, open_api: Open, make_worker: MakeWorker, address: str, expected: list[bytes]
) -> None:
    worker = make_worker(image_store=address)
    with open_api(image_store=address) as client:
        job = submit(client)
        work(worker)
        if kind(address) == "folder":
            mend = in_the_way(Path(address))
        else:
            server = request.getfixturevalue("s3_server")
            server.leave()
            mend = server.come_back
        try:
            for path in (f"/jobs/{job}/images/0", f"/jobs/{job}/grid", "/readyz"):
                answer = client.get(path)
                assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json"), path
                assert answer.json()["type"] == "urn:dit:problem:store-away" and int(answer.headers["retry-after"]) > 0
                assert address not in answer.text, "where pictures lie is nobody's business"
            assert client.get(f"/jobs/{job}").status_code == 200
        finally:
            mend()
        assert_served(client, job, expected)


def test_a_picture_that_redis_knows_and_the_store_has_lost_is_gone(
    open_api: Open, make_worker: MakeWorker, jobs: Any, folder: Path
) -> None:
    worker = make_worker(image_store=str(folder))
    with open_api(image_store=str(folder)) as client:
        job = submit(client)
        work(worker)
        (folder / picture_name(job, jobs.record(job)["execution"], 1)).unlink()
        statuses = [client.get(f"/jobs/{job}/{what}").status_code for what in ("images/0", "images/1", "images/2", "grid")]
    assert statuses == [200, 410, 200, 410]
