"""What Redis does for each worker, job and picture, and so how many of them one Redis bears.

    python benchmarks/redis_load.py [--seconds 40] [--load 0.5] [--quick]

A redis-server of this machine with an append-only file, over TCP; `dit up` over it with the bundled model: a real API and a real worker.

1. At rest: what Redis uses by itself, and with a worker that waits, per second.
2. At work: jobs of the fine mix of serving.py, at a share of the worker's pace, left alone; then each followed by its event stream; then
   with previews. INFO before and after gives commands (those inside scripts too), CPU of Redis' main thread, bytes in, out and appended.
   `MEMORY USAGE` of what is left says what a job that has ended takes.
3. Full: the scripts of workers and API, and the commands of one job as MONITOR has shown them, sent as fast as Redis takes them.

From 3 follows how many busy workers and jobs a second fill one Redis. CPU is this machine's; commands, bytes and memory are the same
everywhere. The last line is JSON.
"""

import argparse
import asyncio
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from _replay import FRESH, calls, record_job, saturate
from _service import BUNDLED, Request, Service, child, draw_requests, end_on_sigterm, facts, free_port, running_service
from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.serializers import JSONSerializer

from worker import protocol
from worker.heart import RENEW_EVERY_S
from worker.maintenance import Maintenance
from worker.rq_process import MAINTENANCE_EVERY_S
from worker.rq_worker import CALLS_PER_S, LOOK_EVERY_S, TELL_EVERY_S

FULL = 0.7  # of a core; beyond, whoever asks waits
LEASES = 6  # jobs of a busy worker: what serving.py has at 80 % of capacity, about
Watch = Callable[[Service, str], Awaitable[None]]


@dataclass(frozen=True)
class Reading:
    """INFO at one moment, or the difference of two."""

    cpu_ms: float
    commands: float
    kb_in: float
    kb_out: float
    kb_aof: float
    seconds: float

    @classmethod
    def now(cls, redis: Any) -> "Reading":
        info = redis.info("everything")
        cpu = info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"]
        done = sum(told["calls"] for name, told in info.items() if name.startswith("cmdstat_"))
        sizes = (info["total_net_input_bytes"], info["total_net_output_bytes"], info["aof_current_size"])
        return cls(1000 * cpu, done, *(size / 1000 for size in sizes), time.monotonic())

    def __sub__(self, other: "Reading") -> "Reading":
        return Reading(**{name: value - getattr(other, name) for name, value in asdict(self).items()})

    def by(self, amount: float) -> dict[str, float]:
        return {name: round(value / amount, 3) for name, value in asdict(self).items()}


