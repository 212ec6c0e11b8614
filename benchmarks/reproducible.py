"""What DIT_REPRODUCIBLE costs: every forward and every decode in the one largest shape, beside buckets, in one run.

    python benchmarks/reproducible.py [--checkpoint DIR] [--device cuda] [--rows 32] [--batches 1 4 16] [--repeats 5]

The checkpoint's defaults, all pictures at once, the runner driven as the engine drives it. A full batch costs the same in both;
a lone picture pays for the rows that are not there. The last line is JSON.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from sampling import Ours, measure

from model.checkpoint import load, resolve
from training.draw import default_setting
from training.runlog import commit, hardware
from worker.device import can_compile

BUNDLED = Path(__file__).resolve().parents[1] / "checkpoints" / "fashion-mnist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    folder, device = resolve(arguments.checkpoint), torch.device(arguments.device)
    runners = {}
    for name, reproducible in (("buckets", False), ("one shape", True)):
        checkpoint = load(folder, device)
        setting = default_setting(checkpoint.config)
        checkpoint.dit.to(torch.bfloat16)
        runners[name] = Ours(checkpoint, arguments.rows // 2, can_compile(device), reproducible)
    where = {"hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware(), "commit": commit()}
    print(" · ".join(where.values()), f"· {setting.entry()} · {arguments.rows} rows", flush=True)
    rows = []
    for batch in arguments.batches:
        sides: dict[str, Callable[[], tuple[float, float]]] = {
            name: lambda o=ours, b=batch: o.run(b, setting, "served") for name, ours in runners.items()
        }
        milliseconds = {name: 1e3 * sum(parts) for name, parts in measure(sides, arguments.repeats).items()}
        plain, padded = milliseconds.values()
        print(
            f"batch {batch}: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in milliseconds.items()) + f": {padded / plain:.2f}x the time"
        )
        rows.append({"batch": batch, **{name: round(ms, 2) for name, ms in milliseconds.items()}})
    print(json.dumps({"benchmark": "reproducible", **where, "rows": arguments.rows, "milliseconds": rows}))


if __name__ == "__main__":
    main()
