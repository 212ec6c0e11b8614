"""Pictures per second: our runner beside diffusers' DiTPipeline, one model, one run, the same weights.

    python benchmarks/sampling.py [--device cuda] [--steps 25] [--batches 1 16] [--repeats 3]

The bundled checkpoint's shape under the paper's objective (noise and learned covariance, DDIM), with random weights: their values don't
matter for speed. Denoising and decoding are timed apart, both sides in turn, and the median of the repeats counts, so that a noisy machine
disturbs both alike. The pipeline runs in our dtype and in its default one (float32). The last line is JSON.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel

from model.checkpoint import Checkpoint, CheckpointConfig
from model.config import DiTConfig, ObjectiveConfig, VAEConfig
from model.dit import DiT
from model.export import export_diffusers, to_transformer
from model.vae import VAE
from training.runlog import commit, hardware
from worker.protocol import GenerationRequest
from worker.runner import Runner, can_compile
from worker.scheduler import Job, Scheduler

CLASSES = 10


def bundled_shape(generator_seed: int = 0) -> tuple[DiTConfig, DiT, VAE]:
    """The shape of checkpoints/fashion-mnist, with diffusers' time features so that both sides compute the same function."""
    torch.manual_seed(generator_seed)
    config = DiTConfig(
        input_size=8, patch_size=2, in_channels=4, hidden_size=256, depth=8, num_heads=4, num_classes=CLASSES, frequency_shift=1
    )
    dit = DiT(config)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    shape = VAEConfig(
        image_size=32, image_channels=1, block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, mid_block_attention=False
    )
    return config, dit.eval().requires_grad_(False), VAE(shape).eval().requires_grad_(False)


