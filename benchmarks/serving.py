"""Serving under load: `dit up` over HTTP beside stock rq workers; the same weights, requests, arrival times and Redis, in one run.

    python benchmarks/serving.py [--checkpoint DIR] [--device cuda] [--seconds 60] [--loads 0.5 0.8 0.95] [--mix fine|coarse] [--quick]

Requests have 10–50 steps, guidance 1–5, any of the model's samplers and classes and 1–4 pictures; in the coarse mix steps and guidance come
from five values each. The peers are `rq.SimpleWorker`s that hold the model in our dtype and call `model.sampling.sample()`: (a) one job at
a time, (b) every waiting job of equal steps, guidance and sampler together, up to 32 rows; each eager and compiled, of which the better
counts. They need not give a seed the same bits everywhere, so they are spared `sample()`'s padding to four pictures. Their requests are
put on the queue directly, ours are posted.

Capacity is what ends while the queue is kept full; the sides take turns, and the median of the turns counts. Then an open loop: Poisson
arrivals at shares of our capacity, sent at their times whatever the answers do; a latency is from the scheduled time to the job's own
`finished_at`. The peers meet the arrivals of 80 % of our capacity. Beyond its own capacity (load ≥ 1) a side is overloaded: its latencies
grow with the run, and those of jobs that never ended count as long as was waited. Rows a second are row evaluations of the requests, what
the samplers need without padding; they set the loads, since a few long jobs move them less than pictures. The last line is JSON.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from _peer import LIBRARIES, PEERS, Peer, running_peer
from _service import (
    BUNDLED,
    MIXES,
    Outcome,
    Request,
    Sent,
    Service,
    Side,
    device_use,
    draw_requests,
    end_on_sigterm,
    facts,
    keep_full,
    per_second,
    percentiles,
    read_trace,
    running_service,
    settle,
)

from model.checkpoint import read_config
from model.samplers import build_table
from worker import protocol

PEER_LOAD = 0.8  # the share of our capacity that the peers meet
RAMP = 0.25  # of a measurement of capacity, before it counts


def arrivals(
    requests: Iterator[Request], work: Callable[[Request], int], amount: float, seconds: float, seed: Sequence[int]
) -> list[tuple[float, Request]]:
    """Requests of `amount` work in all, and when they come: seconds from the start, ascending, below `seconds`.

    A Poisson process of which the number of arrivals is known has them at that many independent uniform times. So the load is the one
    asked for, which a rate alone would give on average only.
    """
    chosen, total = [], 0
    while total < amount:
        chosen.append(next(requests))
        total += work(chosen[-1])
    times = np.sort(np.random.default_rng(list(seed)).uniform(0, seconds, len(chosen)))
    return list(zip(times.tolist(), chosen, strict=True))


def latencies(outcomes: Sequence[Outcome], now: float) -> list[float]:
    """Seconds from the scheduled time to the end, or till `now` for a job that has not ended. Refused and failed ones have none."""
    ended = [o for o in outcomes if o.status == protocol.SUCCEEDED or not o.final]
    return [(o.finished_at if o.final else now) - o.scheduled for o in ended]


# What is measured.


class Mix:
    """One of MIXES for one model: its requests, and the work in each."""

    def __init__(self, name: str, service: Service, seed: int) -> None:
        self.name, self.seed = name, seed
        self.samplers, self.classes = service.model["samplers"], len(service.model["labels"])
        self.config, _ = read_config(service.checkpoint)
        self.evaluations = lru_cache(maxsize=None)(self._evaluations)

    def requests(self, turn: int) -> Iterator[Request]:
        return draw_requests((self.seed, turn), self.name, self.samplers, self.classes)

    def _evaluations(self, sampler: str, steps: int) -> int:
        learn_sigma, spacing = self.config.architecture.learn_sigma, self.config.spacing_of(sampler)
        return build_table(self.config.objective, sampler, steps, learn_sigma=learn_sigma, spacing=spacing).evaluations

    def work(self, request: Request) -> int:
        """Row evaluations."""
        return request.rows * self.evaluations(request.sampler, request.steps)


def pictures(request: Request) -> int:
    return request.num_images


async def capacity(side: Side, mix: Mix, turn: int, options: argparse.Namespace) -> dict[str, Any]:
    """One turn: what is done a second while the queue is kept full."""
    seconds, ramp = options.turn_seconds, RAMP * options.turn_seconds
    start, clock = time.time() + ramp, time.monotonic() + ramp
    outcomes, empty = await keep_full(side, mix.requests(turn), options.depth, ramp + seconds)
    rates = {
        name: round(per_second(outcomes, start, start + seconds, amount), 3)
        for name, amount in (("pictures_per_s", pictures), ("rows_per_s", mix.work))
    }
    print(f"  {mix.name}, turn {turn + 1}, {side.name}: {rates['pictures_per_s']:.2f} pictures/s", flush=True)
    return {"side": side.name, **rates, "queue_found_empty": empty, "window": (clock, clock + seconds)}


async def capacities(sides: Sequence[Side], mix: Mix, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Side → medians of its turns; the sides take them one after the other."""
    turns = [await capacity(side, mix, turn, options) for turn in range(options.turns) for side in sides]
    result = {}
    for side in sides:
        own = [turn for turn in turns if turn["side"] == side.name]
        medians = {key: statistics.median(turn[key] for turn in own) for key in ("pictures_per_s", "rows_per_s")}
        result[side.name] = {**medians, "turns": own}
    return result


