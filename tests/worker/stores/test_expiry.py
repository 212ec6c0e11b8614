"""What has expired leaves its store, and then its room is free; before that nothing does."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from app.jobs import id_time, new_id
from tests.worker.stores.served import (
    BODY,
    MakeWorker,
    Open,
    begin,
    executions,
    look_now,
    mark_of,
    opened,
    submit,
    sweep,
    work,
)
from worker import protocol
from worker.protocol import ModelRecord
from worker.stores import picture_name
from worker.sweep import Sweeper

pytestmark = [pytest.mark.usefixtures("in_this_process", "quick"), pytest.mark.timeout(180)]


def test_expired_pictures_are_deleted_and_then_their_room_is_free_again(
    open_api: Open, make_worker: MakeWorker, redis: Redis, jobs: Any, outside: str, expected: list[bytes], record: ModelRecord
) -> None:
    worker = make_worker(image_store=outside)
    with open_api(image_store=outside, image_bytes=20_000) as client:
        job = submit(client)
        full = client.post("/generate", json=BODY)
        assert (full.status_code, full.json()["type"]) == (429, "urn:dit:problem:storage-full") and int(full.headers["retry-after"]) >= 1
        metrics = client.get("/metrics").text
        assert "dit_image_bytes_limit 20000.0" in metrics and "dit_image_bytes_reserved 0.0" not in metrics
        work(worker)
        redis.set(protocol.model_key("tiny"), record.dump())  # which a worker that ends takes along
        name = picture_name(job, jobs.record(job)["execution"], 0)
        look_now(outside, redis)
        sweep(outside, redis)
        assert opened(outside).get(name) == expected[0], "its job has not expired"
        assert client.post("/generate", json=BODY).status_code == 429
        redis.delete(protocol.job_key(job))
        assert client.post("/generate", json=BODY).status_code == 429, "while the pictures are there, their room is taken"
        look_now(outside, redis)
        sweep(outside, redis)
        assert opened(outside).get(name) is None and list(opened(outside).folders()) == [] and redis.keys("dit:kept:*") == []
        assert client.post("/generate", json=BODY).status_code == 202
    while time.time() < float(id_time(job) or 0) + 1.1:
        time.sleep(0.05)
    with open_api(image_store=outside, result_ttl=1) as client:
        assert [client.get(f"/jobs/{job}{part}").status_code for part in ("", "/images/0", "/grid")] == [410] * 3


def test_previews_take_room_in_redis_and_pictures_in_their_store(open_api: Open, redis: Redis, folder: Path) -> None:
    begin(str(folder))
    with open_api(image_store=str(folder)) as client:
        submit(client)
        in_store = int(redis.get(protocol.kept_bytes_key(mark_of(str(folder)))) or 0)
        assert in_store > 0 and int(redis.get(protocol.BYTES_KEY) or 0) == 0
        assert client.post("/generate?previews=true", json=BODY).status_code == 202
        assert int(redis.get(protocol.kept_bytes_key(mark_of(str(folder)))) or 0) == 2 * in_store
        assert int(redis.get(protocol.BYTES_KEY) or 0) == in_store


def test_what_is_larger_than_all_the_room_there_is_is_422(open_api: Open, folder: Path) -> None:
    begin(str(folder))
    with open_api(image_store=str(folder), image_bytes=5000) as client:
        answer = client.post("/generate", json=BODY)
        assert answer.status_code == 422 and "5000 are there for all jobs" in answer.json()["detail"]


# --- a sweeper ---------------------------------------------------------------------------------------------------------


def old_id(days: float, end: int) -> str:
    return f"{int((time.time() - days * 86_400) * 1000):012x}-7000-8000-{end:012d}"


def test_what_nobody_knows_is_deleted_once_it_is_older_than_any_result(redis: Redis, outside: str) -> None:
    begin(outside)
    store = opened(outside)
    unknown, known, young = old_id(9, 1), old_id(9, 2), new_id()
    for job in (unknown, known, young):
        store.put(picture_name(job, "execution", 0), b"png")
    store.put("elses/file.txt", b"of somebody else")
    redis.hset(protocol.job_key(known), "status", "succeeded")

    def left() -> list[str]:
        return [job for job in (unknown, known, young) if store.get(picture_name(job, "execution", 0))]

    sweep(outside, redis)
    assert left() == [unknown, known, young], "written a moment ago, perhaps for another Redis"
    deadline = time.monotonic() + 60
    while unknown in left() and time.monotonic() < deadline:
        time.sleep(0.1)
        sweep(outside, redis, ttl_s=1)
    assert left() == [known, young] and store.get("elses/file.txt")


def test_one_worker_sweeps_at_a_time_and_then_another(redis: Redis, folder: Path) -> None:
    mark = begin(str(folder))
    first, second = (Sweeper(opened(str(folder)), lambda: mark, redis, name, 600) for name in ("first", "second"))
    first.sweep()
    second.sweep()
    for what in ("expired", "strays"):
        key = protocol.sweep_key(mark, what)
        assert redis.get(key) == b"first" and redis.ttl(key) > 0
        redis.delete(key)
    second.sweep()
    assert redis.get(protocol.sweep_key(mark, "expired")) == b"second"


def test_a_worker_sweeps_by_itself(
    redis: Redis, open_api: Open, make_worker: MakeWorker, jobs: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.sweep.EXPIRED_EVERY_S", 1)
    worker = make_worker(image_store=str(folder))
    with open_api(image_store=str(folder), result_ttl=1) as client:
        job = submit(client)
        working = threading.Thread(target=worker.work)
        working.start()
        deadline = time.monotonic() + 60
        while redis.keys("dit:kept:*") and time.monotonic() < deadline:
            time.sleep(0.05)
        worker._stop_requested = True
        jobs.redis.lpush(jobs.bell, "1")
        working.join(60)
    assert redis.keys("dit:kept:*") == [] and executions(str(folder), job) == set() and jobs.leftovers() == []


def test_where_nothing_can_be_deleted_no_room_is_given_back(
    redis: Redis, open_api: Open, make_worker: MakeWorker, jobs: Any, folder: Path
) -> None:
    worker, address = make_worker(image_store=str(folder)), str(folder)
    with open_api(image_store=address) as client:
        job = submit(client)
        work(worker)
        mark = mark_of(address)
        redis.delete(protocol.job_key(job))
        look_now(address, redis)
        reserved, away = redis.get(protocol.kept_bytes_key(mark)), folder.with_name("away")
        folder.rename(away)
        folder.write_text("in its place")
        with pytest.raises(Exception, match="Not a directory"):
            Sweeper(opened(address), lambda: mark, redis, "of a test", 600).sweep()
        assert redis.get(protocol.kept_bytes_key(mark)) == reserved
        folder.unlink()
        away.rename(folder)
        sweep(address, redis)
        assert redis.keys("dit:kept:*") == [] and executions(address, job) == set()
