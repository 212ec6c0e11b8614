"""Through the API, a worker and each kind of store: the pictures are the same, and only those that Redis calls committed are seen."""

import threading
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests.worker.engines import pictures
from tests.worker.stores.served import BODY, MakeRequest, MakeWorker, Open, assert_served, executions, look_now, submit, sweep, work
from worker import protocol

pytestmark = [pytest.mark.usefixtures("in_this_process", "quick"), pytest.mark.timeout(180)]


def test_pictures_are_the_same_from_every_store(
    open_api: Open, make_worker: MakeWorker, address: str, expected: list[bytes], redis: Redis, jobs: Any
) -> None:
    worker = make_worker(image_store=address)
    with open_api(image_store=address) as client:
        job = submit(client)
        assert client.get(f"/jobs/{job}/images/0").status_code == 404, "none yet"
        work(worker)
        assert_served(client, job, expected)
    assert bool(redis.keys("dit:image:*")) == (address == "redis"), "Redis has them, or the store"
    assert [name for name, _ in jobs.events(job)].count("image") == 3 and jobs.leftovers() == []


def test_a_request_that_waits_gets_the_picture_itself_and_previews_come_as_events(
    open_api: Open, make_worker: MakeWorker, address: str, jobs: Any, make_request: MakeRequest
) -> None:
    worker = make_worker(image_store=address)
    working = threading.Thread(target=worker.work)
    with open_api(image_store=address) as client:
        working.start()
        try:
            wants_png = {"Prefer": "wait=60", "Accept": "image/png"}
            answer = client.post("/generate?previews=true", json={**BODY, "class_label": 0}, headers=wants_png)
        finally:
            worker._stop_requested = True
            jobs.redis.lpush(jobs.bell, "1")
            working.join(60)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png"), answer.text
    assert answer.content == pictures(worker.engine.runner, {"job": make_request()})["job", 0]
    job = answer.headers["location"].rpartition("/")[2]
    assert "preview" in [name for name, _ in jobs.events(job)]


def test_a_job_whose_pictures_go_into_redis_is_done_by_a_worker_with_a_store_too(
    open_api: Open, make_worker: MakeWorker, folder: Path, expected: list[bytes]
) -> None:
    """So a store is changed to: first the workers, then the API; and what Redis has is served until it expires."""
    worker = make_worker(image_store=str(folder))
    with open_api() as client:
        job = submit(client)
        work(worker)
        assert_served(client, job, expected)
    with open_api(image_store=str(folder)) as client:
        assert_served(client, job, expected)


@pytest.mark.usefixtures("never_tells")
def test_a_worker_frozen_past_its_lease_overwrites_no_picture_of_the_next(
    open_api: Open, make_worker: MakeWorker, redis: Redis, jobs: Any, address: str, expected: list[bytes]
) -> None:
    frozen, other = make_worker(image_store=address), make_worker(image_store=address)
    with open_api(image_store=address) as client:
        job = submit(client)

        record = {}

        def freeze() -> None:
            frozen.heart.end()
            jobs.expire_leases()
            work(other)
            assert_served(client, job, expected)
            record.update(jobs.record(job))

        frozen.engine.before[2] = freeze
        work(frozen)
        assert jobs.record(job) == record and record["attempts"] == "2"
        assert_served(client, job, expected)


def test_a_worker_killed_between_writing_and_committing_loses_nothing_and_its_files_go_with_the_job(
    open_api: Open, make_worker: MakeWorker, redis: Redis, jobs: Any, folder: Path, expected: list[bytes]
) -> None:
    killed, address = make_worker(image_store=str(folder)), str(folder)

    def die(*_: object) -> None:
        raise MemoryError("killed")

    killed._store = die
    with open_api(image_store=address) as client:
        job = submit(client)
        with pytest.raises(SystemExit):
            work(killed)
        first = jobs.record(job)["execution"]
        assert executions(address, job) == {first} and jobs.status(job) == "running"
        jobs.expire_leases()
        work(make_worker(image_store=address))
        assert_served(client, job, expected)
        assert executions(address, job) == {first, jobs.record(job)["execution"]}
        redis.delete(protocol.job_key(job))
        look_now(address, redis)
        sweep(address, redis)
    assert executions(address, job) == set()