async def open_loop(side: Side, mix: Mix, share: float, ours: float, own: float, options: argparse.Namespace) -> dict[str, Any]:
    """Arrivals at `share` of `ours`, our capacity in rows a second; `own` is this side's."""
    turn = 1000 + round(1000 * share)  # no turn of a capacity's
    coming = arrivals(mix.requests(turn), mix.work, share * ours * options.seconds, options.seconds, (options.seed, turn, 1))
    start, clock = time.time(), time.monotonic()
    late: list[float] = []

    async def send(after: float, request: Request) -> Sent:
        await asyncio.sleep(clock + after - time.monotonic())
        late.append(time.monotonic() - clock - after)
        return Sent(request, start + after, await side.submit(request))

    sent = await asyncio.gather(*(send(after, request) for after, request in coming))
    outcomes, now = await settle(side, sent, max(60.0, 4 * options.seconds)), time.time()
    if not all(outcome.final for outcome in outcomes):
        await side.clear()
        await settle(side, sent, 60)
    load, latency = share * ours / own, percentiles(latencies(outcomes, now))
    print(f"  {mix.name}, {side.name} at {share:.0%} of ours: p95 {latency.get('p95')} s", flush=True)
    return {
        "side": side.name,
        "share_of_ours": share,
        "load": round(load, 3),
        "overloaded": load >= 1,
        "arrivals": len(sent),
        "pictures_per_s": round(per_second(outcomes, start, start + options.seconds, pictures), 3),
        "latency_s": latency,
        "unfinished": sum(not outcome.final for outcome in outcomes),
        "refused": sum(outcome.status == "refused" for outcome in outcomes),
        "failed": sum(outcome.status == protocol.FAILED for outcome in outcomes),
        "sent_late_s": percentiles(late).get("p99"),  # by a client that could not keep up
        "window": (clock, clock + options.seconds),
    }


async def measure(service: Service, peers: list[Peer], options: argparse.Namespace) -> dict[str, Any]:
    mixes = {name: Mix(name, service, options.seed) for name in MIXES}
    async with service.client:
        found = {name: await capacities([service, *peers], mix, options) for name, mix in mixes.items()}
        rows = {name: side["rows_per_s"] for name, side in found[options.mix].items()}
        best = [max((peer for peer in peers if peer.batching == kind), key=lambda peer: rows[peer.name]) for kind in PEERS]
        runs: list[tuple[Side, float]] = [(service, share) for share in sorted({*options.loads, PEER_LOAD})]
        runs += [(peer, PEER_LOAD) for peer in best]
        loops = [await open_loop(side, mixes[options.mix], share, rows["ours"], rows[side.name], options) for side, share in runs]
    return {"capacity": found, "open_loop": loops}


