"""How many workers a stream of jobs needs, for a given 95th percentile of the time from submission to the last picture: simulated.

    python benchmarks/queueing.py [--curve curve.json] [--p95 1.5 2 3] [--workers 1 4 16] [--faster 4]
    python benchmarks/queueing.py --check [--seconds 60]

Poisson arrivals of the fine mix of serving.py (10–50 steps, guidance 1–5, all samplers of the model, 1–4 pictures), N workers over one
queue, the real scheduler in each (_fleet.py says what is not as in reality). `--curve` is a device as benchmarks/curve.py measures it, by
default the two CPU cores of curves/cpu-2-cores.json; `--faster 4` stands for one that takes a quarter of the time for everything.

All is told in units of the device itself: arrivals in the pace of one worker whose queue is never empty, a p95 in the p95 of jobs that each
have a worker to themselves. For each N the highest load is searched at which the p95 holds, to a fiftieth of what N workers can do; from
these follow the workers for a rate.

`--check` runs the service on one worker with open loops at shares of its pace, and simulates the very same arrivals with the round times
that the worker's own trace has. The last line is JSON.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from _fleet import Asked, Curve, Fleet, pace
from _service import BUNDLED, Request, draw_requests, end_on_sigterm, facts, percentiles

from model.checkpoint import read_config, resolve
from model.samplers import available_samplers, build_table
from worker.plan import make_plan
from worker.protocol import GenerationRequest

DEFAULT_CURVE = Path(__file__).parent / "curves" / "cpu-2-cores.json"
RATES = (0.5, 1, 2, 3, 5, 10, 30, 100, 300, 1000, 3000)  # paces of one worker
GRID = 0.02  # of load
HIGHEST = 0.98
COUNTED = 5000  # jobs at least: near full load they hang together
FILLING, FOLLOWING = 10, 4  # times the p95 of jobs alone, before and after those that count


class Mix:
    """The fine mix for one model, as the scheduler sees it."""

    def __init__(self, checkpoint: Path, seed: int) -> None:
        self.config, self.seed = read_config(resolve(checkpoint))[0], seed
        c = self.config
        self.samplers = available_samplers(c.objective, c.architecture.learn_sigma)
        self.guided = lru_cache(maxsize=None)(self._guided)

    def requests(self, *turn: int) -> Iterator[Request]:
        return draw_requests((self.seed, *turn), "fine", self.samplers, len(self.config.labels))

    def _guided(self, sampler: str, steps: int, scale: float) -> tuple[bool, ...]:
        """Per evaluation, as a worker plans it."""
        c = self.config
        request = GenerationRequest("any", (0,), scale, (0.0, 1.0), steps, sampler, 0, c.spacing_of(sampler))
        learn_sigma = c.architecture.learn_sigma
        table = build_table(c.objective, sampler, steps, learn_sigma=learn_sigma, spacing=request.spacing)
        return tuple(make_plan(table, request, c.architecture.in_channels).guided)

    def asked(self, at: float, request: Request) -> Asked:
        return Asked(at, request.num_images, self.guided(request.sampler, request.steps, min(request.guidance_scale, 2.0)))

    def waiting(self, count: int) -> list[Asked]:
        """Jobs that are there from the start."""
        return [self.asked(0.0, request) for request in islice(self.requests(0), count)]

    def poisson(self, count: int, jobs_per_s: float, turn: int) -> list[Asked]:
        times = np.cumsum(np.random.default_rng([self.seed, turn]).exponential(1 / jobs_per_s, count))
        return [self.asked(at, request) for at, request in zip(times.tolist(), self.requests(turn), strict=False)]


class Search:
    """Loads that N workers bear."""

    def __init__(self, curve: Curve, mix: Mix) -> None:
        self.curve, self.mix, self.pace, self.alone = curve, mix, pace(curve, mix.waiting), alone(curve, mix)
        self.jobs_per_s = self.pace["rows_per_s"] / float(np.mean([asked.work for asked in mix.waiting(4000)]))
        self.p95 = lru_cache(maxsize=None)(self._p95)
        self.jobs = 0

    def _p95(self, workers: int, steps: int) -> float:
        """At `steps` fiftieths of what they can do, in that of jobs alone. Neither the filling of the fleet counts, nor its emptying."""
        rate, each = steps * GRID * workers * self.jobs_per_s, self.alone["p95"]
        before, counted, after = (math.ceil(times * each * rate) for times in (FILLING, 1, FOLLOWING))
        counted = max(COUNTED, counted)
        coming = self.mix.poisson(before + counted + after, rate, workers)
        since, until = coming[before].at, coming[before + counted].at
        ends = Fleet(self.curve, workers).run(coming)
        latencies = list(islice((end - asked.at for asked, end in ends if since <= asked.at < until), counted))
        self.jobs += len(coming)
        return percentiles(latencies)["p95"] / each

    def highest(self, workers: int, limit: float, near: int) -> int:
        """In fiftieths, looked for around `near` first; 0 if even one is too much."""
        low, high = 0, round(HIGHEST / GRID) + 1  # the first holds, the last does not
        while high - low > 1:
            inside = [steps for steps in (near, near + 2, near - 2) if low < steps < high]
            middle = inside[0] if inside else (low + high) // 2
            if self.p95(workers, middle) <= limit:
                low = middle
            else:
                high = middle
        return low


def alone(curve: Curve, mix: Mix) -> dict[str, float]:
    """Percentiles of jobs that each have a worker to themselves: seconds."""
    jobs = [replace(asked, at=3600.0 * number) for number, asked in enumerate(mix.waiting(2000))]
    return percentiles([end - asked.at for asked, end in Fleet(curve, 1).run(jobs)])


def table(search: Search, limits: Sequence[float], counts: Sequence[int]) -> list[dict[str, Any]]:
    """For each number of workers, the share of what they can do at which each limit of the p95 holds."""
    rows, before = [], dict.fromkeys(limits, 0)
    print("\n| workers | " + " | ".join(f"p95 ≤ {limit:g}" for limit in limits) + " |\n|---" + "|---" * len(limits) + "|")
    for workers in counts:
        before = {limit: search.highest(workers, limit, before[limit]) for limit in limits}
        rows.append({"workers": workers, "load": {f"{limit:g}": round(steps * GRID, 2) for limit, steps in before.items()}})
        print(f"| {workers:,} | " + " | ".join(f"{load:.0%}" for load in rows[-1]["load"].values()) + " |", flush=True)
    return rows


def needed(rows: Sequence[dict[str, Any]], rate: float, limit: str) -> int | None:
    """Workers for arrivals of so many paces of one: between two simulated numbers the load is taken to change evenly with the logarithm."""
    known = [(row["workers"], row["load"][limit]) for row in rows if row["load"][limit]]
    for count in range(1, 1 + (known[-1][0] if known else 0)):
        load = float(np.interp(math.log(count), [math.log(workers) for workers, _ in known], [load for _, load in known]))
        if count >= known[0][0] and count * load >= rate:
            return count
    return None


def show(rows: Sequence[dict[str, Any]], limits: Sequence[float]) -> list[dict[str, Any]]:
    names, found = [f"{limit:g}" for limit in limits], []
    print("\n| arrivals, paces | " + " | ".join(f"p95 ≤ {name}" for name in names) + " |\n|---" + "|---" * len(names) + "|")
    for rate in RATES:
        counts = {name: needed(rows, rate, name) for name in names}
        if any(counts.values()):
            found.append({"paces": rate, "workers": counts})
            print(f"| {rate:,} | " + " | ".join("–" if count is None else f"{count:,}" for count in counts.values()) + " |")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED, help="whose samplers are asked for")
    parser.add_argument("--curve", type=Path, default=DEFAULT_CURVE)
    parser.add_argument("--faster", type=float, default=1.0)
    parser.add_argument("--p95", type=float, nargs="+", default=[1.5, 2.0, 3.0], help="times that of jobs alone")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256, 1024], help="ascending")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="against a worker that runs")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each open loop of the check")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="of the check")
    return parser.parse_args()


def main() -> None:
    options = parse()
    end_on_sigterm()
    if options.check:
        from _reality import check

        found = check(options)
    else:
        began, curve = time.monotonic(), Curve.read(options.curve).faster(options.faster)
        search = Search(curve, Mix(options.checkpoint, options.seed))
        print(f"{curve.device}, the queue never empty: {search.pace}; seconds of a job alone: {search.alone}")
        rows = table(search, options.p95, options.workers)
        found = {"pace": search.pace, "jobs_per_s": search.jobs_per_s, "alone_s": search.alone, "by_workers": rows}
        found |= {"by_rate": show(rows, options.p95), "jobs_simulated": search.jobs, "seconds": round(time.monotonic() - began, 1)}
    said = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    print(json.dumps({**facts("queueing"), "options": said, **found}))


if __name__ == "__main__":
    main()
