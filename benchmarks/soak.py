"""Twenty minutes of what users do, at about half of what the machine can: nothing grows, nothing is lost, nothing breaks.

    python benchmarks/soak.py [--checkpoint DIR] [--device cuda] [--minutes 20] [--share 0.5] [--quick]

First the rate at which sessions (see _users.py) can be served is measured by a closed loop; then they come at a share of it, at times drawn
as those of a Poisson process. Besides, /metrics and /readyz are asked every five seconds, a checkpoint is published or rolled back every
two minutes, and a key is made and revoked every minute. Results live a minute. Asserted, from the end of the warm-up on: memory of every
process grows by less than a bound, along the line of least squares through its samples; files and threads of an idle service are what they
were; no answer but the expected ones, so no 5xx; every accepted job ends and is counted once. The last line is JSON.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
from _jobs import Books
from _service import BUNDLED, END_TIMEOUT_S, Service, end_on_sigterm, facts, log_tail, running_service
from _users import Users
from _watch import Bound, Watch, look, processes, table
from _wire import Wire

from app.keys import create_key, revoke_key
from model.checkpoint import load, save
from model.registry import publish, roll_back
from worker.connect import KEPT

TTL_S = 60
FLAT = Bound(mib=3, share=0.01)
WARM_SHARE = 0.25  # of the time
CALIBRATE_S, CROWD = 20.0, 24  # a closed loop of so many users
MOST_AT_ONCE = 100  # sessions; more would mean that the share is no share
CALM_S = 15.0  # until an idle API has closed its clients' connections


class Versions:
    """Two versions of the model, which take turns; a third and more are published anew."""

    def __init__(self, registry: Path, checkpoint: Path) -> None:
        self.registry, self.model, self.count = registry, checkpoint.name, 0
        self.source = load(checkpoint)
        self.hashes = [publish(registry, self.model, checkpoint)]

    def change(self) -> None:
        """Publish a new one, and the next time go back."""
        self.count += 1
        if self.count % 2 == 0:
            roll_back(self.registry / self.model, self.hashes[-2])
            return
        with tempfile.TemporaryDirectory(prefix="dit-version-") as folder, torch.no_grad():
            next(self.source.dit.parameters()).add_(1e-4)
            save(Path(folder) / "new", self.source, card="# A version of a soak\n")
            self.hashes.append(publish(self.registry, self.model, Path(folder) / "new"))


async def every(seconds: float, act: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        await act()


async def scrape(users: Users) -> None:
    async with Wire(users.url, users.keys["root"]) as wire:
        for path in ("/metrics", "/readyz"):
            await users.call(wire, "GET", path, 200)


async def turn_a_key(keys: Path, users: Users) -> None:
    """One that is made, used and revoked."""
    entry, key = await asyncio.to_thread(create_key, keys, "guest", "generate", per_minute=2)
    async with Wire(users.url, key) as wire:
        for expected in (200, 200, 429):
            await users.call(wire, "GET", "/models", expected)
        await asyncio.to_thread(revoke_key, keys, entry.id)
        await users.call(wire, "GET", "/models", 401)


async def closed_loop(users: Users, seconds: float) -> float:
    """Sessions a second that a crowd gets through."""
    until, before = time.monotonic() + seconds, users.played.total()

    async def one() -> None:
        while time.monotonic() < until:
            await users.session()

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(CROWD)))
    return (users.played.total() - before) / (time.monotonic() - began)


async def open_loop(users: Users, rate: float, seconds: float) -> int:
    """Sessions begin at so many a second. → those that were left out, since too many had not ended."""
    until, running, left_out = time.monotonic() + seconds, set[asyncio.Task[None]](), 0
    while time.monotonic() < until:
        await asyncio.sleep(users.draw.expovariate(rate))
        running = {task for task in running if not task.done()}
        if len(running) < MOST_AT_ONCE:
            running.add(asyncio.create_task(users.session()))
        else:
            left_out += 1
    await asyncio.gather(*running)
    return left_out


async def idle(service: Service) -> dict[str, tuple[int, int]]:
    """Files and threads of each process, while nobody asks anything."""
    await asyncio.sleep(CALM_S)
    found = {name: look(pid) for name, pid in processes(service.session).items()}
    return {name: (sample.files, sample.threads) for name, sample in found.items()}


def changed(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    """What an idle service has more of than before. The pool's connections may be there, and their other ends in Redis."""
    spare = {"api": KEPT, "redis": KEPT}
    told = []
    for name, (files, threads) in after.items():
        if files > before[name][0] + spare.get(name, 0) or threads > before[name][1]:
            told.append(f"{name} has {files} files and {threads} threads, and had {before[name]}")
    return told


