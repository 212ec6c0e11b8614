"""Pictures per second: our runner beside diffusers' DiTPipeline, the same models and weights, in one run.

    python benchmarks/sampling.py [--device cuda] [--models bundled DiT-S/2 DiT-B/2] [--batches 1 4 16] [--repeats 3]

The paper's objective (noise and learned covariance, DDIM) with random weights: their values don't matter for speed. `bundled` is the shape
of checkpoints/fashion-mnist at 50 steps; presets, whose steps take long on a CPU, make fewer, and decode with a small f8 decoder. Denoising
and decoding are timed apart, all sides in turn, and the median of the repeats counts, so that a noisy machine disturbs all alike. The
pipeline runs in our dtype and in its default one (float32). The matrix peak, measured between the cases, is that of benchmarks/forward.py;
a share is the GMACs of the pictures' rows over it. The last line is JSON.
"""

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from forward import matrix_peak, random_dit

from model.checkpoint import Checkpoint, CheckpointConfig
from model.config import DiTConfig, ObjectiveConfig, VAEConfig, preset
from model.cost import dit_cost
from model.dit import DiT
from model.export import export_diffusers, to_transformer
from model.vae import VAE
from training.draw import Setting
from training.runlog import commit, hardware
from worker.decoder import Decoder
from worker.device import can_compile
from worker.protocol import GenerationRequest
from worker.runner import Runner
from worker.scheduler import Job, Scheduler

BUNDLED = "bundled"
STEPS = {BUNDLED: 50, "DiT-S/2": 10, "DiT-B/2": 4}  # on a CPU; else 50


def shape(name: str) -> tuple[DiTConfig, VAEConfig]:
    """A model's DiT, with diffusers' time features so that both sides compute the same function, and a decoder for it."""
    if name == BUNDLED:
        dit = DiTConfig(input_size=8, patch_size=2, in_channels=4, hidden_size=256, depth=8, num_heads=4, num_classes=10, frequency_shift=1)
        levels, groups, channels = (16, 32, 64), 8, 1
    else:
        dit = replace(preset(name), frequency_shift=1)
        levels, groups, channels = (16, 32, 64, 64), 8, 3
    size = dit.input_size * 2 ** (len(levels) - 1)
    vae = VAEConfig(
        image_size=size,
        image_channels=channels,
        block_out_channels=levels,
        layers_per_block=1,
        norm_num_groups=groups,
        mid_block_attention=False,
    )
    return dit, vae


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
        labels = [i % 10 for i in range(batch)]
        self.pipeline(labels, guidance_scale=guidance, num_inference_steps=steps, output_type="np")
        return time.perf_counter() - start - self.decoding_s, self.decoding_s


class Ours:
    """The worker's own runner, driven as the engine drives it, with a decoder for each dtype of the VAE."""

    def __init__(self, checkpoint: Checkpoint, most: int, compile: bool, reproducible: bool = False) -> None:
        assert checkpoint.vae is not None
        served = checkpoint.device.type == "cuda"  # there the VAE is served in the DiT's dtype, on a CPU in float32
        same = Checkpoint(checkpoint.config, checkpoint.dit, copy.deepcopy(checkpoint.vae).cast(torch.bfloat16))
        self.runner = Runner(same, max_rows=max(4, 2 * most), compile=compile, reproducible=reproducible)
        self.runner.warm_up()
        as_served = copy.deepcopy(checkpoint.vae).cast(torch.bfloat16 if served else torch.float32)
        self.decoders = {"same": self.runner.decoder, "served": Decoder(as_served, most, checkpoint.device)}
        self.decoders["served"].buckets = self.runner.decoder.buckets

    def run(self, batch: int, setting: Setting, decoder: str) -> tuple[float, float]:
        """Seconds of denoising and of decoding, planning included."""
        runner, classes = self.runner, self.runner.config.num_classes
        start = time.perf_counter()
        request = GenerationRequest(
            model="benchmark",
            class_labels=tuple(i % classes for i in range(batch)),
            guidance_scale=setting.guidance_scale,
            guidance_interval=setting.guidance_interval,
            steps=setting.steps,
            sampler=setting.sampler,
            seed=0,
            spacing=setting.spacing,
        )
        plan = runner.plan(request)
        scheduler = Scheduler(runner.max_rows, runner.slots)
        scheduler.add(Job("job", request.class_labels, 0, request.guidance_scale, plan.guided, plan))
        while not (done := scheduler.done()):
            dealt = scheduler.deal()
            runner.start([picture for picture in dealt if picture.evaluation == 0])
            runner.step(dealt)
            runner.lost()
            for picture in dealt:
                picture.evaluation += 1
        synchronise(runner.device)
        denoised = time.perf_counter()
        latents = runner.state[[picture.slot for picture in done], 0]
        with torch.inference_mode():
            for part in latents.split(self.decoders[decoder].buckets[-1]):
                self.decoders[decoder].start(part).result()
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


@dataclass(frozen=True)
class Options:
    device: torch.device
    batches: list[int]
    steps: int | None
    guidance: float
    repeats: int


