"""As many submissions as two cores give, against the bound of the queue: nothing breaks, nothing grows, every accepted job ends.

    python benchmarks/load.py [--checkpoint DIR] [--device cuda] [--seconds 120] [--connections 32] [--quick]

A closed loop over so many connections, each with its next submission as soon as the last one is answered, and without a pause after 429,
as no client of ours does it. A job is one picture in few steps without guidance, so that some are accepted all the time; results live a few
seconds, so that Redis too comes to rest. Asserted: no answer but 202 and 429, and every 429 with Retry-After; every accepted job ends and
is counted once; memory of every process flat after the warm-up; nothing of the jobs left at the end. The last line is JSON.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _jobs import Books
from _service import BUNDLED, END_TIMEOUT_S, Service, end_on_sigterm, facts, log_tail, percentiles, running_service
from _watch import Bound, Watch, processes, table
from _wire import Wire

from worker import protocol

TTL_S = 15
WARM_S = 90.0  # rq keeps its own records of a job a minute longer than its pictures live
FLAT = Bound(mib=3, share=0.01)
TIDY_S = 90.0  # after the last end, until nothing of the jobs may be left


@dataclass(frozen=True)
class Posted:
    """A submission and its answer; times are monotonic seconds."""

    t: float
    seconds: float
    status: int
    retry_after: str | None


@dataclass
class Load:
    """What was posted, and what did not hold."""

    posted: list[Posted] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def post(self, service: Service, books: Books, steps: int, until: float) -> None:
        """One connection's submissions."""
        body, wire = {"class_label": 0, "steps": steps, "guidance_scale": 1}, Wire(service.url)
        while (t := time.monotonic()) < until:
            try:
                answer = await wire.send("POST", "/generate", {**body, "seed": len(self.posted)})
            except ConnectionError as error:
                self.failures.append(str(error))
                continue
            self.posted.append(Posted(t, time.monotonic() - t, answer.status, answer.headers.get("retry-after")))
            if answer.status == 202:
                books.accept(answer.json()["id"])
        wire.close()

    def judge(self) -> list[str]:
        """What does not hold of the answers."""
        others = Counter(one.status for one in self.posted if one.status not in (202, 429))
        bare = sum(one.status == 429 and not (one.retry_after or "").isdigit() for one in self.posted)
        told = [*self.failures[:3], *(f"{count} answers with status {status}" for status, count in others.items())]
        return told + ([f"{bare} answers 429 without Retry-After"] if bare else [])


def summary(posted: Sequence[Posted], seconds: float) -> dict[str, Any]:
    """Rates a second, and milliseconds from a submission to its answer, of those that were made in the time that counts."""
    by_status = {status: [1e3 * one.seconds for one in posted if one.status == status] for status in (202, 429)}
    return {
        "submissions_per_s": round(len(posted) / seconds, 1),
        "accepted_per_s": round(len(by_status[202]) / seconds, 1),
        "refused_per_s": round(len(by_status[429]) / seconds, 1),
        "accepted_ms": percentiles(by_status[202], 1),
        "refused_ms": percentiles(by_status[429], 1),
    }


async def measure(service: Service, options: argparse.Namespace) -> dict[str, Any]:
    start = time.monotonic() + options.warm
    end, load = start + options.seconds, Load()
    async with Books(service.redis, service.checkpoint.name) as books, Watch(processes(service.session), service.redis) as watch:
        await asyncio.gather(*(load.post(service, books, options.steps, end) for _ in range(options.connections)))
        await books.settle(END_TIMEOUT_S)
    figures = watch.figures(start, end, FLAT)
    left = await left_over(service)
    failures = load.judge() + books.failures() + ([f"keys left: {left[:5]}"] if left else [])
    failures += [f"memory of {name} grows" for name, value in figures.items() if not value["flat"]]
    told = summary([one for one in load.posted if one.t >= start], options.seconds)
    jobs = {"accepted": books.accepted, "ended": dict(books.ended)}
    return {**told, "jobs": jobs, "processes": figures, "failures": failures}


async def left_over(service: Service) -> list[str]:
    """Keys of jobs that are there when all should have expired; the worker cleans up."""
    patterns, deadline = ("dit:job:*", "dit:image:*", "rq:job:*", protocol.BOOKS_KEY, protocol.BYTES_KEY), time.monotonic() + TIDY_S
    while left := [key.decode() for pattern in patterns for key in service.redis.scan_iter(pattern, count=1000)]:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(1)
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=120.0, help="that count")
    parser.add_argument("--warm", type=float, default=WARM_S, help="seconds before")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--queue-limit", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="uncompiled and short: whether all works; its figures say nothing")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.warm = 5.0, 2.0
    end_on_sigterm()
    bounds = {"DIT_QUEUE_LIMIT": str(options.queue_limit), "DIT_RESULT_TTL": str(TTL_S)}
    with (
        tempfile.TemporaryDirectory(prefix="dit-load-") as folder,
        running_service(Path(folder), options.checkpoint, options.device, compile=not options.quick, **bounds) as service,
    ):
        found = asyncio.run(measure(service, options))
        tail = log_tail(service.log)
    if options.quick:
        found["failures"] = [failure for failure in found["failures"] if not failure.startswith("memory")]

    print(f"submissions a second: {found['submissions_per_s']}, accepted {found['accepted_per_s']}, refused {found['refused_per_s']}")
    print(f"milliseconds to the answer: accepted {found['accepted_ms']}, refused {found['refused_ms']}")
    print(f"jobs: {found['jobs']}\n{table(found['processes'])}")
    chosen = {key: value for key, value in vars(options).items() if key != "checkpoint"}
    model = {key: service.model[key] for key in ("id", "checkpoint", "device", "dtype")}
    print(json.dumps({**facts("load"), "model": model, "options": chosen, "result_ttl_s": TTL_S, **found}))
    if found["failures"]:
        sys.exit("\n".join(["does not hold:", *found["failures"], tail]))


if __name__ == "__main__":
    main()
