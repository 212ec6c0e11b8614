"""What the service adds to the engine: the time of an idle request that is not the engine's own, and the engine's busy share under load.

    python benchmarks/overhead.py [--checkpoint DIR] [--device cuda] [--requests 200] [--seconds 30] [--quick]

Idle: one request at a time over HTTP with `Prefer: wait`, one picture in a few steps, to a warm `dit up`. The engine's own time is that of
the ticks in between, decoding and PNG included, from the trace that the worker writes to DIT_TRACE; without a trace it is not known. The
way of a request: posted → created (the job is queued) → started (a worker has it) → finished → answered. Under load: the queue is kept
full, and the engine's share is the time of the ticks over the time between the first and the last. The last line is JSON.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _service import (
    BUNDLED,
    MIXES,
    Outcome,
    Request,
    Sent,
    Service,
    Tick,
    device_use,
    draw_requests,
    end_on_sigterm,
    facts,
    keep_full,
    log_tail,
    percentiles,
    read_outcomes,
    read_trace,
    running_service,
)

from worker import protocol

WARM_REQUESTS = 10
PAUSE_S = (0.02, 0.12)  # between two requests: the worker has ended its books, and no period of its waiting is met each time
RAMP = 0.25  # of the time under load, before it counts
DEPTH = 64  # jobs that wait under load


@dataclass(frozen=True)
class Answer:
    """One idle request: posted and answered in Unix seconds, and both on the trace's clock."""

    outcome: Outcome
    posted: float
    answered: float
    clock: tuple[float, float]


async def ask(service: Service, request: Request) -> Answer:
    posted, clock = time.time(), time.monotonic()
    job_id = await service.submit(request, wait_s=60)
    answered, end = time.time(), time.monotonic()
    (outcome,) = read_outcomes(service, [Sent(request, posted, job_id)])
    if outcome.status != protocol.SUCCEEDED:
        raise RuntimeError(f"job {job_id} is {outcome.status}:\n{log_tail(service.log)}")
    return Answer(outcome, posted, answered, (clock, end))


async def idle(service: Service, requests: int, steps: int) -> list[Answer]:
    pauses, answers = random.Random(0), []
    for number in range(WARM_REQUESTS + requests):
        answers.append(await ask(service, Request(0, 2.0, steps, service.model["samplers"][0], number, 1)))
        await asyncio.sleep(pauses.uniform(*PAUSE_S))
    return answers[WARM_REQUESTS:]


async def busy(service: Service, seconds: float, seed: int) -> tuple[float, float]:
    """Start and end, on the trace's clock, of the time that counts."""
    start = time.monotonic() + RAMP * seconds
    requests = draw_requests((seed, 0), MIXES[0], service.model["samplers"], len(service.model["labels"]))
    await keep_full(service, requests, DEPTH, (1 + RAMP) * seconds)
    return start, start + seconds


def parts(answer: Answer, ticks: Sequence[Tick]) -> dict[str, float]:
    """Milliseconds of the request's way. Without ticks, the engine's own time is within `started_to_finished`."""
    job = answer.outcome
    engine = sum(tick.seconds for tick in ticks if answer.clock[0] <= tick.t <= answer.clock[1])
    seconds = {
        "posted_to_created": job.created_at - answer.posted,
        "created_to_started": job.started_at - job.created_at,
        "started_to_finished": job.finished_at - job.started_at,
        "finished_to_answered": answer.answered - job.finished_at,
    }
    if ticks:
        seconds["engine"] = engine
        seconds["started_to_finished_less_engine"] = seconds["started_to_finished"] - engine
        seconds["posted_to_finished_less_engine"] = job.finished_at - answer.posted - engine
        seconds["posted_to_answered_less_engine"] = answer.answered - answer.posted - engine
    return {name: 1e3 * value for name, value in seconds.items()}


def summary(answers: Sequence[Answer], ticks: Sequence[Tick]) -> dict[str, dict[str, float]]:
    """Part → p50, p95, p99 in milliseconds."""
    found = [parts(answer, ticks) for answer in answers]
    return {name: percentiles([one[name] for one in found], 3) for name in found[0]}


async def measure(service: Service, options: argparse.Namespace) -> tuple[list[Answer], tuple[float, float]]:
    async with service.client:
        return await idle(service, options.requests, options.steps), await busy(service, options.seconds, options.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4, help="of an idle request")
    parser.add_argument("--seconds", type=float, default=30.0, help="under load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="uncompiled and short: whether all works; its figures say nothing")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.seconds = 20, 4.0
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as folder:
        with running_service(Path(folder), options.checkpoint, options.device, compile=not options.quick) as service:
            answers, window = asyncio.run(measure(service, options))
        ticks = read_trace(service.trace)  # whole once the worker has ended
    found, use = summary(answers, ticks), device_use(ticks, *window)

    print(f"idle, {options.requests} requests of one picture in {options.steps} steps{'' if ticks else '; the worker wrote no trace'}")
    print("  milliseconds                         p50      p95      p99")
    for name, value in found.items():
        print(f"  {name:<30} {value['p50']:9.2f} {value['p95']:8.2f} {value['p99']:8.2f}")
    if use:
        print(f"under load, {options.seconds:g} s: engine busy {use['busy_share']:.1%}, {use['rows']} rows a forward")
    chosen = {key: value for key, value in vars(options).items() if key != "checkpoint"}
    model = {key: service.model[key] for key in ("id", "checkpoint", "device", "dtype")}
    print(json.dumps({**facts("overhead"), "model": model, "options": chosen, "idle_ms": found, "under_load": use}))


if __name__ == "__main__":
    main()
