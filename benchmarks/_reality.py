"""queueing.py beside a worker that runs: the same arrivals, and round times from the worker's own trace.

On a machine that others use too, a worker is not as fast in one minute as in the next. So the trace as a whole says how the sizes compare,
by medians, and the rounds of each part how fast the worker was in it.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
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
    """Medians of what the worker did: of rounds that decode nothing, and of what those that decode take more."""
    plain, decoding = defaultdict(list), defaultdict(list)
    for tick in ticks:
        if tick["bucket"] and not tick["decoded"]:
            plain[tick["bucket"]].append(tick["seconds"])
    step_s = {bucket: statistics.median(times) for bucket, times in sorted(plain.items()) if len(times) >= MANY}
    for tick in ticks:
        if tick["decoded"] and tick["bucket"] in step_s:
            decoding[batch_of(tick["decoded"])].append(tick["seconds"] - step_s[tick["bucket"]])
    decode_s = {images: max(1e-6, statistics.median(times)) for images, times in sorted(decoding.items()) if len(times) >= MANY}
    gaps = [after["t"] - before["t"] - before["seconds"] for before, after in pairwise(ticks)]
    between_s = statistics.median(gap for gap in gaps if gap < PAUSE_S)
    return Curve("the worker's trace", "queueing.py --check", max_rows, SLOTS_PER_ROW * max_rows, step_s, decode_s, between_s)


def batch_of(images: int) -> int:
    return 1 << max(1, (images - 1).bit_length())


def slower(curve: Curve, ticks: Sequence[dict[str, Any]]) -> float:
    """How many times as long these rounds took as the curve says of them, and the gaps between them."""
    took = said = 0.0
    for tick, after in pairwise(ticks):
        gap, images = after["t"] - tick["t"] - tick["seconds"], batch_of(tick["decoded"]) if tick["decoded"] else 0
        if tick["bucket"] in curve.step_s and gap < PAUSE_S and images in (0, *curve.decode_s):
            took += tick["seconds"] + gap
            said += curve.step_s[tick["bucket"]] + curve.between_s + (curve.decode_s[images] if images else 0.0)
    return took / said


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


async def measure(service: Service, options: argparse.Namespace) -> tuple[Real, list[dict[str, Any]]]:
    """The parts, each with when it began and ended: the queue kept full, then an open loop at each load."""
    async with service.client:
        mix = Real("fine", service, options.seed)
        full = await serving.capacity(service, mix, 0, options)
        ours, parts = full["rows_per_s"], [{"load": 1.0, "window": full["window"], "rows_per_s": full["rows_per_s"]}]
        for share in options.loads:
            began = time.monotonic()
            loop = await serving.open_loop(service, mix, share, ours, ours, options)
            parts.append({"load": share, "window": (began, time.monotonic()), **loop["latency_s"]})
    return mix, parts


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Measured and simulated, side by side."""
    options = argparse.Namespace(**vars(options), turn_seconds=options.seconds, depth=64)
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as name:
        with running_service(Path(name), options.checkpoint, "auto", compile=True) as service:
            mix, parts = asyncio.run(measure(service, options))
        ticks = read(service.trace)  # whole once the worker has ended
    curve, rows = curve_of(ticks, service.model["max_rows"]), []
    full = parts[0]["rows_per_s"]
    for part in parts:
        (since, until), share = part.pop("window"), part["load"]
        times = slower(curve, [tick for tick in ticks if since <= tick["t"] <= until])
        simulated = simulate(curve.faster(1 / times), mix, share, full, options)
        rows.append({"load": share, "slower": round(times, 2), "measured": part, "simulated": simulated})
        print(f"  {share:.0%}: {times:.2f} times as slow as the trace's median, measured {part}, simulated {simulated}", flush=True)
    return {"curve": {"step_s": curve.step_s, "decode_s": curve.decode_s, "between_s": curve.between_s}, "check": rows}


def simulate(curve: Curve, mix: Real, share: float, rows_per_s: float, options: argparse.Namespace) -> dict[str, float]:
    if share == 1:
        requests = mix.requests(0)
        return {"rows_per_s": round(pace(curve, lambda count: [mix.asked(0.0, next(requests)) for _ in range(count)])["rows_per_s"], 1)}
    ends = Fleet(curve, 1).run(mix.coming(share, rows_per_s, options))
    return percentiles([end - asked.at for asked, end in ends])
