"""python -m tests.chaos.long, or `make chaos`: a thousand jobs, fifty kills and a Redis that is killed, under a supervisor.

Every job must end once and succeed, its pictures must be those of an undisturbed worker, and no key may stay. Where all of that holds, a
report goes to benchmarks/reports/; the last line is JSON.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.chaos.service import LEASES, QUEUE, Service, Worker
from tests.chaos.services import Services
from tests.chaos.tiny import LABELS, picture_request
from tests.chaos.worker import POINTS, Mishap
from training.runlog import commit, hardware
from worker import protocol
from worker.protocol import GenerationRequest

REPORTS = Path(__file__).resolve().parents[2] / "benchmarks" / "reports"
AT_ONCE = "at any moment"  # a SIGKILL from outside, beside those at the points
WAYS = (AT_ONCE, *(point for point, (owner, _, _) in POINTS.items() if owner.__module__.startswith("worker.")))
DIFFERENT = 60  # requests, of which the jobs are copies
WAITING = 24  # jobs that the queue is kept at
STEPS = (20, 100)
REDIS_AWAY_S = 3.0


@dataclass
class Run:
    """The service under fire, and what was measured."""

    service: Service
    jobs: int
    kills: int
    size: int  # workers
    draw: random.Random
    deaths: list[str] = field(default_factory=list)  # how each worker was killed
    waits_s: list[float] = field(default_factory=list)  # from a worker's death until a job of it was in the queue again
    runs_s: list[float] = field(default_factory=list)  # and until it ran again, in company
    runs_alone_s: list[float] = field(default_factory=list)  # or alone, since it had lost its worker twice or more
    lost: dict[str, tuple[int, str]] = field(default_factory=dict)  # job → ms of the server's clock at the death, its execution then
    ordered: dict[int, str] = field(default_factory=dict)  # worker's number → the way in which it shall die

    def requests(self) -> list[GenerationRequest]:
        """One to three pictures, of every class."""
        return [
            picture_request(
                self.draw.randrange(len(LABELS)),
                steps=self.draw.randint(*STEPS),
                seed=self.draw.randrange(2**32),
                num_images=self.draw.randrange(1, 4),
            )
            for _ in range(DIFFERENT)
        ]

    def play(self) -> float:
        """→ the seconds it took, until the last job had ended."""
        began, requests, redis_lives = time.monotonic(), self.requests(), True
        while not (self.service.look() and self._enough):
            self._supervise()
            self._note_recoveries()
            self._submit(requests)
            ended = len(self.service.ended)
            if len(self.deaths) + len(self.ordered) < min(self.kills, self.kills * ended / (0.9 * self.jobs)):
                self._kill_one()
            if redis_lives and ended >= self.jobs / 2:
                redis_lives = False
                self._restart_redis()
            time.sleep(0.02)
        return time.monotonic() - began

    @property
    def _enough(self) -> bool:
        """A worker that shall die at a point must come to it, for which it may take some jobs more."""
        return len(self.service.accepted) >= self.jobs and len(self.deaths) >= self.kills

    def _submit(self, requests: Sequence[GenerationRequest]) -> None:
        room = WAITING - len(self.service.waiting())
        if room > 0 and not self._enough:
            self.service.submit(*self.draw.choices(requests, k=room))

    # Death and birth.

    def _orders(self, number: int, point: str) -> Path:
        return self.service.server.folder / f"kill-{number}-{point}"

    def _supervise(self) -> None:
        """A worker that has died is replaced at once, as an orchestrator does it."""
        alive = 0
        for number, worker in enumerate(self.service.workers):
            alive += worker.alive
            if number in self.ordered and not worker.alive:
                self._note_death(worker, self.ordered.pop(number))
        for _ in range(self.size - alive):
            number = len(self.service.workers)
            self.service.spawn(*(Mishap(point, None, order=self._orders(number, point)) for point in WAYS if point != AT_ONCE))

    def _kill_one(self) -> None:
        """Now, or when it next comes to a point."""
        living = [number for number, worker in enumerate(self.service.workers) if worker.alive and number not in self.ordered]
        if not living:
            return
        number, way = self.draw.choice(living), WAYS[(len(self.deaths) + len(self.ordered)) % len(WAYS)]
        self.ordered[number] = way
        if way == AT_ONCE:
            self.service.workers[number].signal(signal.SIGKILL)
        else:
            self._orders(number, way).touch()

    def _note_death(self, worker: Worker, way: str) -> None:
        assert worker.status == -signal.SIGKILL, worker.log.read_text()
        self.service.lease_ends_soon(worker)
        self.deaths.append(way)
        redis, name = self.service.redis, self.service.name(worker)
        seconds, microseconds = redis.time()
        now = 1000 * seconds + microseconds // 1000
        for entry in redis.smembers(f"{name}:executions") if name else ():
            job, execution = entry.decode().split(":")
            self.lost[job] = (now, execution)
        if way == "popped":
            leased = {lease.decode().split(":")[0] for lease in redis.zrange(LEASES, 0, -1)}
            for job in {job.decode() for job in redis.lrange(f"{QUEUE}:intermediate", 0, -1)} - leased:
                self.lost[job] = (now, "")

    def _note_recoveries(self) -> None:
        """Jobs that another execution has taken since. Each event has in its id the ms at which it was written."""
        for job, (death, execution) in list(self.lost.items()):
            owner, attempts = self.service.redis.hmget(protocol.job_key(job), "execution", "attempts")
            if (owner or b"").decode() in ("", execution):
                continue
            since = {"queued": [], "progress": []}  # seconds from the death, of each event
            for key, fields in self.service.redis.xrange(protocol.events_key(job), min=death):
                since.get(fields[b"event"].decode(), []).append((int(key.split(b"-")[0]) - death) / 1000)
            if since["progress"]:
                del self.lost[job]
                self.waits_s += since["queued"][:1]
                (self.runs_alone_s if int(attempts) >= protocol.ALONE_FROM else self.runs_s).append(since["progress"][0])

    def _restart_redis(self) -> None:
        self.service.server.kill()
        time.sleep(REDIS_AWAY_S)
        self.service.server.start()


def spread(seconds: Sequence[float]) -> str:
    """How many, their median and worst."""
    return f"{len(seconds)}: median {statistics.median(seconds):.1f}, worst {max(seconds):.1f}" if seconds else "none"


def report(run: Run, seconds: float, command: str) -> tuple[str, dict[str, object]]:
    """The report as Markdown, and its figures."""
    ended = list(run.service.ended.values())
    kills, attempts = Counter(run.deaths), Counter(entry.attempts for entry in ended)
    figures: dict[str, object] = {
        "benchmark": "chaos",
        "command": command,
        "commit": commit(),
        "hardware": hardware(),
        "jobs": len(ended),
        "pictures": sum(len(entry.pictures) for entry in ended),
        "workers": run.size,
        "kills": dict(sorted(kills.items())),
        "attempts": {str(count): attempts[count] for count in sorted(attempts)},
        "seconds": round(seconds, 1),
        "waited_again_after_s": run.waits_s,
        "ran_again_after_s": run.runs_s,
        "ran_again_alone_after_s": run.runs_alone_s,
    }
    text = f"""# {datetime.now(UTC).date()}: {len(ended)} jobs, {len(run.deaths)} kills

    {command}