def add_device_use(results: Sequence[dict[str, Any]], trace: Path) -> None:
    """Into each result of ours, what the trace says of its time."""
    ticks = read_trace(trace)
    for result in results:
        window = result.pop("window")
        if result["side"] == "ours":
            result.update(device_use(ticks, *window))


def compare(result: dict[str, Any]) -> dict[str, Any]:
    """Our capacity in rows a second over that of the better form of each peer, in either mix; the p95 that stand beside each other."""
    ratios: dict[str, dict[str, float]] = {f"{kind}, {library}": {} for kind in PEERS.values() for library in LIBRARIES}
    for mix, sides in result["capacity"].items():
        for kind, by_mix in ratios.items():
            best = max(side["rows_per_s"] for name, side in sides.items() if name.startswith(kind))
            by_mix[mix] = round(sides["ours"]["rows_per_s"] / best, 3)
    p95 = {loop["side"]: loop["latency_s"].get("p95") for loop in result["open_loop"] if loop["share_of_ours"] == PEER_LOAD}
    return {"capacity_times_peer": ratios, "p95_s_at_peer_load": p95}


def show(result: dict[str, Any], options: argparse.Namespace) -> None:
    print(f"\ncapacity, {options.depth} jobs waiting: median of {options.turns} turns of {options.turn_seconds:g} s")
    for mix, sides in result["capacity"].items():
        print(f"  {mix:<30} pictures/s     rows/s   ours is")
        for name, side in sides.items():
            times = sides["ours"]["rows_per_s"] / side["rows_per_s"]
            print(f"    {name:<38} {side['pictures_per_s']:10.2f} {side['rows_per_s']:10.1f} {times:8.2f}x")
    print(f"\nopen loop, {options.mix} mix, {options.seconds:g} s; the shares are of our capacity, the load of the side's own")
    print(f"  {'':<38} share   load  pictures/s   p50 s   p95 s   p99 s    rows   busy")
    for loop in result["open_loop"]:
        latency = " ".join(f"{loop['latency_s'].get(name, float('nan')):7.2f}" for name in ("p50", "p95", "p99"))
        device = f"{loop['rows']:7.1f} {loop['busy_share']:6.1%}" if "rows" in loop else f"{'-':>7} {'-':>6}"
        notes = [f"{loop[name]} {name}" for name in ("unfinished", "refused", "failed") if loop[name]]
        notes = (["overloaded"] if loop["overloaded"] else []) + notes
        line = f"  {loop['side']:<38} {loop['share_of_ours']:5.0%} {loop['load']:6.2f} {loop['pictures_per_s']:11.2f} {latency} {device}"
        print(line + f"  {', '.join(notes)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each open loop, and of all turns of one capacity together")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--depth", type=int, default=64, help="jobs that wait while capacity is measured")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, PEER_LOAD, 0.95], help="shares of our capacity")
    parser.add_argument("--mix", choices=MIXES, default=MIXES[0], help="of the open loops; capacity is measured for both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="neither ours nor the peers")
    parser.add_argument("--quick", action="store_true", help="a minute: whether all works; its figures say nothing")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.turns, options.loads, options.no_compile = 3.0, 1, [PEER_LOAD], True
    options.turn_seconds = options.seconds / options.turns
    return options


def main() -> None:
    options = parse()
    end_on_sigterm()
    forms = [False] if options.no_compile else [False, True]
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as folder:
        with ExitStack() as running:
            start = running.enter_context
            service = start(running_service(Path(folder), options.checkpoint, options.device, compile=not options.no_compile))
            peers = [
                start(running_peer(service, library=library, batching=batching, compile=form))
                for library, batching, form in product(LIBRARIES, PEERS, forms)
            ]
            result = asyncio.run(measure(service, peers, options))
        turns = [turn for mix in result["capacity"].values() for side in mix.values() for turn in side["turns"]]
        add_device_use([*turns, *result["open_loop"]], service.trace)  # the trace is whole once the worker has ended
    model = {key: service.model[key] for key in ("id", "checkpoint", "device", "dtype", "samplers")}
    show(result, options)
    chosen = {key: value for key, value in vars(options).items() if key != "checkpoint"}
    print(json.dumps({**facts("serving"), "model": model, "options": chosen, **result, **compare(result)}))


if __name__ == "__main__":
    main()
