"""Into the queue: bounds that hold however many come at once, keys that make a request safe to repeat, books that close by themselves."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from rq import Queue
from starlette.testclient import TestClient

from app.admission import Admission, Limits, Submission, picture_bytes
from app.embedded import EmbeddedServer
from app.jobs import CONNECTION, new_id
from app.problems import Problem
from worker import protocol
from worker.maintenance import Maintenance
from worker.protocol import GenerationRequest

REQUEST = GenerationRequest("tiny", (0,), 2.0, (0.0, 1.0), 10, "euler", 7)
QUEUE = "rq:queue:dit-tiny"


@pytest.fixture
def admit(server: EmbeddedServer, redis: Redis) -> Callable[..., str]:
    """`admit(queue=…, image_bytes=…, **submission)`: one more job; its id."""
    connection = Redis.from_url(server.url, **CONNECTION)

    def submit(queue: int = 1000, room: int = 1 << 30, ttl_s: int = 600, image_bytes: int = 100, **fields: Any) -> str:
        job_id = new_id()
        record = {"status": protocol.QUEUED, "model": "tiny", "request": REQUEST.dump(), "result_ttl_s": ttl_s}
        job = Submission(job_id, REQUEST, record, ttl_s, image_bytes, **fields)
        return asyncio.run(submitted(connection, Limits(queue, room), job))

    async def submitted(sync: Redis, limits: Limits, job: Submission) -> str:
        async with AsyncRedis.from_url(server.url, **CONNECTION) as own:
            return await Admission(sync, own, limits).submit(job)

    return submit


def refused(work: Callable[[], object]) -> Problem:
    with pytest.raises(Problem) as caught:
        work()
    return caught.value


# --- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"queue": 5}, {"room": 500}, {"owner": "anna", "in_flight": 5}])
def test_a_bound_holds_however_many_come_at_once(admit: Callable[..., str], redis: Redis, limit: dict[str, Any]) -> None:
    together = threading.Barrier(16)

    def try_it(_: int) -> int:
        together.wait()
        try:
            admit(**limit)
            return 202
        except Problem as problem:
            assert problem.retry_after_s and problem.retry_after_s >= 1
            return problem.status

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(try_it, range(16)))
    assert sorted(answers) == [202] * 5 + [429] * 11
    assert redis.llen(QUEUE) == redis.zcard(protocol.JOBS_KEY) == len(redis.keys("dit:job:*:events")) == 5


def test_a_refusal_says_which_bound_it_was_and_writes_nothing(admit: Callable[..., str], redis: Redis) -> None:
    first = admit(owner="anna", in_flight=1)
    before = sorted(redis.keys("*"))
    kinds = {
        refused(lambda: admit(queue=1)).kind,
        refused(lambda: admit(room=150)).kind,
        refused(lambda: admit(owner="anna", in_flight=1)).kind,
    }
    assert kinds == {"queue-full", "storage-full", "too-many-jobs"}
    assert sorted(redis.keys("*")) == before and redis.lrange(QUEUE, 0, -1) == [first.encode()]


def test_a_job_that_could_never_find_room_is_told_so(admit: Callable[..., str]) -> None:
    problem = refused(lambda: admit(room=99))
    assert (problem.status, problem.retry_after_s) == (422, None)


def test_a_job_that_has_ended_makes_room_for_its_owners_next(admit: Callable[..., str], worker: Any) -> None:
    limit: dict[str, Any] = {"owner": "anna", "in_flight": 2}
    first = admit(**limit)
    admit(**limit)
    admit(owner="bert", in_flight=1)
    assert refused(lambda: admit(**limit)).kind == "too-many-jobs"
    worker.succeed(worker.take(first))
    admit(**limit)
    assert refused(lambda: admit(**limit)).kind == "too-many-jobs"


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (28, 1), (64, 3), (256, 3)])
def test_no_png_is_larger_than_what_is_kept_free_for_it(size: int, channels: int) -> None:
    import numpy as np

    from worker.images import encode_png

    labels = tuple(range(64))
    request = GenerationRequest("m" * 100, labels, 2.123456789, (0.123456789, 0.987654321), 1000, "sde-dpm-solver++", 2**53 - 64)
    noise = np.random.default_rng(0).integers(0, 256, (size, size, channels), dtype=np.uint8)
    assert len(encode_png(noise, request, 63, "f" * 64)[0]) <= picture_bytes(size, channels)


# --- books -------------------------------------------------------------------------------------------------------------


def test_the_books_close_when_jobs_have_expired_and_nothing_stays(admit: Callable[..., str], redis: Redis, worker: Any) -> None:
    jobs = [admit(ttl_s=1, owner="anna", in_flight=9) for _ in range(3)]
    assert int(redis.get(protocol.BYTES_KEY) or 0) == 300
    for job_id in jobs[:2]:
        worker.succeed(worker.take(job_id))
    maintenance, queue = Maintenance(redis), Queue("dit-tiny", connection=redis)
    deadline = time.monotonic() + 30
    while redis.zcard(protocol.BOOKS_KEY) > 1 and time.monotonic() < deadline:
        maintenance.clean("tiny", queue)
        time.sleep(0.1)
    assert int(redis.get(protocol.BYTES_KEY) or 0) == 100  # the job that waits is not forgotten, however long it does
    assert redis.zrange(protocol.JOBS_KEY, 0, -1) == redis.zrange(protocol.owned_jobs_key("anna"), 0, -1) == [jobs[2].encode()]
    redis.delete(protocol.job_key(jobs[2]))
    redis.zadd(protocol.BOOKS_KEY, dict.fromkeys(redis.zrange(protocol.BOOKS_KEY, 0, -1), 0))  # its time has come
    maintenance.clean("tiny", queue)
    assert not redis.exists(protocol.BYTES_KEY, protocol.BOOKS_KEY, protocol.JOBS_KEY, protocol.owned_jobs_key("anna"), "dit:active:anna")


def test_a_submission_finds_the_room_that_expired_jobs_have_left(admit: Callable[..., str], redis: Redis, worker: Any) -> None:
    worker.succeed(worker.take(admit(ttl_s=1, room=150)))
    problem = refused(lambda: admit(room=150))
    assert problem.kind == "storage-full" and problem.retry_after_s in (1, 2)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            admit(room=150)
            break
        except Problem:
            time.sleep(0.1)
    assert int(redis.get(protocol.BYTES_KEY) or 0) == 100


# --- Idempotency-Key ---------------------------------------------------------------------------------------------------

BODY = {"class_label": "dog", "steps": 3}


def test_the_same_key_and_body_are_the_same_job(client: TestClient, redis: Redis) -> None:
    first = client.post("/generate", json=BODY, headers={"Idempotency-Key": "k"})
    again = client.post("/generate", json=BODY, headers={"Idempotency-Key": "k"})
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json() and first.headers["location"] == again.headers["location"]
    assert redis.llen(QUEUE) == 1


def test_another_key_is_another_job_and_no_key_always_is(client: TestClient, redis: Redis) -> None:
    headers: list[dict[str, str]] = [{"Idempotency-Key": "a"}, {"Idempotency-Key": "b"}, {}, {}]
    assert len({client.post("/generate", json=BODY, headers=header).json()["id"] for header in headers}) == 4


def test_the_same_key_with_another_body_is_422_and_the_first_job_is_let_be(client: TestClient, redis: Redis) -> None:
    job = client.post("/generate", json=BODY, headers={"Idempotency-Key": "k"}).json()
    other = client.post("/generate", json={**BODY, "steps": 4}, headers={"Idempotency-Key": "k"})
    assert other.status_code == 422 and other.json()["type"].endswith(":idempotency-key-reused")
    assert other.json()["errors"][0]["field"] == "Idempotency-Key"
    assert client.get(f"/jobs/{job['id']}").json() == job and redis.llen(QUEUE) == 1


def test_a_body_written_in_another_way_is_the_same_body(client: TestClient, redis: Redis) -> None:
    headers = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    texts = ['{"class_label": "dog", "steps": 3}', '{ "steps":3,\n "class_label": "\\u0064og" }']
    assert len({client.post("/generate", content=text, headers=headers).json()["id"] for text in texts}) == 1


def test_equal_requests_at_once_are_one_job(client: TestClient, redis: Redis) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: client.post("/generate", json=BODY, headers={"Idempotency-Key": "k"}), range(12)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1 and redis.llen(QUEUE) == 1


def test_a_repetition_needs_neither_a_worker_nor_room(
    open_client: Callable[..., AbstractContextManager[TestClient]], redis: Redis, worker: Any
) -> None:
    with open_client(queue_limit=1) as client:
        job = client.post("/generate", json=BODY, headers={"Idempotency-Key": "k"}).json()
        redis.delete(protocol.model_key("tiny"))
        again = client.post("/generate", json=BODY, headers={"Idempotency-Key": "k"})
        assert (again.status_code, again.json()["id"]) == (202, job["id"])
        worker.succeed(worker.take(job["id"]))
        ended = client.post("/generate", json=BODY, headers={"Idempotency-Key": "k", "Prefer": "wait=5"})
        assert (ended.status_code, ended.json()["id"], ended.json()["status"]) == (200, job["id"], "succeeded")


def test_a_key_is_forgotten_no_later_than_its_job(client: TestClient, redis: Redis) -> None:
    client.post("/generate", json=BODY, headers={"Idempotency-Key": "k"})
    (kept,) = redis.keys("dit:idempotency:*")
    assert 0 < redis.ttl(kept) <= 600


@pytest.mark.parametrize("key", [b"", b"x" * 255, b'"quoted"', "ключ".encode(), b"\xff\xfe", b"a b\tc"])
def test_any_text_is_a_key(client: TestClient, key: bytes) -> None:
    jobs = {client.post("/generate", json=BODY, headers={"Idempotency-Key": key}).json()["id"] for _ in range(2)}
    assert len(jobs) == 1


def test_a_key_that_is_too_long_is_422(client: TestClient) -> None:
    answer = client.post("/generate", json=BODY, headers={"Idempotency-Key": "x" * 256})
    assert answer.status_code == 422 and "255" in answer.json()["detail"]