async def measure(service: Service, keys: Path, named: dict[str, str], versions: Versions, options: argparse.Namespace) -> dict[str, Any]:
    seconds = 60 * options.minutes
    async with Books(service.redis, service.checkpoint.name) as books, Watch(processes(service.session), service.redis) as watch:
        users = Users(service.url, named, books, random.Random(options.seed))
        capacity = await closed_loop(users, CALIBRATE_S)
        await asyncio.to_thread(versions.change)  # the first one starts threads that stay
        before, start = await idle(service), time.monotonic()
        meanwhile = [
            asyncio.create_task(every(5, lambda: scrape(users))),
            asyncio.create_task(every(60, lambda: turn_a_key(keys, users))),
            asyncio.create_task(every(options.publish, lambda: asyncio.to_thread(versions.change))),
        ]
        left_out = await open_loop(users, options.share * capacity, seconds)
        end = time.monotonic()
        for task in meanwhile:
            task.cancel()
        await asyncio.gather(*meanwhile, return_exceptions=True)
        await books.settle(END_TIMEOUT_S)
        after = await idle(service)
    figures = watch.figures(start + WARM_SHARE * seconds, end, FLAT)
    failures = users.failures[:5] + books.failures() + changed(before, after)
    failures += [f"memory of {name} grows" for name, value in figures.items() if not value["flat"]]
    failures += [f"{task.exception()!r}" for task in meanwhile if task.done() and not task.cancelled() and task.exception()]
    return {
        "sessions": {"capacity_per_s": round(capacity, 2), "played": dict(users.played), "left_out": left_out},
        "jobs": {"accepted": books.accepted, "ended": dict(books.ended)},
        "versions": versions.count,
        "answers": dict(sorted(users.answers.items())),
        "idle_files_and_threads": {"before": before, "after": after},
        "processes": figures,
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--share", type=float, default=0.5, help="of the capacity")
    parser.add_argument("--publish", type=float, default=120.0, help="seconds from one change of the checkpoint to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="uncompiled and short: whether all works; its figures say nothing")
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.publish = 1.0, 20.0
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="dit-soak-") as name:
        folder = Path(name)
        versions, keys = Versions(folder / "registry", options.checkpoint.resolve()), folder / "keys.json"
        named = {who: create_key(keys, who, "admin" if who == "root" else "generate", in_flight=limit)[1] for who, limit in OWNERS.items()}
        variables = {"DIT_RESULT_TTL": str(TTL_S), "DIT_API_KEYS_FILE": str(keys)}
        model = folder / "registry" / versions.model
        with running_service(folder, model, options.device, compile=not options.quick, **variables) as service:
            found = asyncio.run(measure(service, keys, named, versions, options))
            tail = log_tail(service.log)
    print(f"sessions: {found['sessions']}\njobs: {found['jobs']}; the checkpoint changed {found['versions']} times")
    print(f"idle, files and threads: {found['idle_files_and_threads']}\n{table(found['processes'])}")
    chosen = {key: value for key, value in vars(options).items() if key != "checkpoint"}
    served = {key: service.model[key] for key in ("id", "checkpoint", "device", "dtype")}
    print(json.dumps({**facts("soak"), "model": served, "options": chosen, "result_ttl_s": TTL_S, **found}))
    if found["failures"]:
        sys.exit("\n".join(["does not hold:", *found["failures"], tail]))


OWNERS: dict[str, int | None] = {"ann": None, "bob": 8, "root": None}  # name of a key → jobs that it may have in flight

if __name__ == "__main__":
    main()
