"""A crowd of event streams whose clients are slow, never read, or break off without a word: what it costs, and what stays of it.

    python benchmarks/streams.py [--checkpoint DIR] [--device cuda] [--streams 500] [--seconds 20] [--turns 2] [--quick]

A queue is kept full, in turns without and with the crowd, while other calls are timed. Of the crowd two fifths read what they are told, two
fifths never read, into buffers of a few kB, and a fifth come and go: each breaks off with a reset after half a second and comes again. They
watch jobs of many pictures with previews, which are what a stream tells most of. At the end of a turn those who never read stay, until the
API has given them up. Asserted: no answer but 200; after each turn the API has no stream left, and no more files and connections to Redis
than before the first one and the 64 that its pool keeps; its memory grows no more from turn to turn than a bound. The last line is JSON.
"""

import argparse
import asyncio
import json
import re
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _service import BUNDLED, Service, draw_requests, end_on_sigterm, facts, keep_full, log_tail, percentiles, running_service
from _watch import MIB, look, processes
from _wire import Wire, read_head

from worker.connect import KEPT
from worker.counts import stats_key, sum_field

WATCHED = 4  # jobs that the crowd watches
LONG = {"class_label": 0, "steps": 200, "guidance_scale": 1, "num_images": 64}  # one of them
DEPTH = 32  # small jobs that wait besides
CALM_S = 90.0  # that the API has, after a turn, to forget the crowd; who never reads is given up after 30 s
GROWTH_MIB = 8.0  # of the API, from the end of the first turn with a crowd to that of the last
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends no FIN
_LITTLE_ROOM = 4096  # bytes of a buffer that nobody reads


