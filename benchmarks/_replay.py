"""What Redis does, sent again as fast as it takes it: the worker's and the API's own scripts, and one job's commands with ever new ids.

MONITOR shows what clients sent; what scripts did themselves it marks `lua`, and that is left out, since the scripts are sent. Each command
or transaction is a round trip of its own, and many connections have one under way each. So Redis pays for each as it does for many workers,
and its main thread is busy, which on a quiet machine it is not: there the way in and out of the kernel costs more than the work.
"""

import asyncio
import hashlib
import re
import selectors
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from _service import Request, Service
from redis import Redis

from worker import protocol, scripts
from worker.counts import stats_key
from worker.stats import Stats

CONNECTIONS = 48
FRESH = uuid.uuid4().hex  # stands for what is new in each call
_LINE = re.compile(r'^\d+\.\d+ \[\d+ (?P<who>[^\]]+)\] (?P<words>".*")$')
_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|.)", re.DOTALL)
_TAKE, _BEAT = (hashlib.sha1(script.encode()).hexdigest().encode() for script in (scripts.TAKE, scripts.BEAT))
_PLAIN = {"n": "\n", "r": "\r", "t": "\t", "a": "\a", "b": "\b"}

Command = Sequence[Any]


def encoded(commands: Sequence[Command]) -> bytes:
    """RESP."""
    parts = [[word if isinstance(word, bytes) else str(word).encode() for word in command] for command in commands]
    return b"".join(b"*%d\r\n%b" % (len(words), b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)) for words in parts)


