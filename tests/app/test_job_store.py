"""JobStore without HTTP: ids, and events as they happen."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ResponseError

from app.embedded import EmbeddedServer
from app.jobs import CONNECTION, JobStore, id_time, new_id
from app.problems import Problem, refusal
from app.routes.jobs import _lines
from worker import protocol
from worker.protocol import GenerationRequest

REQUEST = GenerationRequest("tiny", (0,), 2.0, (0.0, 1.0), 10, "euler", 7)


def always() -> bool:
    """Of a key that goes on being one."""
    return True


def test_an_id_is_a_uuid_of_version_7_that_tells_its_time() -> None:
    before = time.time()
    job_id = new_id()
    parsed = uuid.UUID(job_id)
    assert (str(parsed), parsed.version, parsed.variant) == (job_id, 7, uuid.RFC_4122)
    told = id_time(job_id)
    assert told is not None and before - 0.001 <= told <= time.time()


def test_ids_sort_by_time_and_are_all_different() -> None:
    ids = []
    for _ in range(5):
        ids.append(new_id())
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert len({new_id() for _ in range(5000)}) == 5000


@pytest.mark.parametrize("other", ["", "x", str(uuid.uuid4()), new_id().upper(), new_id().replace("-", ""), f"{{{new_id()}}}", "١" * 32])
def test_what_is_no_id_of_ours_tells_no_time(other: str) -> None:
    assert id_time(other) is None


@pytest.fixture
def with_store(server: EmbeddedServer, redis: Redis) -> Callable[..., Any]:
    """`with_store(work)` runs `await work(store)` over the empty server."""

    def run(work: Callable[[JobStore], Awaitable[Any]], **settings: Any) -> Any:
        async def main() -> Any:
            connection = AsyncRedis.from_url(server.url, **CONNECTION)
            try:
                return await work(JobStore(redis, connection, **{"queue_limit": 100, "result_ttl_s": 600, **settings}))
            finally:
                await connection.aclose()

        return asyncio.run(main())

    return run


def test_events_come_as_they_happen(with_store: Callable[..., Any], worker: Any) -> None:
    async def watch(store: JobStore) -> None:
        job_id = await store.submit(REQUEST, "c" * 64)
        stream = store.events(job_id)

        async def following() -> str | None:
            event = await asyncio.wait_for(anext(stream), 10)
            return event and event[1]

        assert await following() == "queued"
        worker.take(job_id)
        assert await following() == "progress"  # a start is the first
        for _ in range(3):
            worker.tell(job_id, "progress", {})
            assert await following() == "progress"
        worker.succeed(job_id)
        assert [await following() for _ in range(2)] == ["image", "done"]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    with_store(watch)


def test_a_silent_job_gives_the_caller_time_to_ping(with_store: Callable[..., Any]) -> None:
    async def watch(store: JobStore) -> None:
        stream = store.events(await store.submit(REQUEST, "c" * 64))
        assert (await anext(stream) or ("",) * 3)[1] == "queued"
        assert await asyncio.wait_for(anext(stream), 10) is None
        await stream.aclose()

    with_store(watch)


def test_many_callers_wait_at_once(with_store: Callable[..., Any], worker: Any) -> None:
    """Each holds a connection: more than the client library's default of 100."""

    async def watch(store: JobStore) -> None:
        job_id = await store.submit(REQUEST, "c" * 64)
        waiting = [asyncio.create_task(store.wait(job_id, 30, always)) for _ in range(150)]
        await asyncio.sleep(0.2)
        assert (await store.get(job_id))["status"] == "queued"
        await asyncio.to_thread(lambda: worker.succeed(worker.take(job_id)))
        assert all(await asyncio.gather(*waiting))

    with_store(watch)


def test_waiting_ends_with_the_time_or_the_job(with_store: Callable[..., Any], worker: Any) -> None:
    async def watch(store: JobStore) -> None:
        job_id = await store.submit(REQUEST, "c" * 64)
        assert not await store.wait(job_id, 0.1, always)
        await store.cancel(job_id)
        assert await store.wait(job_id, 10, always)

    with_store(watch)


def test_the_stream_of_events_ends_when_redis_goes_away(mortal_server: EmbeddedServer) -> None:
    """The client comes back by itself, with the id it has; the server's log gets a line, not a traceback."""

    async def watch() -> None:
        connection = AsyncRedis.from_url(mortal_server.url, **CONNECTION)
        with Redis.from_url(mortal_server.url, **CONNECTION) as sync:
            store = JobStore(sync, connection, queue_limit=100, result_ttl_s=600)
            lines = _lines(store, await store.submit(REQUEST, "c" * 64), "0", always)
            assert "event: queued" in await anext(lines)
            await asyncio.to_thread(mortal_server.stop)
            assert [line async for line in lines if not line.startswith(":")] == []
        await connection.aclose()

    asyncio.run(watch())


def test_a_job_given_back_waits_again_and_says_so(with_store: Callable[..., Any], worker: Any) -> None:
    async def watch(store: JobStore) -> None:
        job_id = worker.take(await store.submit(REQUEST, "c" * 64))
        worker.tell(job_id, "progress", {"step": 5, "steps": 10}, step=5)
        assert worker.results.give_back(job_id, "execution-1")
        job = await store.get(job_id)
        assert (job["status"], job["progress"]["step"]) == ("queued", 0)

    with_store(watch)


