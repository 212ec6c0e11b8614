"""How long a device takes for a round of so many rows, and to decode so many images: what queueing.py simulates a fleet of them with.

    python benchmarks/curve.py [--checkpoint DIR] [--device cuda] [--out curve.json]

The worker's own engine, loaded and warmed up as `dit worker` does it, without Redis and API beside it. For each bucket of rows, guided
pictures (and a plain one where the rows are odd) step `--rounds` times: the mean of a round, of seven such runs the median. A decode is
measured to its end.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _service import BUNDLED, facts

from model.checkpoint import resolve
from model.samplers import available_samplers
from worker.device import choose_device, choose_dtype, elapsed
from worker.engine import Engine
from worker.load import Loader
from worker.models import OneModel
from worker.protocol import GenerationRequest, ModelRecord
from worker.runner import Runner

RUNS = 7
WARM = 5  # rounds that do not count


def record_of(runner: Runner) -> ModelRecord:
    """As little as the engine needs."""
    config = runner.checkpoint.config
    return ModelRecord("curve", runner.checkpoint.hash, [], config.image_size, config.image_channels, config.objective.kind, [], 1000, {})


def engine_with(runner: Runner, rows: int, rounds: int) -> Engine:
    """One whose forwards have so many rows, for so many rounds."""
    config = runner.checkpoint.config
    sampler = next(name for name in ("euler", "ddim") if name in available_samplers(config.objective, config.architecture.learn_sigma))
    engine = Engine(OneModel(runner, record_of(runner)))
    for name, pictures, scale in (("guided", rows // 2, 2.0), ("plain", rows % 2, 1.0)):
        if pictures:
            request = GenerationRequest("curve", (0,) * pictures, scale, (0.0, 1.0), rounds, sampler, 0)
            engine.add(name, request, runner.checkpoint.hash)
    return engine


def round_s(engine: Engine, rounds: int) -> float:
    """Seconds of one; of CUDA too, since its loop runs ahead by two rounds at most."""
    for _ in range(WARM):
        engine.tick()
    began = time.perf_counter()
    for _ in range(rounds):
        engine.tick()
    return (time.perf_counter() - began) / rounds


def rounds_s(runner: Runner, rounds: int) -> dict[int, float]:
    """Rows → seconds. Each run has all sizes, one after the other: what else the machine does for a while spoils a run, and no size."""
    runs = [{rows: round_s(engine_with(runner, rows, WARM + rounds + 1), rounds) for rows in runner.buckets} for _ in range(RUNS)]
    return {rows: round(statistics.median(run[rows] for run in runs), 6) for rows in runner.buckets}


def decode_s(runner: Runner, images: int) -> float:
    engine = engine_with(runner, 2, 10)
    engine.tick()
    (lane,) = engine.lanes.values()
    (picture,) = next(iter(lane.scheduler.jobs.values())).running
    times = [elapsed(lambda: runner.decode([picture] * images).result(), runner.device) for _ in range(RUNS)]
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = choose_device(options.device)
    runner = Loader(device, choose_dtype("auto", device), compile=not options.no_compile)(resolve(options.checkpoint))
    said = facts("curve")
    curve: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else said["hardware"],
        "checkpoint": f"{options.checkpoint.name} {runner.checkpoint.hash[:12]}",
        "max_rows": runner.max_rows,
        "slots": runner.slots,
        "step_s": rounds_s(runner, options.rounds),
        "decode_s": {images: round(decode_s(runner, images), 6) for images in runner.decode_buckets},
    }
    text = json.dumps({**curve, **{name: said[name] for name in ("command", "commit", "torch", "date")}}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
