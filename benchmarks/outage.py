"""Redis is gone for half a minute under a service at work, once killed and once standing still; then all goes on by itself.

    python benchmarks/outage.py [--checkpoint DIR] [--device cuda] [--away 30] [--rate 4] [--quick]

Jobs are submitted at a steady rate, each under a key of its own until it is accepted; their event streams are followed, each from the last
id that came; every route is asked all the time. Meanwhile Redis (a server of this script's, with an append-only file) is killed and started
again on its file, and later stopped (SIGSTOP) and let go on. Asserted: a call is answered as it should, or with 503, a problem document and
Retry-After; /healthz with 200 always; after the outage every job ends with its pictures, once by the service's own count, and every stream
has told each event once, to its one `done`. The last line is JSON.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _jobs import Books
from _service import BUNDLED, END_TIMEOUT_S, Service, end_on_sigterm, facts, log_tail, percentiles, running_service
from _wire import Answer, Wire

from app.embedded import EmbeddedServer

QUIET_S = 10.0  # before an outage and after it
CALLS = ("/readyz", "/models", "/jobs", "/jobs/{id}", "/jobs/{id}/events", "/queues", "/healthz", "/metrics")
WITHOUT_REDIS = ("/healthz", "/metrics")
SUBMISSION = {"steps": 20, "guidance_scale": 2, "num_images": 2}


@dataclass
class Story:
    """What was seen, from where the outages are told."""

    service: Service
    books: Books
    away: bool = False
    outage: str = ""
    failures: list[str] = field(default_factory=list)
    refused: dict[str, Counter[str]] = field(default_factory=dict)  # outage → route → answers 503
    waited_s: dict[str, list[float]] = field(default_factory=dict)  # outage → seconds until such an answer
    resumed: int = 0  # streams that went on after the last id that came
    told: list[str] = field(default_factory=list)  # jobs whose stream came to its end
    back_s: dict[str, float] = field(default_factory=dict)  # outage → seconds from its end to the next job that was accepted
    ended_at: float = 0.0  # monotonic, of the last outage

    def judge(self, route: str, answer: Answer, seconds: float) -> bool:
        """Whether it was answered as it should; notes a 503, and whatever else it was."""
        if answer.status in (200, 202):
            return True
        problem = answer.json() if answer.headers["content-type"] == "application/problem+json" else {}
        known = answer.status == 503 and problem.get("type") in ("urn:dit:problem:redis-away", "urn:dit:problem:not-ready")
        known = known or (answer.status == 503 and problem.get("type") == "urn:dit:problem:no-worker")
        if not known or not answer.headers.get("retry-after", "").isdigit() or not self.outage or route in WITHOUT_REDIS:
            self.failures.append(f"{route} was answered with {answer.status} {answer.headers} {answer.body[:300]!r}")
        self.refused.setdefault(self.outage, Counter())[route] += 1
        self.waited_s.setdefault(self.outage, []).append(seconds)
        return False

    async def ask(self, wire: Wire, method: str, path: str, route: str, **options: Any) -> Answer | None:
        """None where it was 503."""
        began = time.monotonic()
        try:
            answer = await wire.send(method, path, **options)
        except ConnectionError as error:
            self.failures.append(f"{route}: {error}")
            return None
        return answer if self.judge(route, answer, time.monotonic() - began) else None

    async def submit(self, number: int) -> str:
        """The id of a job, once it is accepted."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        async with Wire(self.service.url) as wire:
            while True:
                body = {**SUBMISSION, "class_label": number % 10, "seed": number}
                answer = await self.ask(wire, "POST", "/generate", "POST /generate", body=body, headers=headers)
                if answer:
                    self._note_return()
                    self.books.accept(answer.json()["id"])
                    return str(answer.json()["id"])
                await asyncio.sleep(0.5)

    def _note_return(self) -> None:
        if self.outage and not self.away:
            self.back_s.setdefault(self.outage, time.monotonic() - self.ended_at)

    async def follow(self, job_id: str) -> None:
        """Its events to the last, over as many streams as it takes."""
        ids, names, deadline = list[str](), list[str](), time.monotonic() + END_TIMEOUT_S
        while "done" not in names and time.monotonic() < deadline:
            before = len(ids)
            async with Wire(self.service.url) as wire:
                began = time.monotonic()
                answer = await wire.stream(f"/jobs/{job_id}/events", {"Last-Event-ID": ids[-1]} if ids else {})
                if self.judge("/jobs/{id}/events", answer, time.monotonic() - began):
                    lines = [line.partition(": ") for line in answer.body.decode().splitlines()]
                    ids += [value for name, _, value in lines if name == "id"]
                    names += [value for name, _, value in lines if name == "event"]
                    self.resumed += before > 0 and len(ids) > before
            await asyncio.sleep(0.2)
        order = [tuple(map(int, event_id.split("-"))) for event_id in ids]
        if names.count("done") != 1 or names[-1] != "done" or order != sorted(set(order)):
            self.failures.append(f"the stream of {job_id} told {list(zip(ids, names, strict=True))}")
        self.told.append(job_id)

    async def pictures(self, job_id: str) -> None:
        """All are there, when the job has ended."""
        async with Wire(self.service.url) as wire:
            job = (await wire.send("GET", f"/jobs/{job_id}")).json()
            found = [(await wire.send("GET", image["url"])).status for image in job["images"]]
        if found != [200] * SUBMISSION["num_images"]:
            self.failures.append(f"job {job_id} is {job['status']} and has {found}")

    async def look_around(self, job_id: str) -> None:
        """Every route, one after the other."""
        async with Wire(self.service.url) as wire:
            while True:
                for route in (route for route in CALLS if not route.endswith("/events")):
                    await self.ask(wire, "GET", route.format(id=job_id), route)
                await asyncio.sleep(0.2)


