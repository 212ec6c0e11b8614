"""Pictures per second at equal quality: a checkpoint of the paper's objective at its tuned defaults, beside DiTPipeline at its own.

    python benchmarks/quality.py CHECKPOINT --data DIR [--batches 1 16] [--samples 1000] [--repeats 3]

DiTPipeline's defaults are 50 DDIM steps, guidance 4 and float32. Ours are what `dit tune` stored, in the dtype that is served: the tuned
defaults, and, since those may be the better pictures, also the cheapest stored quality (draft, standard, best) that is no worse than the
pipeline in distance and in consistency, if there is a cheaper one. All are judged by the same classifier on pictures of the same classes,
and then timed on the same weights in turn; the pipeline's pictures are judged as drawn by our sampler with its settings (leading spacing,
all channels guided), which tests hold equal to diffusers' own. The last line is JSON.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from sampling import Ours, Peer, measure, to_pipeline

from model.checkpoint import CheckpointConfig, load, resolve
from training.classifier import get_classifier
from training.draw import Drawer, Setting, default_setting, load_as_served
from training.local_measures import matching_dataset
from training.measure import Measured, MeasureLog, Meter
from training.metrics import fit_gaussian
from training.runlog import commit, hardware
from worker.device import can_compile

PEER = "DiTPipeline, its defaults"
PIPELINE = Setting(steps=50, sampler="ddim", guidance_scale=4.0, spacing="leading")


def judge(folder: Path, data: Path, settings: list[Setting], samples: int) -> list[Measured]:
    """Fréchet distance and class consistency of each setting."""
    checkpoint = load_as_served(folder)
    dataset = matching_dataset(checkpoint.config, data)
    classifier = get_classifier(dataset, Path("runs/classifiers"), checkpoint.device, None)
    reference = fit_gaussian(classifier.judge_split(dataset.test).features)
    with tempfile.TemporaryDirectory() as scratch:
        log = MeasureLog(Path(scratch) / "log.jsonl", {"checkpoint": checkpoint.hash})
        meter = Meter(Drawer(checkpoint, min(250, samples), compile=True), classifier, reference, log, print)
        return meter.measure("judging", settings, samples)


def stored_settings(config: CheckpointConfig) -> list[Setting]:
    """The tuned defaults first, then the other qualities that `dit tune` stored."""
    names = {field.name for field in fields(Setting)}
    stored = [{name: value for name, value in entry.items() if name in names} for entry in config.quality.values()]
    qualities = [Setting(**{**entry, "guidance_interval": tuple(entry["guidance_interval"])}) for entry in stored]
    return list(dict.fromkeys([default_setting(config), *qualities]))


def cheapest_as_good(ours: list[Measured], peer: Measured) -> Measured | None:
    """Of those no worse than the peer in both distance and consistency, the one with the fewest evaluations; None if all are worse."""
    good = [m for m in ours if m.frechet_distance <= peer.frechet_distance and m.class_consistency >= peer.class_consistency]
    return min(good, key=lambda m: m.evaluations, default=None)


def compare(folder: Path, settings: dict[str, Setting], batches: list[int], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Pictures a second of each of our settings and of the pipeline, per batch."""
    checkpoint = load(folder, device)
    pipeline = to_pipeline(load(folder, dtype=torch.float32), device, torch.float32)
    peer = Peer(pipeline, device)
    checkpoint.dit.to(torch.bfloat16)
    ours = Ours(checkpoint, max(batches), can_compile(device))
    rows = []
    for batch in batches:
        sides: dict[str, Callable[[], tuple[float, float]]] = {
            name: lambda b=batch, s=setting: ours.run(b, s, "served") for name, setting in settings.items()
        }
        sides[PEER] = lambda b=batch: peer.run(b, PIPELINE.steps, PIPELINE.guidance_scale)
        rates = {side: batch / sum(parts) for side, parts in measure(sides, repeats).items()}
        ratios = {name: round(rates[name] / rates[PEER], 2) for name in settings}
        print(f"batch {batch}: " + ", ".join(f"{side} {rate:.2f} pictures/s" for side, rate in rates.items()) + f"; {ratios}", flush=True)
        rows.append({"batch": batch, "pictures_per_s": {side: round(rate, 3) for side, rate in rates.items()}, "ratio": ratios})
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
    stored = stored_settings(load(folder).config)
    where = {"hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware(), "commit": commit()}
    print(" · ".join(str(value) for value in where.values()), f"· tuned: {stored[0].entry()}", flush=True)
    *ours, peer = judge(folder, arguments.data, [*stored, PIPELINE], arguments.samples)
    for m in (*ours, peer):
        print(f"{m.entry()}", flush=True)
    settings = {"ours, tuned": stored[0]}
    as_good = cheapest_as_good(ours, peer)
    if as_good and as_good.setting != stored[0]:
        settings["ours, cheapest no worse"] = as_good.setting
    rows = compare(folder, settings, arguments.batches, arguments.repeats, device)
    timed = {name: setting.entry() for name, setting in settings.items()}
    quality = [m.entry() for m in (*ours, peer)]
    print(json.dumps({"benchmark": "quality", **where, "settings": timed, "speed": rows, "quality": quality}))


if __name__ == "__main__":
    main()