def compare(name: str, options: Options) -> list[dict[str, Any]]:
    """One model: a row of results per batch."""
    device, (dit_config, vae_config) = options.device, shape(name)
    steps = options.steps or (STEPS.get(name, 50) if device.type == "cpu" else 50)
    dit = random_dit(dit_config)
    vae = VAE(vae_config).eval().requires_grad_(False)
    difference = check_same_function(dit_config, dit, to_transformer(dit))
    print(f"\n{name}, {steps} steps; one float32 forward of both sides differs by {difference:.1e}, relative", flush=True)
    config = CheckpointConfig(
        architecture=dit_config,
        objective=ObjectiveConfig("diffusion"),
        image_size=vae_config.image_size,
        image_channels=vae_config.image_channels,
        labels=tuple((str(i),) for i in range(dit_config.num_classes)),
        default_steps=steps,
        default_guidance_scale=options.guidance,
        default_sampler="ddim",
        vae=vae_config,
    )
    peer_same = Peer(to_pipeline(Checkpoint(config, dit, vae), device, torch.bfloat16), device)
    peer_default = Peer(to_pipeline(Checkpoint(config, dit, vae), device, torch.float32), device)
    ours = Ours(Checkpoint(config, dit.to(device, torch.bfloat16), vae.to(device)), max(options.batches), can_compile(device))
    setting = Setting(steps, "ddim", options.guidance, spacing="leading")  # as the pipeline's own
    rows = []
    for batch in options.batches:
        arguments = (batch, steps, options.guidance)
        sides: dict[str, Callable[[], tuple[float, float]]] = {
            "ours, bfloat16": lambda b=batch: ours.run(b, setting, "same"),
            "DiTPipeline, bfloat16": lambda a=arguments: peer_same.run(*a),
            "ours, as served": lambda b=batch: ours.run(b, setting, "served"),
            "DiTPipeline, its default float32": lambda a=arguments: peer_default.run(*a),
        }
        before = matrix_peak(device, torch.bfloat16)
        seconds = measure(sides, options.repeats)
        peak = max(before, matrix_peak(device, torch.bfloat16))
        gmacs = 2 * batch * steps * dit_cost(dit_config)[1]
        rows.append(report(name, batch, steps, seconds, {side: gmacs / denoise / peak for side, (denoise, _) in seconds.items()}))
    return rows


PAIRS = {
    "same dtype": ("ours, bfloat16", "DiTPipeline, bfloat16"),
    "default dtype": ("ours, as served", "DiTPipeline, its default float32"),
}


def report(name: str, batch: int, steps: int, seconds: dict[str, tuple[float, float]], shares: dict[str, float]) -> dict[str, Any]:
    print(f"\n{name}, batch {batch:<22} denoising ms   decoding ms   pictures/s   bf16 peak")
    for side, (denoising, decoding) in seconds.items():
        rate = batch / (denoising + decoding)
        print(f"  {side:<32} {denoising * 1e3:10.1f} {decoding * 1e3:13.1f} {rate:12.2f} {100 * shares[side]:9.0f} %")
    row: dict[str, Any] = {"model": name, "batch": batch, "steps": steps}
    row["seconds"] = {side: [round(v, 5) for v in value] for side, value in seconds.items()}
    row["share_of_peak"] = {side: round(value, 3) for side, value in shares.items()}
    for title, (a, b) in PAIRS.items():
        whole, denoise, decode = sum(seconds[b]) / sum(seconds[a]), seconds[b][0] / seconds[a][0], seconds[b][1] / seconds[a][1]
        print(f"  ratio, {title}: {whole:.2f}x (denoising {denoise:.2f}x, decoding {decode:.2f}x)", flush=True)
        row[title] = {"whole": round(whole, 3), "denoising": round(denoise, 3), "decoding": round(decode, 3)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", help=f"{BUNDLED} or presets; by default {BUNDLED}, S/2 and B/2, on a GPU XL/2 as well")
    parser.add_argument("--steps", type=int, help=f"by default {STEPS} on a CPU and 50 on a GPU")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batches", type=int, nargs="+", help="by default 1 4 16, on a GPU 1 4 16 64 256")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    batches = arguments.batches or ([1, 4, 16, 64, 256] if on_gpu else [1, 4, 16])
    options = Options(device, batches, arguments.steps, arguments.guidance, arguments.repeats)
    where = {"hardware": torch.cuda.get_device_name(device) if on_gpu else hardware(), "torch": torch.__version__, "commit": commit()}
    print(" · ".join(str(value) for value in where.values()), f"· guidance {options.guidance} · compiled: {can_compile(device)}")
    results = []
    for name in arguments.models or [BUNDLED, "DiT-S/2", "DiT-B/2", *(["DiT-XL/2"] if on_gpu else [])]:
        results += compare(name, options)
        torch._dynamo.reset()
        gc.collect()
    print(json.dumps({"benchmark": "sampling", **where, "guidance": options.guidance, "results": results}))


if __name__ == "__main__":
    main()
