"""How many devices a stream of jobs needs, for a given 95th percentile of the time from submission to the last picture: simulated.

    python benchmarks/queueing.py [--curve curve.json] [--faster 4] [--p95 2 3 5] [--most 4096]
    python benchmarks/queueing.py --check [--seconds 60]

Poisson arrivals of the fine mix of serving.py (10–50 steps, guidance 1–5, all samplers of the model, 1–4 pictures), N workers over one
queue, the real scheduler in each (_fleet.py says what is not as in reality). `--curve` is a device as benchmarks/curve.py measures it, by
default the two CPU cores of curves/cpu-2-cores.json; `--faster 4` stands for one that takes a quarter of the time for everything. For each
N the highest load is searched at which the p95 holds, to a fiftieth of what N workers can do; from these follow the devices for a rate.

`--check` runs the service on one worker with open loops at shares of its pace, simulates the very same arrivals with the round times that
the worker's own trace has, and says how far apart the two are. The last line is JSON.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
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
RATES = (3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000)  # pictures a second
GRID = 0.02  # of load
HIGHEST = 0.98


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
        self.curve, self.mix, self.pace = curve, mix, pace(curve, mix.waiting)
        self.jobs_per_s = self.pace["rows_per_s"] / float(np.mean([asked.work for asked in mix.waiting(4000)]))
        self.latency = lru_cache(maxsize=None)(self._latency)
        self.jobs = 0

    def _latency(self, workers: int, steps: int) -> dict[str, float]:
        """Percentiles at `steps` fiftieths of what they can do. The first jobs, while the fleet fills, do not count."""
        first, counted = max(1000, 10 * workers), max(8000, 8 * workers)
        coming = self.mix.poisson(first + counted, steps * GRID * workers * self.jobs_per_s, workers)
        since = coming[first].at
        ends = Fleet(self.curve, workers).run(coming)
        self.jobs += len(coming)
        return percentiles([end - asked.at for asked, end in ends if asked.at >= since])

    def highest(self, workers: int, p95_s: float, at_least: int) -> int:
        """In fiftieths; 0 if even one is too much."""
        low, high = at_least, round(HIGHEST / GRID) + 1  # the first holds, the last does not
        while high - low > 1:
            middle = min(low + 2, high - 1) if low == at_least and low else (low + high) // 2
            if self.latency(workers, middle)["p95"] <= p95_s:
                low = middle
            else:
                high = middle
        return low


def table(search: Search, p95_s: Sequence[float], most: int) -> list[dict[str, Any]]:
    """For each number of workers, the load and the pictures a second that each percentile allows."""
    rows, before = [], dict.fromkeys(p95_s, 0)
    for workers in (1 << power for power in range(most.bit_length())):
        began = time.monotonic()
        before = {limit: search.highest(workers, limit, max(0, before[limit] - 1)) for limit in p95_s}
        each = search.pace["pictures_per_s"]
        load = {f"{limit:g}": round(steps * GRID, 2) for limit, steps in before.items()}
        borne = {limit: round(share * workers * each, 1) for limit, share in load.items()}
        rows.append({"workers": workers, "load": load, "pictures_per_s": borne})
        print(f"  {workers:>5} workers: {load} of {workers * each:.0f} pictures/s, {time.monotonic() - began:.0f} s", flush=True)
    return rows


def needed(rows: Sequence[dict[str, Any]], rate: float, limit: str) -> int | None:
    """Devices for so many pictures a second: between two simulated numbers the load is taken to change evenly with the logarithm."""
    known = [(row["workers"], row["pictures_per_s"][limit] / row["workers"]) for row in rows if row["pictures_per_s"][limit]]
    for count in range(1, 1 + (known[-1][0] if known else 0)):
        each = float(np.interp(math.log(count), [math.log(workers) for workers, _ in known], [each for _, each in known]))
        if count >= known[0][0] and count * each >= rate:
            return count
    return None


def show(rows: Sequence[dict[str, Any]], p95_s: Sequence[float]) -> list[dict[str, Any]]:
    limits, found = [f"{limit:g}" for limit in p95_s], []
    print("\n| pictures/s | " + " | ".join(f"p95 ≤ {limit} s" for limit in limits) + " |\n|---" + "|---" * len(limits) + "|")
    for rate in RATES:
        counts = {limit: needed(rows, rate, limit) for limit in limits}
        if any(counts.values()):
            found.append({"pictures_per_s": rate, "devices": counts})
            print(f"| {rate:,} | " + " | ".join("–" if count is None else f"{count:,}" for count in counts.values()) + " |")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED, help="whose samplers are asked for")
    parser.add_argument("--curve", type=Path, default=DEFAULT_CURVE)
    parser.add_argument("--faster", type=float, default=1.0)
    parser.add_argument("--p95", type=float, nargs="+", default=[2.0, 3.0, 5.0], help="seconds")
    parser.add_argument("--most", type=int, default=4096, help="workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="against a worker that runs")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each open loop of the check")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 0.95], help="of the check")
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
        pictures = search.pace["pictures_per_s"]
        print(
            f"{curve.device}: {pictures:.2f} pictures/s with a queue that is never empty, {search.pace['rows_per_s']:.0f} row evaluations/s"
        )
        rows = table(search, options.p95, options.most)
        found = {"pace": search.pace, "by_workers": rows, "by_rate": show(rows, options.p95), "jobs_simulated": search.jobs}
        found["seconds"] = round(time.monotonic() - began, 1)
    said = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    print(json.dumps({**facts("queueing"), "options": said, **found}))


if __name__ == "__main__":
    main()
