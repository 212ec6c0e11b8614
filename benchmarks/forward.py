"""One forward of the DiT beside diffusers' DiTTransformer2DModel: the same weights, dtype and rows, in one run.

    python benchmarks/forward.py [--device cuda] [--models DiT-S/2 DiT-B/2] [--rows 2 8 32] [--repeats 7]

Both sides take turns, and the median of the repeats counts, so that a noisy machine disturbs both alike. The matrix peak is measured
between the cases as the best of square products in the same dtype; a share is our GMACs (counted, see `dit cost`) over that. On CUDA
there is a side more, with captured graphs (`mode="reduce-overhead"`). The last line is JSON.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from model.config import DiTConfig, preset
from model.cost import dit_cost
from model.dit import DiT
from model.export import to_transformer
from training.runlog import commit, hardware
from worker.device import elapsed

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-accumulates a second, in 10⁹, of the best of a few square products."""
    best = 0.0
    for size in (2048, 4096) if device.type == "cpu" else (8192, 16384):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        times = [elapsed(lambda a=a, b=b: a @ b, device) for _ in range(8)]
        best = max(best, size**3 / min(times) / 1e9)
    return best


def random_dit(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    dit = DiT(config)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return dit.eval().requires_grad_(False)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def measure(name: str, rows: int, device: torch.device, dtype: torch.dtype, repeats: int, compile: bool) -> dict[str, Any]:
    """Medians of a forward of `rows` rows: the peer, ours eager, ours compiled."""
    config = replace(preset(name), frequency_shift=1)  # diffusers' time features: both sides compute one function
    dit = random_dit(config)
    peer = to_transformer(dit).requires_grad_(False).to(device, dtype)
    dit = dit.to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, config.input_size, config.input_size, generator=generator).to(device, dtype)
    t = torch.randint(1000, (rows,), generator=generator).to(device)
    y = torch.randint(1000, (rows,), generator=generator).to(device)
    sides: dict[str, Callable[[], torch.Tensor]] = {
        "peer": lambda: peer(x, timestep=t, class_labels=y).sample,
        "ours eager": lambda: dit(x, t.float(), y),
    }
    if compile:
        compiled = torch.compile(dit, dynamic=False)  # as the worker has it
        sides["ours compiled"] = lambda: compiled(x, t.float(), y)
    if compile and device.type == "cuda":
        captured = torch.compile(dit, dynamic=False, mode="reduce-overhead")
        sides["ours compiled, graphs"] = lambda: captured(x, t.float(), y)
    times: dict[str, list[float]] = {side: [] for side in sides}
    with torch.inference_mode():
        outputs = {side: run().clone() for side, run in sides.items()}
        apart = max(difference(out, outputs["peer"]) for out in outputs.values())
        assert apart < (1e-3 if dtype == torch.float32 else 5e-2), f"the sides differ by {apart:.1e}: not the same function"
        peaks = [matrix_peak(device, dtype)]
        for side in sides:
            elapsed(sides[side], device)  # to its end, so that nothing queued runs into what is timed
        for _ in range(repeats):
            for side, run in sides.items():
                times[side].append(elapsed(run, device))
        peaks.append(matrix_peak(device, dtype))
    torch._dynamo.reset()
    median = {side: statistics.median(values) for side, values in times.items()}
    peak, gmacs = max(peaks), rows * dit_cost(config)[1]
    return {
        "model": name,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "peak_gmacs_per_s": round(peak, 1),
        "difference": apart,
        "milliseconds": {side: round(1e3 * value, 3) for side, value in median.items()},
        "times_peer": {side: round(median["peer"] / value, 3) for side, value in median.items()},
        "share_of_peak": {side: round(gmacs / value / peak, 3) for side, value in median.items()},
    }


def line(case: dict[str, Any]) -> str:
    parts = [
        f"{side} {case['milliseconds'][side]:.1f} ms ({case['times_peer'][side]:.2f}×, {100 * case['share_of_peak'][side]:.0f} % of peak)"
        for side in case["milliseconds"]
    ]
    return f"{case['model']} {case['rows']:>3} rows {case['dtype']}: " + " · ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--models", nargs="+", help="presets; by default S/2 and B/2, on a GPU XL/2")
    parser.add_argument("--rows", type=int, nargs="+", help="by default 2 8 32, on a GPU 2 64")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    models = arguments.models or (["DiT-XL/2"] if on_gpu else ["DiT-S/2", "DiT-B/2"])
    rows = arguments.rows or ([2, 64] if on_gpu else [2, 8, 32])
    where = {"hardware": torch.cuda.get_device_name(device) if on_gpu else hardware(), "torch": torch.__version__, "commit": commit()}
    print(" · ".join(where.values()))
    cases = []
    for model in models:
        for count in rows:
            cases.append(measure(model, count, device, DTYPES[arguments.dtype], arguments.repeats, not arguments.no_compile))
            print(line(cases[-1]), flush=True)
    print(json.dumps({"benchmark": "forward", **where, "cases": cases}))


if __name__ == "__main__":
    main()