Machine: {figures["hardware"]}; commit {figures["commit"]}. A redis-server with an append-only file, {run.size} workers with a tiny
model of random weights, each with one thread, under a supervisor that replaces the dead at once; {len(ended)} jobs of
{figures["pictures"]} pictures and {STEPS[0]} to {STEPS[1]} steps, about {WAITING} of them waiting at any time. The last had ended after
{seconds:.0f} s.

| what | how often |
|---|---|
| kill -9 of a worker | {len(run.deaths)}: {", ".join(f"{way} {kills[way]}" for way in WAYS)} |
| kill -9 of Redis, which was away for {REDIS_AWAY_S:g} s and restarted on its file | 1 |
| jobs that succeeded | {len(ended)} of {len(ended)} |
| jobs by attempts | {", ".join(f"{attempts[count]} with {count}" for count in sorted(attempts))} |

| after a worker's death | times, and seconds |
|---|---|
| its job waited again | {spread(run.waits_s)} |
| its job ran again in company (2nd attempt) | {spread(run.runs_s)} |
| its job ran again alone (from the 3rd attempt), when its turn came | {spread(run.runs_alone_s)} |

Asserted: every job has one final state and one `done` event; each of its pictures is, byte for byte, the one of a worker to which
nothing happens ({DIFFERENT} different requests, every picture compared); nothing of a job changed after its end; no key is left
but lists of names.
"""
    return text, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=REPORTS / f"{datetime.now(UTC).date()}-chaos.md")
    options = parser.parse_args()
    with Services() as services, services.open() as service:
        run = Run(service, options.jobs, options.kills, options.workers, random.Random(options.seed))
        seconds = run.play()
        print(
            f"{len(service.ended)} jobs have ended after {seconds:.0f} s and {len(run.deaths)} kills; comparing pictures and keys",
            flush=True,
        )
        assert {entry.status for entry in service.ended.values()} == {"succeeded"}, "a job has not succeeded"
    text, figures = report(run, seconds, " ".join(["python -m tests.chaos.long", *sys.argv[1:]]))
    options.report.write_text(text)
    print(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