async def outages(story: Story, server: EmbeddedServer, away_s: float) -> None:
    """One after the other."""
    assert server.process
    for outage, begin, end in (
        ("killed", lambda: (server.process.kill(), server.process.wait()), server.start),
        ("stopped", lambda: server.process.send_signal(signal.SIGSTOP), lambda: server.process.send_signal(signal.SIGCONT)),
    ):
        await asyncio.sleep(QUIET_S)
        story.outage, story.away = outage, True
        await asyncio.to_thread(begin)
        await asyncio.sleep(away_s)
        await asyncio.to_thread(end)
        story.ended_at, story.away = time.monotonic(), False
        await asyncio.sleep(2 * QUIET_S)
        story.outage = ""


async def play(service: Service, server: EmbeddedServer, options: argparse.Namespace) -> dict[str, Any]:
    async with Books(service.redis, service.checkpoint.name) as books:
        story = Story(service, books)
        first = await story.submit(0)
        looking = [asyncio.create_task(story.look_around(first)) for _ in range(4)]
        happening = asyncio.create_task(outages(story, server, options.away))
        followed, number = [asyncio.create_task(story.follow(first))], 1
        submitting: set[asyncio.Task[None]] = set()

        async def one(number: int) -> None:
            followed.append(asyncio.create_task(story.follow(await story.submit(number))))

        while not happening.done():
            submitting.add(asyncio.create_task(one(number)))
            number += 1
            await asyncio.sleep(1 / options.rate)
        await happening
        await asyncio.gather(*submitting)
        await asyncio.gather(*followed)
        for task in looking:
            task.cancel()
        await asyncio.gather(*looking, return_exceptions=True)
        await books.settle(END_TIMEOUT_S)
        for job_id in story.told:
            await story.pictures(job_id)
    failures = story.failures[:5] + books.failures()
    failures += [] if books.accepted == number and len(story.told) == number else [f"{number} asked for, {books.accepted} accepted"]
    return {
        "jobs": {"asked": number, "ended": dict(books.ended), "attempts": {str(n): books.attempts[n] for n in sorted(books.attempts)}},
        "answers_503": {outage: dict(routes) for outage, routes in story.refused.items()},
        "seconds_to_a_503": {outage: percentiles(waited, 2) for outage, waited in story.waited_s.items()},
        "accepted_again_after_s": {outage: round(seconds, 2) for outage, seconds in story.back_s.items()},
        "streams_resumed": story.resumed,
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--away", type=float, default=30.0, help="seconds of each outage")
    parser.add_argument("--rate", type=float, default=4.0, help="jobs a second")
    parser.add_argument("--quick", action="store_true", help="uncompiled and short: whether all works; its figures say nothing")
    options = parser.parse_args()
    if options.quick:
        options.away, options.rate = 5.0, 1.0
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="dit-outage-") as folder:
        server = EmbeddedServer(Path(folder) / "redis")
        server.start()
        try:
            variables = {"DIT_REDIS_URL": server.url}
            with running_service(Path(folder), options.checkpoint, options.device, compile=not options.quick, **variables) as service:
                found = asyncio.run(play(service, server, options))
                tail = log_tail(service.log)
        finally:
            server.stop()
    print(json.dumps({key: value for key, value in found.items() if key != "failures"}, indent=2))
    chosen = {key: value for key, value in vars(options).items() if key != "checkpoint"}
    model = {key: service.model[key] for key in ("id", "checkpoint", "device", "dtype")}
    print(json.dumps({**facts("outage"), "model": model, "options": chosen, **found}))
    if found["failures"]:
        sys.exit("\n".join(["does not hold:", *found["failures"], tail]))


if __name__ == "__main__":
    main()