@contextmanager
def redis_server(folder: Path, port: int) -> Iterator[str]:
    """Its URL."""
    program = shutil.which("redis-server")
    if program is None:
        raise RuntimeError("redis-server is not installed: apt-get install redis-server")
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "appendonly": "yes", "save": "", "maxmemory-policy": "noeviction"}
    command = [program, *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    url = f"redis://127.0.0.1:{port}/0"

    def answers() -> bool:
        try:
            with Redis.from_url(url, protocol=2) as client:
                return bool(client.ping())
        except RedisError:
            return False

    with child(command, {}, folder, folder / "redis.log", answers, signal.SIGTERM):
        yield url


async def rest(redis: Any, seconds: float) -> dict[str, float]:
    """Per second."""
    before = Reading.now(redis)
    await asyncio.sleep(seconds)
    return (Reading.now(redis) - before).by(seconds)


async def work(service: Service, requests: Sequence[Request], seconds: float, watch: Watch | None = None, previews: bool = False) -> Any:
    """Post them evenly within `seconds`. → (INFO's difference until all have ended, seconds that each ran, ids)"""
    before, began, ids, watching = Reading.now(service.redis), time.monotonic(), list[str](), []
    for number, request in enumerate(requests):
        await asyncio.sleep(began + number * seconds / len(requests) - time.monotonic())
        answer = await service.client.post("/generate", params={"previews": str(previews).lower()}, json=asdict(request))
        ids.append(answer.raise_for_status().json()["id"])
        watching += [asyncio.create_task(watch(service, ids[-1]))] if watch else []
    leases = service.queue_key.replace("queue", "wip")
    while int(service.redis.zcard(leases)) or int(service.redis.llen(service.queue_key)):
        await asyncio.sleep(0.5)
    await asyncio.gather(*watching)
    cost = Reading.now(service.redis) - before
    records: Any = [service.redis.hmget(protocol.job_key(job_id), "status", "started_at", "finished_at") for job_id in ids]
    if any(status != protocol.SUCCEEDED.encode() for status, *_ in records):
        raise RuntimeError("a job has not succeeded")
    return cost, [float(finished) - float(started) for _, started, finished in records], ids


async def follow(service: Service, job_id: str) -> None:
    async with service.client.stream("GET", f"/jobs/{job_id}/events") as stream:
        async for _ in stream.aiter_lines():
            pass


def memory(redis: Any, ids: Sequence[str]) -> dict[str, float]:
    """Bytes of a job that has ended, on average: its record, its events and their number, a PNG and what its key takes besides."""
    found: dict[str, list[float]] = {name: [] for name in ("record", "events", "number_of_events", "png", "key_of_a_png")}
    for job_id in ids:
        execution, images = redis.hmget(protocol.job_key(job_id), "execution", "images")
        found["record"].append(redis.memory_usage(protocol.job_key(job_id), samples=0))
        found["events"].append(redis.memory_usage(protocol.events_key(job_id), samples=0))
        found["number_of_events"].append(redis.xlen(protocol.events_key(job_id)))
        for image in json.loads(images):
            found["png"].append(image["bytes"])
            key = protocol.image_key(job_id, execution.decode(), image["index"])
            found["key_of_a_png"].append(redis.memory_usage(key, samples=0) - image["bytes"])
    return {name: round(float(np.mean(values)), 1) for name, values in found.items()}


async def at_work(service: Service, options: argparse.Namespace) -> dict[str, Any]:
    redis: Any = service.redis
    async with service.client:
        drawn = draw_requests((options.seed,), "fine", service.model["samplers"][:1], len(service.model["labels"]))
        jobs = max(
            8, int(options.load * service.model["rows_per_s"] * options.seconds / 150)
        )  # of 150 rows: 2.5 pictures, 30 steps, guided
        requests = list(islice(drawn, jobs))
        await work(service, requests[:5], 2.0)
        await asyncio.sleep(3)
        found: dict[str, Any] = {"waiting worker, a second": await rest(redis, options.seconds / 2)}
        ways: list[tuple[str, Watch | None, bool]] = [("left alone", None, False), ("followed", follow, False), ("previews", None, True)]
        for name, watch, previews in ways:
            cost, ran, ids = await work(service, requests, options.seconds, watch, previews)
            told = {"jobs": jobs, "ran_s": round(float(np.mean(ran)), 3), "in_parallel": round(sum(ran) / cost.seconds, 2)}
            found[f"a job, {name}"] = {**cost.by(jobs), **told}
            if name == "left alone":
                found["memory"] = memory(redis, ids)
        trips, named = await record_job(service, 2, 30)
    return {**found, "trips": trips, "named": named, "model": service.model["id"]}


def full(redis: Any, model: str, trips: Sequence[bytes], named: Sequence[bytes], seconds: float) -> dict[str, dict[str, float]]:
    """Kind of call → what it costs where Redis is busy."""
    before = redis.zcard(protocol.JOBS_KEY)
    found = {"a job of 2 pictures, progress aside": saturate(redis, trips, named, seconds)}
    if redis.zcard(protocol.JOBS_KEY) - before < 0.9 * found["a job of 2 pictures, progress aside"]["times"]:
        raise RuntimeError("Redis refused some of the jobs that were sent again: it is full")
    found |= {name: saturate(redis, call, [FRESH.encode()], seconds) for name, call in calls(redis, model, LEASES).items()}
    maintenance = Maintenance(redis)
    start = Reading.now(redis)
    queue = Queue(protocol.queue_name(model), connection=redis, serializer=JSONSerializer)
    for _ in range(200):
        maintenance.clean(model, queue)
    found["maintenance"] = {"us": round(1000 * (Reading.now(redis) - start).cpu_ms / 200, 2)}
    return found


def share(us: dict[str, float], workers: int) -> float:
    """Of one core of Redis: workers that have LEASES jobs each, of which none begins or ends."""

    def every(seconds: float) -> float:
        return max(seconds, workers / CALLS_PER_S)

    looks, tells = us["a look into the queue"] / every(LOOK_EVERY_S), LEASES * us["progress told"] / every(TELL_EVERY_S)
    beats = (us[f"a heartbeat with {LEASES} leases"] + us["counts sent"]) / RENEW_EVERY_S
    kept = beats + us["maintenance"] / MAINTENANCE_EVERY_S
    return workers * (looks + tells + kept) / 1e6


def fleet(cost: dict[str, dict[str, float]]) -> list[dict[str, float]]:
    """Busy workers → what they take of one core of Redis, and the jobs a second for which there is room until it is FULL."""
    us = {name: entry["us"] for name, entry in cost.items()}
    rows = []
    for workers in (1, 10, 100, 1000, 2000, 4000):
        room = max(0.0, FULL - share(us, workers)) * 1e6 / us["a job of 2 pictures, progress aside"]
        rows.append({"workers": workers, "share": round(share(us, workers), 4), "jobs_per_s": round(room)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each part at work")
    parser.add_argument("--load", type=float, default=0.5, help="share of the worker's pace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="whether all works; its figures say nothing")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 4.0
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as name, redis_server(Path(name), free_port()) as url:
        redis = Redis.from_url(url, protocol=2)
        alone = asyncio.run(rest(redis, options.seconds / 2))
        with running_service(Path(name), BUNDLED, "cpu", compile=not options.quick, DIT_REDIS_URL=url) as service:
            found = asyncio.run(at_work(service, options))
        costs = full(redis, found.pop("model"), found.pop("trips"), found.pop("named"), options.seconds / 8)
    found = {"Redis alone, a second": alone, **found}
    for name, entry in {**found, **costs}.items():
        print(f"{name:<40}", "  ".join(f"{key} {value:g}" for key, value in entry.items()))
    print(f"\nbusy workers with {LEASES} jobs each, their share of a core of Redis, jobs a second until {FULL:.0%}")
    for row in fleet(costs):
        print(f"  {row['workers']:>5} {row['share']:8.2%} {row['jobs_per_s']:8}")
    print(json.dumps({**facts("redis_load"), "options": vars(options), "measured": found, "full": costs, "fleet": fleet(costs)}))


if __name__ == "__main__":
    main()
