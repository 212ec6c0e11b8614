"""Pictures per second at equal quality: a checkpoint of the paper's objective at its tuned defaults, beside DiTPipeline at its own.

    python benchmarks/quality.py CHECKPOINT --data DIR [--batches 1 16] [--samples 1000] [--repeats 3]

DiTPipeline's defaults are 50 DDIM steps, guidance 4 and float32. Ours are what `dit tune` stored, in the dtype that is served. Both are
timed on the same weights in turn, and judged by the same classifier on pictures of the same classes; the pipeline's pictures are drawn by
our sampler with its settings (leading spacing, all channels guided), which tests hold equal to diffusers' own. The last line is JSON.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sampling import Ours, Peer, measure, to_pipeline

from model.checkpoint import load, resolve
from training.classifier import get_classifier
from training.draw import Drawer, Setting, default_setting, load_as_served
from training.evaluate import matching_dataset
from training.measure import Measured, MeasureLog, Meter
from training.metrics import fit_gaussian
from training.runlog import commit, hardware
from worker.device import can_compile

PIPELINE = Setting(steps=50, sampler="ddim", guidance_scale=4.0, spacing="leading")


def judge(folder: Path, data: Path, settings: list[Setting], samples: int) -> list[Measured]:
    """Fréchet distance and class consistency of each setting."""
    checkpoint = load_as_served(folder)
    dataset = matching_dataset(checkpoint.config, data)
    classifier = get_classifier(dataset, Path("runs/classifiers"), checkpoint.device, None)
    reference = fit_gaussian(classifier.judge(dataset.test.images).features)
    with tempfile.TemporaryDirectory() as scratch:
        log = MeasureLog(Path(scratch) / "log.jsonl", {"checkpoint": checkpoint.hash})
        meter = Meter(Drawer(checkpoint, min(250, samples), compile=True), classifier, reference, log, print)
        return meter.measure("judging", settings, samples)


def compare(folder: Path, tuned: Setting, batches: list[int], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of each side per batch."""
    checkpoint = load(folder, device)
    pipeline = to_pipeline(load(folder, dtype=torch.float32), device, torch.float32)
    peer = Peer(pipeline, device)
    checkpoint.dit.to(torch.bfloat16)
    ours = Ours(checkpoint, max(batches), can_compile(device))
    rows = []
    for batch in batches:
        sides: dict[str, Callable[[], tuple[float, float]]] = {
            "ours, tuned": lambda b=batch: ours.run(b, tuned, "served"),
            "DiTPipeline, its defaults": lambda b=batch: peer.run(b, PIPELINE.steps, PIPELINE.guidance_scale),
        }
        seconds = measure(sides, repeats)
        rates = {side: batch / sum(parts) for side, parts in seconds.items()}
        mine, theirs = rates.values()
        print(f"batch {batch}: " + ", ".join(f"{side} {rate:.2f} pictures/s" for side, rate in rates.items()) + f": {mine / theirs:.1f}x")
        rows.append(
            {"batch": batch, "pictures_per_s": {side: round(rate, 3) for side, rate in rates.items()}, "ratio": round(mine / theirs, 2)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder, device = resolve(arguments.checkpoint), torch.device(arguments.device)
    tuned = default_setting(load(folder).config)
    where = {"hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware(), "commit": commit()}
    print(" · ".join(str(value) for value in where.values()), f"· tuned: {tuned.entry()}", flush=True)
    rows = compare(folder, tuned, arguments.batches, arguments.repeats, device)
    worth = judge(folder, arguments.data, [tuned, PIPELINE], arguments.samples)
    for name, m in zip(("ours, tuned", "DiTPipeline, its defaults"), worth, strict=True):
        print(
            f"{name}: {m.evaluations} evaluations, Fréchet distance {m.frechet_distance:.3f}, consistency {100 * m.class_consistency:.1f} %"
        )
    print(json.dumps({"benchmark": "quality", **where, "speed": rows, "quality": [m.entry() for m in worth]}))


if __name__ == "__main__":
    main()
