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
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from model.checkpoint import Checkpoint, CheckpointConfig
from model.config import DiTConfig, ObjectiveConfig, VAEConfig
from model.dit import DiT
from model.vae import VAE
from training.runlog import commit, hardware
from worker.protocol import GenerationRequest
from worker.runner import Runner, can_compile
from worker.scheduler import Job, Scheduler

NULL_OF_PIPELINE = 1000  # DiTPipeline writes the null class as this literal
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


def to_transformer(config: DiTConfig, dit: DiT) -> DiTTransformer2DModel:
    """Our weights under diffusers' names: the embedders copied into every block, the class table padded to the literal null class."""
    peer = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=NULL_OF_PIPELINE,
        norm_eps=config.norm_eps,
    )
    ours = dit.state_dict()
    table = torch.zeros(NULL_OF_PIPELINE + 1, config.hidden_size)
    table[: config.num_classes] = ours["y_embedder.embedding_table.weight"][:-1]
    table[NULL_OF_PIPELINE] = ours["y_embedder.embedding_table.weight"][-1]
    state = {}
    for kind in ("weight", "bias"):
        state[f"pos_embed.proj.{kind}"] = ours[f"x_embedder.proj.{kind}"]
        state[f"proj_out_1.{kind}"] = ours[f"final_layer.adaLN_modulation.1.{kind}"]
        state[f"proj_out_2.{kind}"] = ours[f"final_layer.linear.{kind}"]
        for i in range(config.depth):
            here, there = f"blocks.{i}", f"transformer_blocks.{i}"
            for number, ours_number in ((1, 0), (2, 2)):
                state[f"{there}.norm1.emb.timestep_embedder.linear_{number}.{kind}"] = ours[f"t_embedder.mlp.{ours_number}.{kind}"]
            state[f"{there}.norm1.linear.{kind}"] = ours[f"{here}.adaLN_modulation.1.{kind}"]
            for name, part in zip(("to_q", "to_k", "to_v"), ours[f"{here}.attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{there}.attn1.{name}.{kind}"] = part
            state[f"{there}.attn1.to_out.0.{kind}"] = ours[f"{here}.attn.proj.{kind}"]
            state[f"{there}.ff.net.0.proj.{kind}"] = ours[f"{here}.mlp.fc1.{kind}"]
            state[f"{there}.ff.net.2.{kind}"] = ours[f"{here}.mlp.fc2.{kind}"]
            state[f"{there}.norm1.emb.class_embedder.embedding_table.weight"] = table
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and all(name == "pos_embed.pos_embed" for name in missing), (missing, unexpected)
    return peer.eval().requires_grad_(False)


def to_pipeline(config: DiTConfig, dit: DiT, vae: VAE, device: torch.device, dtype: torch.dtype) -> DiTPipeline:
    autoencoder = AutoencoderKL.from_config(vae.autoencoder.config)
    autoencoder.load_state_dict(vae.autoencoder.state_dict())
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False)
    pipeline = DiTPipeline(to_transformer(config, dit), autoencoder.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


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
        request = GenerationRequest("benchmark", tuple(i % CLASSES for i in range(batch)), guidance, (0.0, 1.0), steps, "ddim", 0)
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
    difference = check_same_function(config, dit, to_transformer(config, dit))
    print(f"{hardware()} · torch {torch.__version__} · {options.steps} DDIM steps · guidance {options.guidance} · compiled: {compiled}")
    print(f"one float32 forward of both sides differs by {difference:.1e}, relative")

    def ours(vae_dtype: torch.dtype) -> Ours:
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
        loaded = Checkpoint(checkpoint, copy.deepcopy(dit).to(device, torch.bfloat16), copy.deepcopy(vae).cast(vae_dtype).to(device))
        return Ours(loaded, options.batches, compiled)

    same, served = ours(torch.bfloat16), ours(torch.bfloat16 if device.type == "cuda" else torch.float32)
    peer_same = Peer(to_pipeline(config, dit, vae, device, torch.bfloat16), device)
    peer_default = Peer(to_pipeline(config, dit, vae, device, torch.float32), device)
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
