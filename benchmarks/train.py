"""Images per second of training: `dit train dit` beside a plain loop as the public code writes it, the same model and batch.

    python benchmarks/train.py [--device cuda] [--models DiT-S/2 bundled] [--batch 64] [--processes 1 2]

The plain loop: float32, every batch's images encoded by the VAE, torch's AdamW as it comes, an average parameter by parameter, nothing
compiled. Ours is the loop of training/loop.py: latents cached before (what encoding costs is told beside), bfloat16 products on float32
weights, compiled. Pictures and weights are random: their values don't matter for speed. DiT-S/2 trains at 256×256 with an autoencoder of
the public one's shape (84 M parameters), `bundled` with the shapes of checkpoints/fashion-mnist; both on the paper's objective.

Each side runs in a process of its own, so that its peak memory is its own: of the process on a CPU, compiler included; of the allocator on
a GPU; of several processes the first's. Several run under torchrun with the same global batch. A share of the matrix peak, that of
benchmarks/forward.py, is three forwards' GMACs of the DiT for each image. The last line is JSON.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forward import matrix_peak
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from model.config import DiTConfig, ObjectiveConfig, VAEConfig, preset
from model.cost import dit_cost
from model.diffusion import GaussianDiffusion
from model.dit import DiT
from model.vae import VAE
from training.config import DataConfig, DiTRecipe, Execution, OptimiserConfig, Recipe, load_recipe
from training.data import Split, to_float
from training.latents import LatentCache
from training.loop import LOG_EVERY, fit
from training.runlog import LOG, commit, hardware
from training.train_dit import dit_stage
from training.train_vae import vae_config
from training.world import joined

BUNDLED, PLAIN, OURS = "bundled", "plain", "ours"
IMAGES = 64
OUR_STEPS = 3 * LOG_EVERY  # of which the first line of the log does not count
EMA_DECAY, LEARNING_RATE, LABEL_DROPOUT = 0.9999, 1e-4, 0.1


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    device: torch.device

    def shapes(self) -> tuple[DiTConfig, VAEConfig]:
        if self.model != BUNDLED:
            return preset(self.model), VAEConfig(image_size=256, image_channels=3)
        recipe = load_recipe("fashion-mnist")
        vae = vae_config(recipe)
        dit = recipe.dit.architecture(input_size=vae.latent_size, in_channels=vae.latent_channels, num_classes=len(recipe.data.labels))
        return replace(dit, learn_sigma=True, time_factor=1.0), vae

    @property
    def plain_steps(self) -> int:
        """Of which the first does not count; on a CPU one takes seconds."""
        return 30 if self.device.type == "cuda" else 10 if self.model == BUNDLED else 3

    def recipe(self, steps: int) -> Recipe:
        dit, vae = self.shapes()
        optimiser = OptimiserConfig(
            **{"steps": steps, "batch_size": self.batch, "sample_every": steps, "save_every": steps},
            **{"learning_rate": LEARNING_RATE, "final_learning_rate": LEARNING_RATE, "warmup_steps": 0, "ema_decay": EMA_DECAY},
        )
        shape = {name: getattr(dit, name) for name in ("patch_size", "hidden_size", "depth", "num_heads")}
        trained = DiTRecipe(**shape, objective="diffusion", learn_sigma=True, optimiser=optimiser, label_dropout=LABEL_DROPOUT)
        return replace(load_recipe("fashion-mnist"), data=DataConfig(vae.image_size, vae.image_channels), dit=trained)


class Plain:
    """The loop as the public code writes it."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as the public code sets it
        self.case, (dit, self.latents) = case, case.shapes()
        self.dit, self.vae = DiT(dit).to(case.device), VAE(self.latents).to(case.device).requires_grad_(False)
        self.ema = copy.deepcopy(self.dit).requires_grad_(False)
        self.process = GaussianDiffusion(ObjectiveConfig("diffusion")).to(case.device)
        self.optimiser = torch.optim.AdamW(self.dit.parameters(), LEARNING_RATE, weight_decay=0.0)

    def batches(self) -> Iterator[list[Tensor]]:
        """Epochs without end, of images that are in memory already."""
        shape = (IMAGES, self.latents.image_channels, self.latents.image_size, self.latents.image_size)
        pictures = TensorDataset(torch.randint(256, shape, dtype=torch.uint8), torch.arange(IMAGES) % self.dit.config.num_classes)
        while True:
            yield from DataLoader(pictures, self.case.batch, sampler=RandomSampler(pictures, num_samples=10 * self.case.batch))

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        images = to_float(pictures.to(self.case.device))
        return self.vae.encode(images, torch.randn(_latent_shape(self.latents, len(images)), device=images.device))

    def step(self, x0: Tensor, classes: Tensor) -> Tensor:
        y = torch.where(torch.rand(len(x0)) < LABEL_DROPOUT, self.dit.config.null_class, classes).to(x0.device)
        t, noise = torch.randint(self.process.num_timesteps, (len(x0),), device=x0.device), torch.randn_like(x0)
        noisy = self.process.q_sample(x0, t, noise)
        loss = self.process.losses(self.dit(noisy, t, y), x0, noisy, t, noise)["loss"].mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        _average(self.ema, self.dit)
        return loss.detach()