def to_pipeline(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> DiTPipeline:
    """Our own export, loaded as anyone would load it."""
    with tempfile.TemporaryDirectory() as folder:
        export_diffusers(checkpoint, Path(folder) / "exported")
        pipeline = DiTPipeline.from_pretrained(Path(folder) / "exported", torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_same_function(config: DiTConfig, dit: DiT, peer: DiTTransformer2DModel) -> float:
    """Largest relative difference of one float32 forward; both sides must be the same model for a comparison to mean anything."""
    x, t, y = torch.randn(4, config.in_channels, config.input_size, config.input_size), torch.tensor([0, 17, 500, 999]), torch.arange(4)
    with torch.inference_mode():
        ours, theirs = dit(x, t.float(), y), peer(x, timestep=t, class_labels=y).sample
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < 1e-4, f"the two sides differ by {difference:.1e}"
    return difference


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peer:
    """One call of the pipeline, its decoding timed by a wrapper around `vae.decode`."""

    def __init__(self, pipeline: DiTPipeline, device: torch.device) -> None:
        self.pipeline, self.device, self.decoding_s = pipeline, device, 0.0
        self._decode = pipeline.vae.decode
        pipeline.vae.decode = self._timed

    def _timed(self, *arguments: Any, **keywords: Any) -> Any:
        synchronise(self.device)
        start = time.perf_counter()
        result = self._decode(*arguments, **keywords)
        synchronise(self.device)
        self.decoding_s = time.perf_counter() - start
        return result

    def run(self, batch: int, steps: int, guidance: float) -> tuple[float, float]:
        start = time.perf_counter()
        labels = [i % CLASSES for i in range(batch)]
        self.pipeline(labels, guidance_scale=guidance, num_inference_steps=steps, output_type="np")
        return time.perf_counter() - start - self.decoding_s, self.decoding_s


class Ours:
    """The worker's own runner, driven as the engine drives it."""

    def __init__(self, checkpoint: Checkpoint, batches: list[int], compile: bool) -> None:
        self.runner = Runner(checkpoint, max_rows=max(4, 2 * max(batches)), compile=compile)
        self.runner.warm_up()

    def run(self, batch: int, steps: int, guidance: float) -> tuple[float, float]:
        device = self.runner.device
        start = time.perf_counter()
        request = GenerationRequest(
            "benchmark", tuple(i % CLASSES for i in range(batch)), guidance, (0.0, 1.0), steps, "ddim", 0, "leading"
        )
        plan = self.runner.plan(request)
        scheduler = Scheduler(self.runner.max_rows)
        scheduler.add(Job("job", request.class_labels, 0, guidance, plan.guided, plan))
        self.runner.start(scheduler.admit())
        pictures = scheduler.batch()
        for _ in range(steps):
            self.runner.step(pictures)
            for picture in pictures:
                picture.evaluation += 1
        synchronise(device)
        denoised = time.perf_counter()
        self.runner.decode(pictures)
        return denoised - start, time.perf_counter() - denoised


def measure(sides: dict[str, Callable[[], tuple[float, float]]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds (denoising, decoding) per side; the sides take turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):  # the first round only warms
        for name, run in sides.items():
            result = run()
            if repeat:
                times[name].append(result)
    return {name: (statistics.median(t[0] for t in ts), statistics.median(t[1] for t in ts)) for name, ts in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    compiled = can_compile(device)

    config, dit, vae = bundled_shape()
    difference = check_same_function(config, dit, to_transformer(dit))
    print(f"{hardware()} · torch {torch.__version__} · {options.steps} DDIM steps · guidance {options.guidance} · compiled: {compiled}")
    print(f"one float32 forward of both sides differs by {difference:.1e}, relative")

    checkpoint = CheckpointConfig(
        architecture=config,
        objective=ObjectiveConfig("diffusion"),
        image_size=32,
        image_channels=1,
        labels=tuple((str(i),) for i in range(CLASSES)),
        default_steps=options.steps,
        default_guidance_scale=options.guidance,
        default_sampler="ddim",
        vae=vae.config,
    )

    def ours(vae_dtype: torch.dtype) -> Ours:
        loaded = Checkpoint(checkpoint, copy.deepcopy(dit).to(device, torch.bfloat16), copy.deepcopy(vae).cast(vae_dtype).to(device))
        return Ours(loaded, options.batches, compiled)

    same, served = ours(torch.bfloat16), ours(torch.bfloat16 if device.type == "cuda" else torch.float32)
    peer_same = Peer(to_pipeline(Checkpoint(checkpoint, dit, vae), device, torch.bfloat16), device)
    peer_default = Peer(to_pipeline(Checkpoint(checkpoint, dit, vae), device, torch.float32), device)
    results = []
    for batch in options.batches:
        arguments = (batch, options.steps, options.guidance)
        sides: dict[str, Callable[[], tuple[float, float]]] = {
            "ours, bfloat16": lambda a=arguments: same.run(*a),
            "DiTPipeline, bfloat16": lambda a=arguments: peer_same.run(*a),
            "ours, as served": lambda a=arguments: served.run(*a),
            "DiTPipeline, its default float32": lambda a=arguments: peer_default.run(*a),
        }
        seconds = measure(sides, options.repeats)
        print(f"\nbatch {batch:<26} denoising ms   decoding ms   pictures/s")
        for name, (denoising, decoding) in seconds.items():
            print(f"  {name:<32} {denoising * 1e3:10.1f} {decoding * 1e3:13.1f} {batch / (denoising + decoding):12.2f}")
        row: dict[str, Any] = {"batch": batch, "seconds": {name: [round(v, 5) for v in value] for name, value in seconds.items()}}
        pairs = {
            "same dtype": ("ours, bfloat16", "DiTPipeline, bfloat16"),
            "default dtype": ("ours, as served", "DiTPipeline, its default float32"),
        }
        for title, (a, b) in pairs.items():
            whole, denoise, decode = sum(seconds[b]) / sum(seconds[a]), seconds[b][0] / seconds[a][0], seconds[b][1] / seconds[a][1]
            print(f"  ratio, {title}: {whole:.2f}x (denoising {denoise:.2f}x, decoding {decode:.2f}x)")
            row[title] = {"whole": round(whole, 3), "denoising": round(denoise, 3), "decoding": round(decode, 3)}
        results.append(row)
    facts = {"benchmark": "sampling", "commit": commit(), "hardware": hardware(), "torch": torch.__version__, "device": options.device}
    print(json.dumps({**facts, "steps": options.steps, "guidance": options.guidance, "compiled": compiled, "results": results}))


if __name__ == "__main__":
    main()