def told(line: str) -> tuple[str, list[bytes]]:
    """Who sent it, or 'lua', and what, of a line of MONITOR."""
    found = _LINE.match(line)
    if found is None:
        return "", []

    def plain(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if len(code) == 3 else _PLAIN.get(code, code)

    return found["who"], [_ESCAPE.sub(plain, word).encode("latin-1") for word in _WORD.findall(found["words"])]


def of_job(lines: Sequence[str], job_id: bytes) -> list[bytes]:
    """The round trips of a job: the models looked up for it, what names it, transactions whole, and the look that took it.

    Not what tells its progress or keeps its lease, of which it has the more the longer it runs.
    """
    trips: list[list[list[bytes]]] = []
    under_way: dict[str, list[list[bytes]]] = {}
    for line in lines:
        who, words = told(line)
        if words and who != "lua":
            trip = under_way.setdefault(who, [])
            trip.append(words)
            if trip[0] != [b"MULTI"] or words == [b"EXEC"]:
                trips.append(under_way.pop(who))
    submitted = next(place for place, trip in enumerate(trips) if _names(trip, job_id))
    taken = next(place for place, trip in enumerate(trips) if place > submitted and _TAKE in trip[0])
    asked = [place for place, trip in enumerate(trips) if place < submitted and trip[0][0] in (b"SMEMBERS", b"MGET")][-2:]
    return [
        encoded(trip)
        for place, trip in enumerate(trips)
        if place in (*asked, taken) or (_names(trip, job_id) and not {*trip[0]} & {_BEAT, scripts.PROGRESS.encode(), b"finished_at"})
    ]


def _names(trip: list[list[bytes]], job_id: bytes) -> bool:
    return any(job_id in word for words in trip for word in words)


async def record_job(service: Service, pictures: int, steps: int) -> tuple[list[bytes], list[bytes]]:
    """Round trips of one job that nobody watches, from its submission to its end, and the two ids in them."""
    lines: list[str] = []
    with Redis.from_url(service.redis_url, protocol=2) as client, client.monitor() as monitor:
        ended = threading.Event()

        def listen() -> None:
            while not ended.is_set():
                lines.append(monitor.connection.read_response().decode("latin-1"))

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        answer = await service.client.post("/generate", json=asdict(Request(1, 2.0, steps, service.model["samplers"][0], 1, pictures)))
        job_id = str(answer.raise_for_status().json()["id"])
        while not service.redis.hget(protocol.job_key(job_id), "finished_at"):
            await asyncio.sleep(0.5)
        await asyncio.sleep(1.5)
        ended.set()
        listener.join(5)
    execution: Any = service.redis.hget(protocol.job_key(job_id), "execution")
    return of_job(lines, job_id.encode()), [job_id.encode(), execution]


def saturate(redis: Any, trips: Sequence[bytes], ids: Sequence[bytes], seconds: float) -> dict[str, float]:
    """How often a second all of this is done, and what Redis' main thread then pays for each: microseconds, and its share of a core."""
    host, port = redis.connection_pool.connection_kwargs["host"], redis.connection_pool.connection_kwargs["port"]
    scripts_of = [_endless(trips, ids) for _ in range(CONNECTIONS)]
    before, began, done, until = _cpu_s(redis), time.monotonic(), 0, time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for script in scripts_of:
            connection = socket.create_connection((host, port))
            selector.register(connection, selectors.EVENT_READ, script)
            connection.sendall(next(script))
        while time.monotonic() < until:
            for key, _ in selector.select(1):
                key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
                key.fileobj.sendall(next(key.data))  # type: ignore[union-attr]
                done += 1
        for key in list(selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
    used, took = _cpu_s(redis) - before, time.monotonic() - began
    each = done / len(trips)
    return {
        "times": round(each),
        "per_s": round(each / took, 1),
        "us": round(1e6 * used / each, 2),
        "core": round(used / took, 3),
        "trips": len(trips),
    }


def _endless(trips: Sequence[bytes], ids: Sequence[bytes]) -> Iterator[bytes]:
    """Over and over, with ids of the same lengths as these."""
    while True:
        fresh = [str(uuid.uuid4()).encode() if len(old) == 36 else uuid.uuid4().hex.encode() for old in ids]
        for trip in trips:
            for old, new in zip(ids, fresh, strict=True):
                trip = trip.replace(old, new)
            yield trip


def _cpu_s(redis: Any) -> float:
    info = redis.info("cpu")
    return float(info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"])


def counts_of_two_seconds() -> list[Any]:
    """What a busy worker adds with each beat: rounds of a few sizes, in about as many buckets as it then has, and pictures."""
    stats = Stats()
    for rows, seconds in ((4, 0.005), (8, 0.009), (16, 0.015), (24, 0.020), (32, 0.025)):
        for name, value in (("tick_s", seconds), ("rows", rows), ("decode_s", seconds)):
            stats.observe("any", name, value)
    for name in ("images", "bucket_rows"):
        stats.count("any", name)
    (counts,) = stats.take().values()
    return [len(counts), *(part for count in counts.items() for part in count)]


def calls(redis: Any, model: str, leases: int) -> dict[str, list[bytes]]:
    """What workers do again and again, and what clients ask: each as its own code sends it, to records of jobs that run."""
    queue, job, execution = f"rq:queue:{protocol.queue_name(model)}", "a-job", "an-execution"
    redis.hset(protocol.job_key(job), mapping={"execution": execution, "status": protocol.RUNNING, "step": 0})
    redis.zadd("rq:wip:a", {f"{job}:{execution}": time.time() + 1e6})
    redis.hset("rq:worker:a", mapping={"pid": 1})
    keys = ["rq:suspended", queue, f"{queue}:intermediate", protocol.bell_key(model), protocol.gate_key(model)]
    progress = ["EVAL", scripts.PROGRESS, 2, protocol.job_key(job), protocol.events_key(job), execution]
    beat_keys = ["rq:worker:a", "rq:worker:a:executions", protocol.MODELS_KEY, protocol.model_key(model)]
    beat_keys += ["rq:wip:a", "rq:execution:a", "rq:executions:a", f"rq:job:{job}"] * leases
    record = redis.get(protocol.model_key(model))
    beat = [redis.script_load(scripts.BEAT), len(beat_keys), *beat_keys, 30, "busy", "now", time.time(), 1, model, record]
    found = {
        "a look into the queue": ["EVALSHA", redis.script_load(scripts.TAKE), len(keys), *keys, "busy", "a-worker"],
        "progress told": [*progress, 7, "progress", '{"step": 7, "steps": 50}', protocol.EVENTS_KEPT],
        "asked whether canceled": [*progress, "", "", "{}", protocol.EVENTS_KEPT],
        f"a heartbeat with {leases} leases": ["EVALSHA", *beat, *([job, execution] * leases)],
        "a job asked for": ["HGETALL", protocol.job_key(job)],
        "counts sent": [
            "EVALSHA",
            redis.script_load(scripts.ADD),
            2,
            protocol.sent_key("a"),
            stats_key(model),
            FRESH,
            *counts_of_two_seconds(),
        ],
        "an event read": ["XREAD", "COUNT", 10, "STREAMS", protocol.events_key(job), "0"],
    }
    return {name: [encoded([command])] for name, command in found.items()}