def plain(case: Case, steps: int) -> dict[str, float]:
    """One process; the first step is not timed."""
    loop, encoding_s, began = Plain(case), 0.0, 0.0
    for step, (pictures, classes) in enumerate(islice(loop.batches(), steps)):
        started = _now(case.device)
        if step == 1:
            encoding_s, began = 0.0, started
        x0 = loop.encode(pictures)
        encoding_s += _now(case.device) - started
        loss = loop.step(x0, classes)
    seconds = _now(case.device) - began
    return {
        "images_per_s": case.batch * (steps - 1) / seconds,
        "encoding_share": encoding_s / seconds,
        "peak_mib": _peak_mib(case.device),
        "loss": float(loss),
    }


@torch.no_grad()
def _average(ema: DiT, dit: DiT) -> None:
    for average, parameter in zip(ema.parameters(), dit.parameters(), strict=True):
        average.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)


def ours(case: Case, steps: int, folder: Path, *, compile: bool = True) -> dict[str, float]:
    """By the environment that torchrun gives, one process or several, of which the first alone answers: the median of its log's lines but
    the first."""
    torch.manual_seed(0)
    dit_config, vae = case.shapes()
    moments = np.random.default_rng(0).standard_normal((IMAGES, 1, 2, *_latent_shape(vae, 1)[1:])).astype(np.float16)
    split = Split(torch.empty(IMAGES, 1, 0, 0, dtype=torch.uint8), torch.arange(IMAGES) % dit_config.num_classes)
    with joined() as world:
        dit = DiT(dit_config).to(world.device)
        stage = dit_stage(dit, case.recipe(steps), split, LatentCache([moments]), lambda _: Image.new("L", (1, 1)))
        fit(stage, folder, world=world, execution=Execution(compile=compile, tensorboard=False), resume=False)
    if not world.first:
        return {}
    log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    logged = [line for line in log if "loss" in line][1:]
    rate = statistics.median(line["images_per_s"] for line in logged)
    return {"images_per_s": rate, "peak_mib": _peak_mib(world.device), "loss": logged[-1]["loss"]}


def _latent_shape(config: VAEConfig, batch: int) -> tuple[int, ...]:
    return batch, config.latent_channels, config.latent_size, config.latent_size


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def in_a_process(case: Case, side: str, processes: int = 1) -> dict[str, float]:
    """This script again, as one side; under torchrun as several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        script = [__file__, "--side", side, "--models", case.model, "--batch", str(case.batch), "--device", case.device.type]
        command = [sys.executable, *launcher, *script, "--folder", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def devices(case: Case, processes: int) -> float:
    """How many times what the peak was measured on: GPUs, or of a CPU the threads; torchrun gives a process one unless told otherwise."""
    if case.device.type == "cuda" or processes == 1:
        return processes
    return processes * int(os.environ.get("OMP_NUM_THREADS", "1")) / torch.get_num_threads()


def measure(case: Case, processes: list[int]) -> dict[str, Any]:
    gmacs = 3 * dit_cost(case.shapes()[0])[1]
    peak = matrix_peak(case.device, torch.bfloat16)
    sides = {PLAIN: in_a_process(case, PLAIN)}
    for count in processes:
        sides[f"{OURS}, {count} process{'es' if count > 1 else ''}"] = in_a_process(case, OURS, count)
    for side, told in sides.items():
        told["times_plain"] = told["images_per_s"] / sides[PLAIN]["images_per_s"]
        if side != PLAIN:
            told["share_of_peak"] = told["images_per_s"] * gmacs / (peak * devices(case, int(side.split()[1])))
    return {"model": case.model, "batch": case.batch, "training_gmacs": gmacs, "peak_gmacs_per_s": peak, "sides": sides}


def lines(result: dict[str, Any]) -> list[str]:
    told = [f"{result['model']}, batch {result['batch']}, peak {result['peak_gmacs_per_s']:.0f} GMAC/s in bfloat16"]
    for side, figures in result["sides"].items():
        rest = (
            f"encoding {100 * figures['encoding_share']:.0f} % of the time"
            if side == PLAIN
            else f"{100 * figures['share_of_peak']:.0f} % of peak"
        )
        rate, times = figures["images_per_s"], figures["times_plain"]
        told.append(f"  {side:<18} {rate:9.2f} images/s  {times:6.2f}×  {figures['peak_mib']:7.0f} MiB  {rest}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["DiT-S/2", BUNDLED])
    parser.add_argument("--batch", type=int, help="of all processes together; by default 256 of `bundled`, else 4, on a GPU 64")
    parser.add_argument("--processes", type=int, nargs="+", help="by default 1 and 2, on a GPU as many as there are")
    parser.add_argument("--side", choices=[PLAIN, OURS], help="be one side of the first model, and print its figures")
    parser.add_argument("--folder", type=Path, help="of that side's run")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    cases = [Case(model, arguments.batch or (256 if model == BUNDLED else 64 if on_gpu else 4), device) for model in arguments.models]
    if arguments.side:
        case = cases[0]
        told = plain(case, case.plain_steps) if arguments.side == PLAIN else ours(case, OUR_STEPS, arguments.folder)
        if told:
            print(json.dumps(told), flush=True)
        return
    processes = arguments.processes or ([n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()] if on_gpu else [1, 2])
    where = {"hardware": torch.cuda.get_device_name(device) if on_gpu else hardware(), "torch": torch.__version__, "commit": commit()}
    print(" · ".join(map(str, where.values())))
    results = []
    for case in cases:
        results.append(measure(case, processes))
        print("\n".join(lines(results[-1])), flush=True)
    print(json.dumps({"benchmark": "train", **where, "cases": results}))


if __name__ == "__main__":
    main()