@dataclass
class Crowd:
    """`async with Crowd(…)`: so many streams. At the end of the block those who never read stay, until `leave()`."""

    service: Service
    jobs: list[str]
    size: int
    statuses: Counter[int] = field(default_factory=Counter)
    told_bytes: int = 0  # to those who read

    async def __aenter__(self) -> "Crowd":
        kinds = (self._read, self._never_read, self._read, self._never_read, self._break_off)
        tasks = [(kinds[n % 5], asyncio.create_task(self._again(kinds[n % 5], self.jobs[n % len(self.jobs)]))) for n in range(self.size)]
        self._silent = [task for kind, task in tasks if kind == self._never_read]
        self._others = [task for kind, task in tasks if kind != self._never_read]
        return self

    async def __aexit__(self, *_: object) -> None:
        await _end(self._others)

    async def leave(self) -> None:
        await _end(self._silent)

    async def _again(self, watch: Any, job_id: str) -> None:
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                connection, reader, writer = await self._connect(job_id)
                try:
                    await watch(connection, reader, writer)
                finally:
                    writer.transport.abort()
            await asyncio.sleep(0.5)

    async def _connect(self, job_id: str) -> tuple[socket.socket, asyncio.StreamReader, asyncio.StreamWriter]:
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LITTLE_ROOM)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", int(self.service.url.rpartition(":")[2])))
        reader, writer = await asyncio.open_connection(sock=connection)
        writer.write(f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: here\r\n\r\n".encode())
        self.statuses[(await read_head(reader))[0]] += 1
        return connection, reader, writer

    async def _read(self, connection: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (data := await reader.read(1 << 16)) and not data.endswith(b"0\r\n\r\n"):
            self.told_bytes += len(data)

    async def _never_read(self, connection: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(3600)

    async def _break_off(self, connection: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class State:
    """Of the API, and what Redis sees of it."""

    streams: int
    files: int
    clients: int
    rss_bytes: int


async def state(service: Service) -> State:
    async with Wire(service.url) as wire:
        text = (await wire.send("GET", "/metrics")).body.decode()
    (streams,) = re.findall(r"^dit_event_streams (\S+)$", text, re.MULTILINE)
    api = look(processes(service.session)["api"])
    info: Any = service.redis.info("clients")
    return State(int(float(streams)), api.files, info["connected_clients"], api.rss_bytes)


async def calm(service: Service, before: State) -> tuple[State, float]:
    """When nothing of the crowd is there any more, or after CALM_S; and the seconds that took."""
    began = time.monotonic()
    while True:
        now = await state(service)
        gone = (
            now.streams == 0 and now.files <= before.files + KEPT and now.clients <= before.clients + KEPT + 1
        )  # the worker's third, from its first job on
        if gone or time.monotonic() - began > CALM_S:
            return now, time.monotonic() - began
        await asyncio.sleep(0.5)


def rows_done(service: Service) -> float:
    value: Any = service.redis.hget(stats_key(service.checkpoint.name), sum_field("rows"))
    return float(value or 0)


async def time_calls(service: Service, job_id: str, taken_ms: list[float]) -> None:
    """What other callers wait for an answer meanwhile."""
    async with Wire(service.url) as wire:
        while True:
            for path in (f"/jobs/{job_id}", "/models", "/healthz"):
                began = time.monotonic()
                answer = await wire.send("GET", path)
                taken_ms.append(1e3 * (time.monotonic() - began) if answer.status == 200 else float("inf"))
            await asyncio.sleep(0.1)


async def turn(service: Service, options: argparse.Namespace, size: int) -> dict[str, Any]:
    """Generation with so many streams beside it."""
    async with Wire(service.url) as wire:
        answers = [await wire.send("POST", "/generate?previews=true", LONG) for _ in range(WATCHED)]
        jobs = [str(answer.json()["id"]) for answer in answers]
        taken_ms: list[float] = []
        requests = draw_requests((options.seed, size), "fine", service.model["samplers"], len(service.model["labels"]))
        crowd = Crowd(service, jobs, size)
        async with crowd:
            calls = asyncio.create_task(time_calls(service, jobs[0], taken_ms))
            await asyncio.sleep(3)
            streams = (await state(service)).streams
            began, done, cpu_s = time.monotonic(), rows_done(service), look(processes(service.session)["api"]).cpu_s
            await keep_full(service, requests, DEPTH, options.seconds)
            seconds = time.monotonic() - began
            rate, cores = (rows_done(service) - done) / seconds, (look(processes(service.session)["api"]).cpu_s - cpu_s) / seconds
            await _end([calls])
        told = {"rows_per_s": round(rate, 1), "api_cores": round(cores, 2), "other_calls_ms": percentiles(taken_ms, 1), "streams": streams}
        told |= {"statuses": dict(crowd.statuses), "told_mb": round(crowd.told_bytes / 1e6, 1)}
        for job in jobs:
            await wire.send("DELETE", f"/jobs/{job}")
        return {**told, "crowd": crowd}


async def measure(service: Service, options: argparse.Namespace) -> dict[str, Any]:
    turns, failures, after = [], list[str](), list[State]()
    async with service.client:
        before = await state(service)
        for number in range(2 * options.turns):
            told = await turn(service, options, options.streams if number % 2 else 0)
            now, seconds = await calm(service, before)
            await told.pop("crowd").leave()
            turns.append({**told, "gone_after_s": round(seconds, 1), "after": vars(now)})
            failures += [f"{count} streams with status {status}" for status, count in told["statuses"].items() if status != 200]
            failures += [f"after turn {number} there is {now}, before the first {before}"] if seconds > CALM_S else []
            failures += ["a call was not answered with 200"] if told["other_calls_ms"]["p99"] == float("inf") else []
            after += [now] if number % 2 else []
    grown_mib = (after[-1].rss_bytes - after[0].rss_bytes) / MIB
    failures += [f"the API grew by {grown_mib:.1f} MiB, and may by {GROWTH_MIB:g}"] if grown_mib > GROWTH_MIB else []
    return {"before": vars(before), "turns": turns, "api_grown_mib": round(grown_mib, 1), "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a turn")
    parser.add_argument("--turns", type=int, default=2, help="without and with the crowd")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="uncompiled and short: whether all works; its figures say nothing")
    options = parser.parse_args()
    if options.quick:
        options.streams, options.seconds, options.turns = 100, 5.0, 1
    end_on_sigterm()
    with (
        tempfile.TemporaryDirectory(prefix="dit-streams-") as folder,
        running_service(Path(folder), options.checkpoint, options.device, compile=not options.quick) as service,
    ):
        found = asyncio.run(measure(service, options))
        tail = log_tail(service.log)
    for told in found["turns"]:
        print(
            f"{told['streams']:4d} streams open: {told['rows_per_s']:7.1f} rows/s, API {told['api_cores']:.2f} cores, "
            f"other calls {told['other_calls_ms']} ms, told {told['told_mb']} MB; gone after {told['gone_after_s']} s: {told['after']}"
        )
    chosen = {key: value for key, value in vars(options).items() if key != "checkpoint"}
    model = {key: service.model[key] for key in ("id", "checkpoint", "device", "dtype")}
    print(json.dumps({**facts("streams"), "model": model, "options": chosen, **found}))
    if found["failures"]:
        sys.exit("\n".join(["does not hold:", *found["failures"], tail]))


if __name__ == "__main__":
    main()