def test_what_a_worker_writes_after_it_lost_the_job_changes_nothing(with_store: Callable[..., Any], worker: Any) -> None:
    async def watch(store: JobStore) -> None:
        job_id = worker.take(await store.submit(REQUEST, "c" * 64))
        assert worker.results.start(job_id, "execution-2") == "run"
        assert worker.tell(job_id, "progress", {}) == "lost"
        assert not worker.results.succeed(job_id, "execution-1", [])
        assert (await store.get(job_id))["status"] == "running"

    with_store(watch)


def test_the_bound_of_the_queue_is_per_model(with_store: Callable[..., Any]) -> None:
    async def fill(store: JobStore) -> None:
        await store.submit(REQUEST, "c" * 64)
        with pytest.raises(Problem) as full:
            await store.submit(REQUEST, "c" * 64)
        assert full.value.status == 429
        await store.submit(GenerationRequest("birds", (0,), 2.0, (0.0, 1.0), 10, "euler", 7), "b" * 64)

    with_store(fill, queue_limit=1)


def said_while(redis: Redis, work: Callable[[], object]) -> list[str]:
    """The commands that the server was sent meanwhile, without what only asks, and without what a script says."""
    with redis.monitor() as monitor:
        work()
        redis.echo("end")
        said: list[str] = []
        for entry in monitor.listen():
            name = entry["command"].split()[0].upper()
            if name == "ECHO":
                return said
            if entry["client_type"] != "lua" and name not in ("INFO", "HELLO", "CLIENT", "SCRIPT"):
                said.append(name)
    raise AssertionError("the server ended")


def test_a_submission_is_one_step_of_the_server(with_store: Callable[..., Any], redis: Redis) -> None:
    """Whenever the API dies, all of the job is there, or nothing."""
    submit = lambda: with_store(lambda store: store.submit(REQUEST, "c" * 64))  # noqa: E731
    submit()  # the server learns the script
    assert said_while(redis, submit) == ["EVALSHA"]
    assert redis.llen("rq:queue:dit-tiny") == 2


def test_a_submission_rings_for_a_worker(with_store: Callable[..., Any], redis: Redis) -> None:
    async def submit_many(store: JobStore) -> None:
        for _ in range(protocol.BELL_RINGS + 2):
            await store.submit(REQUEST, "c" * 64)

    with_store(submit_many)
    assert redis.llen(protocol.bell_key("tiny")) == protocol.BELL_RINGS
    assert 0 < redis.ttl(protocol.bell_key("tiny")) <= protocol.BELL_TTL_S


def test_a_job_outlasts_rqs_own_cleaning_of_leases(with_store: Callable[..., Any], redis: Redis) -> None:
    """It would end the job behind our back when rq's retries are used up; ours counts attempts."""
    job_id = with_store(lambda store: store.submit(REQUEST, "c" * 64))
    assert int(redis.hget(f"rq:job:{job_id}", "retries_left") or 0) > 1000


def test_a_redis_that_is_full_is_a_503_and_keeps_nothing(mortal_server: EmbeddedServer) -> None:
    async def submit() -> None:
        connection = AsyncRedis.from_url(mortal_server.url, **CONNECTION)
        with Redis.from_url(mortal_server.url, **CONNECTION) as sync:
            store = JobStore(sync, connection, queue_limit=100, result_ttl_s=600)
            sync.config_set("maxmemory", 1)
            with pytest.raises(Problem, match="out of memory") as full:
                await store.submit(REQUEST, "c" * 64)
            assert (full.value.status, full.value.retry_after_s) == (503, 30)
            assert sync.keys("*") == []
            sync.config_set("maxmemory", 0)
            assert await store.get(await store.submit(REQUEST, "c" * 64))
        await connection.aclose()

    asyncio.run(submit())


def test_a_job_can_be_canceled_while_redis_is_full(mortal_server: EmbeddedServer) -> None:
    async def cancel() -> None:
        connection = AsyncRedis.from_url(mortal_server.url, **CONNECTION)
        with Redis.from_url(mortal_server.url, **CONNECTION) as sync:
            store = JobStore(sync, connection, queue_limit=100, result_ttl_s=600)
            job_id = await store.submit(REQUEST, "c" * 64)
            sync.config_set("maxmemory", 1)
            assert await store.cancel(job_id) == "queued"
            assert (await store.get(job_id))["status"] == "canceled"
        await connection.aclose()

    asyncio.run(cancel())


def test_only_a_server_that_refuses_is_a_503() -> None:
    disk = refusal(ResponseError("MISCONF Valkey is configured to save RDB snapshots, but it's currently unable to persist to disk."))
    assert disk and (disk.status, disk.retry_after_s) == (503, 30) and "disk" in disk.detail
    replicas = refusal(ResponseError("NOREPLICAS Not enough good replicas to write."))
    assert replicas and (replicas.status, replicas.kind) == (503, "redis-replicas") and "replicas" in replicas.detail
    assert refusal(ResponseError("WRONGTYPE Operation against a key")) is None


def test_a_version_of_the_payload_is_written(with_store: Callable[..., Any], redis: Redis) -> None:
    job_id = with_store(lambda store: store.submit(REQUEST, "c" * 64))
    assert int(redis.hget(protocol.job_key(job_id), "version") or 0) == protocol.VERSION
