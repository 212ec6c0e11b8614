"""What load.py, streams.py, outage.py and soak.py of benchmarks/ judge by: growth, books of jobs, and a client of sockets."""

import asyncio
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from redis import Redis

from app.embedded import EmbeddedServer
from worker import protocol
from worker.counts import ended_field, stats_key

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MIB = 1 << 20


@pytest.fixture(scope="module")
def module() -> Iterator[Callable[[str], ModuleType]]:
    """`module("_watch")`: one of the scripts' modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture
def watch(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("_watch")


def samples(watch: ModuleType, megabytes: list[float]) -> dict[str, Any]:
    """A watch whose one process had so much, second by second."""
    seen = watch.Watch({}, None)
    seen.samples["api"] = [watch.Sample(100.0 + t, int(value * MIB), 10, 4, 0.5 * t) for t, value in enumerate(megabytes)]
    return dict(seen.figures(100.0, 100.0 + len(megabytes), watch.Bound(mib=2, share=0.01))["api"])


# --- growth ------------------------------------------------------------------------------------------------------------


def test_growth_is_that_of_the_line_from_the_first_to_the_last(watch: ModuleType) -> None:
    assert watch.growth([10.0, 11.0, 12.0, 14.0], [5.0, 7.0, 9.0, 13.0]) == pytest.approx(8.0)
    assert watch.growth([0.0, 1.0], [1.0, 9.0]) == 0.0, "two points tell no trend"


def test_what_wobbles_is_flat_and_what_climbs_is_not(watch: ModuleType) -> None:
    wobbling, climbing = samples(watch, [100.0, 103.0] * 30), samples(watch, [100.0 + t / 10 for t in range(60)])

    assert wobbling["flat"] and abs(wobbling["grown_mib"]) < 1
    assert not climbing["flat"] and climbing["grown_mib"] == pytest.approx(5.9)
    assert climbing["mib_an_hour"] == pytest.approx(360.0)
    assert climbing["cores"] == 0.5 and "GROWS" in watch.table({"api": climbing})


def test_a_bound_is_the_larger_of_bytes_and_share(watch: ModuleType) -> None:
    bound = watch.Bound(mib=3, share=0.01)

    assert [bound.of(mean * MIB) / MIB for mean in (100, 1000)] == [3, 10]


def test_a_process_is_seen_as_it_is(watch: ModuleType) -> None:
    before = watch.look(os.getpid())
    with open(os.devnull):
        after = watch.look(os.getpid())

    assert after.files == before.files + 1 and after.threads >= 1 and after.rss_bytes > MIB and after.cpu_s >= before.cpu_s > 0


# --- books -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    server = EmbeddedServer(tmp_path)
    server.start()
    with Redis.from_url(server.url, protocol=2) as client:
        yield client
    server.stop()


def test_books_tell_a_job_that_was_lost_one_that_waits_and_a_count_that_differs(module: Callable[[str], ModuleType], redis: Redis) -> None:
    books = module("_jobs").Books(redis, "tiny")
    for job_id, status in {"done": "succeeded", "open": "running", "gone": ""}.items():
        books.accept(job_id)
        if status:
            redis.hset(protocol.job_key(job_id), mapping={"status": status, "attempts": 1})
    redis.hset(stats_key("tiny"), mapping={ended_field("succeeded"): 2})
    asyncio.run(books.look())

    told = books.failures()
    assert (books.accepted, dict(books.ended), books.lost, list(books.open)) == (3, {"succeeded": 1}, ["gone"], ["open"])
    assert len(told) == 3 and "lost" in told[0] and "not ended" in told[1] and "counted {'succeeded': 2}" in told[2]


def test_books_in_which_all_is_well_tell_nothing(module: Callable[[str], ModuleType], redis: Redis) -> None:
    books = module("_jobs").Books(redis, "tiny")
    books.accept("done")
    redis.hset(protocol.job_key("done"), mapping={"status": "succeeded", "attempts": 1})
    redis.hset(stats_key("tiny"), mapping={ended_field("succeeded"): 1})

    async def settle() -> None:
        async with books:
            await books.settle(60)

    asyncio.run(settle())
    assert books.failures() == []


# --- the client --------------------------------------------------------------------------------------------------------

SAID = b"HTTP/1.1 202 Accepted\r\nContent-Length: 7\r\nRetry-After: 3\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nid: 1\r\n4\r\n\n\n: \r\n"


async def talk(module: Callable[[str], ModuleType], answers: list[bytes], ask: Callable[[Any], Any]) -> tuple[Any, list[bytes]]:
    """What `ask(wire)` gives when a server answers so, one after the other, and closes; and what it was asked."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, module("_wire").Wire(f"http://127.0.0.1:{port}", "dit_key") as wire:
        return await ask(wire), asked


def test_the_client_reads_answers_one_after_the_other_on_one_connection(module: Callable[[str], ModuleType]) -> None:
    async def ask(wire: Any) -> list[Any]:
        return [await wire.send("GET", "/a"), await wire.send("GET", "/b", headers={"Prefer": "wait=1"})]

    (first, second), asked = asyncio.run(talk(module, [SAID + b'{"a":1}', SAID + b'{"a":2}'], ask))
    assert (first.status, first.json(), second.json(), second.headers["retry-after"]) == (202, {"a": 1}, {"a": 2}, "3")
    assert b"GET /a HTTP/1.1" in asked[0] and b"Authorization: Bearer dit_key" in asked[0] and b"Prefer: wait=1" in asked[1]


@pytest.mark.parametrize(("rest", "body"), [(b"0\r\n\r\n", b"id: 1\n\n: "), (b"", b"id: 1\n\n: "), (b"9\r\nhal", b"id: 1\n\n: ")])
def test_the_client_keeps_what_came_of_a_stream_that_ends_or_breaks_off(
    module: Callable[[str], ModuleType], rest: bytes, body: bytes
) -> None:
    answer, _ = asyncio.run(talk(module, [STREAM + rest], lambda wire: wire.stream("/events")))
    assert (answer.status, answer.body) == (200, body)


def test_the_client_says_where_no_answer_came(module: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ConnectionError, match="GET /a"):
        asyncio.run(talk(module, [b"HTTP/1.1 200"], lambda wire: wire.send("GET", "/a")))
