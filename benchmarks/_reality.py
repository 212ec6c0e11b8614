"""queueing.py beside a worker that runs: the same arrivals, and round times from the worker's own trace."""

import argparse
import asyncio
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import serving
from _fleet import Asked, Curve, Fleet, pace
from _service import Service, percentiles, running_service

from model.samplers import build_table
from worker.plan import make_plan
from worker.protocol import GenerationRequest

MANY = 5  # rounds of a kind, below which their time is not told
PAUSE_S = 0.01  # longer gaps between two rounds are waits for work
SLOTS_PER_ROW = 4  # of a worker whose latents are small


def read(trace: Path) -> list[dict[str, Any]]:
    """A line may be cut where the worker was killed."""
    return [json.loads(line) for line in trace.read_text().splitlines() if line.endswith("}")]


def curve_of(ticks: Sequence[dict[str, Any]], max_rows: int) -> Curve:
    """Means of what the worker did: of rounds that decode nothing, and of what those that decode take more."""
    plain, decoding = defaultdict(list), defaultdict(list)
    for tick in ticks:
        if tick["bucket"] and not tick["decoded"]:
            plain[tick["bucket"]].append(tick["seconds"])
    step_s = {bucket: statistics.fmean(times) for bucket, times in sorted(plain.items()) if len(times) >= MANY}
    for tick in ticks:
        if tick["decoded"] and tick["bucket"] in step_s:
            decoding[1 << max(1, (tick["decoded"] - 1).bit_length())].append(tick["seconds"] - step_s[tick["bucket"]])
    decode_s = {images: max(1e-6, statistics.fmean(times)) for images, times in sorted(decoding.items()) if len(times) >= MANY}
    gaps = [after["t"] - before["t"] - before["seconds"] for before, after in pairwise(ticks)]
    between_s = statistics.fmean(gap for gap in gaps if gap < PAUSE_S)
    return Curve("the worker's trace", "queueing.py --check", max_rows, SLOTS_PER_ROW * max_rows, step_s, decode_s, between_s)


class Real(serving.Mix):
    """What serving.py asks for, and what of it the scheduler sees."""

    def asked(self, at: float, request: Any) -> Asked:
        c = self.config
        order = GenerationRequest("any", (0,), request.guidance_scale, (0.0, 1.0), request.steps, request.sampler, 0)
        learn_sigma, spacing = c.architecture.learn_sigma, c.spacing_of(request.sampler)
        table = build_table(c.objective, request.sampler, request.steps, learn_sigma=learn_sigma, spacing=spacing)
        return Asked(at, request.num_images, tuple(make_plan(table, order, c.architecture.in_channels).guided))

    def coming(self, share: float, rows_per_s: float, options: argparse.Namespace) -> list[Asked]:
        """What `serving.open_loop` sends, at the same times."""
        turn = 1000 + round(1000 * share)
        amount = share * rows_per_s * options.seconds
        sent = serving.arrivals(self.requests(turn), self.work, amount, options.seconds, (self.seed, turn, 1))
        return [self.asked(at, request) for at, request in sent]


async def measure(service: Service, options: argparse.Namespace) -> tuple[Real, dict[str, Any], list[dict[str, Any]]]:
    async with service.client:
        mix = Real("fine", service, options.seed)
        capacity = await serving.capacity(service, mix, 0, options)
        ours = capacity["rows_per_s"]
        loops = [await serving.open_loop(service, mix, share, ours, ours, options) for share in options.loads]
    return mix, capacity, loops


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Measured and simulated, side by side; ratios are simulated over measured."""
    options = argparse.Namespace(**vars(options), turn_seconds=options.seconds, depth=64)
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as name:
        with running_service(Path(name), options.checkpoint, "auto", compile=True) as service:
            mix, capacity, loops = asyncio.run(measure(service, options))
        curve = curve_of(read(service.trace), service.model["max_rows"])  # the trace is whole once the worker has ended
    simulated = pace(curve, lambda count: [mix.asked(0.0, request) for request, _ in zip(mix.requests(0), range(count), strict=False)])
    rows = [{"load": "queue never empty", "measured": capacity["rows_per_s"], "simulated": round(simulated["rows_per_s"], 1)}]
    for share, loop in zip(options.loads, loops, strict=True):
        ends = Fleet(curve, 1).run(mix.coming(share, capacity["rows_per_s"], options))
        rows.append({"load": share, "measured": loop["latency_s"], "simulated": percentiles([end - asked.at for asked, end in ends])})
    for row in rows:
        print(f"  {row['load']}: measured {row['measured']}, simulated {row['simulated']}")
    return {"curve": {"step_s": curve.step_s, "decode_s": curve.decode_s, "between_s": curve.between_s}, "check": rows}
