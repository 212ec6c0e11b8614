"""The device: slots of latents, one DiT forward a tick over rows at different steps, decoding in batches.

Nothing here decides what runs; the scheduler does. A tick stacks the numbers of each picture's own table row, runs one forward padded to a
bucket of rows, guides, and updates all latents at once. On the CPU the buckets are checked at start to give every row the same bits
whatever its neighbours, so that a seed gives the same picture alone and in a crowd; a bucket that does not is left out.

Shapes: B pictures of the tick · R rows of the forward · K latents a sampler keeps · C, H, W latent.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.noise import normal
from model.samplers import MAX_STATES, SamplerTable, build_table
from model.sampling import guide, to_pixels, update
from worker.protocol import ALL_CHANNELS, GenerationRequest
from worker.scheduler import Picture

log = logging.getLogger("dit.runner")

K = MAX_STATES  # latents kept by any sampler; those that keep fewer leave the rest zero
FIRST_CHANNELS = 3  # that the official code guides
SMALLEST_FORWARD, SMALLEST_DECODE = 4, 2  # below these the CPU's kernels give other bits
DECODE_BUCKETS = (SMALLEST_DECODE, 4, 8, 16)


@dataclass(frozen=True)
class Plan:
    """A request's sampler as plain numbers, one row per evaluation."""

    t: list[float]
    coefficients: list[list[float]]  # a (K·K), b (K), d, low, high
    noisy: list[bool]
    guided: list[bool]
    guidance_channels: int
    guidance_rescale: float


def make_plan(table: SamplerTable, request: GenerationRequest, channels: int) -> Plan:
    """Guidance costs a second row only while its scale is not 1 and t/T is inside its interval. `channels` are those of a latent."""
    table = table.padded(K)
    columns = [table.a.flatten(1), table.b, table.d[:, None], table.log_variance_low[:, None], table.log_variance_high[:, None]]
    low, high = request.guidance_interval
    return Plan(
        t=table.t.tolist(),
        coefficients=torch.cat(columns, dim=1).tolist(),
        noisy=(table.d != 0).tolist(),
        guided=[request.guidance_scale != 1.0 and low <= f <= high for f in table.fraction.tolist()],
        guidance_channels=channels if request.guidance_channels == ALL_CHANNELS else min(FIRST_CHANNELS, channels),
        guidance_rescale=request.guidance_rescale,
    )


def row_buckets(max_rows: int) -> list[int]:
    """Powers of two from the smallest forward to the first that holds max_rows: with 9 or 10 rows, say, the last have other bits."""
    buckets = [SMALLEST_FORWARD]
    while buckets[-1] < max_rows:
        buckets.append(2 * buckets[-1])
    return buckets


def alike_buckets(run: Callable[[Tensor], Tensor], buckets: Sequence[int]) -> list[int]:
    """The buckets in which every row comes out bit for bit as in the largest, wherever it stands; none, if in the largest it matters where.

    `run` takes the indices of rows (bucket,) and gives one output each. Where kernels change from one place to the next, a row moved
    on by one shows it; more moves make it surer.
    """
    order = torch.arange(max(buckets))
    reference = run(order)

    def alike(bucket: int) -> bool:
        return all(torch.equal(run(rows), reference[rows]) for rows in (order.roll(shift)[:bucket] for shift in (0, 1, 2, 5)))

    steady = [bucket for bucket in buckets if alike(bucket)]
    return steady if max(buckets) in steady else []


def steady_threads(threads: int, is_steady: Callable[[int], bool]) -> int:
    """The most threads, or else the next lower powers of two, with which a row's bits do not depend on its place; 1 always does.

    The CPU's kernels share rows out among threads, and a thread that gets few of them takes another path: with float32 products over
    3, 5, 6, 7 or 12 threads rows had other bits in other places, over 1, 2, 4, 8, 16 and 32 none.
    """
    while threads > 1 and not is_steady(threads):
        threads = 1 << ((threads - 1).bit_length() - 1)
    return threads


def can_compile(device: torch.device) -> bool:
    """torch.compile needs a C++ compiler on the CPU; CUDA brings its own (Triton)."""
    return device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None


def elapsed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, to the end of what it queued on the device."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.inference_mode()
def affordable(checkpoint: Checkpoint, limit_s: float, most_rows: int) -> tuple[int, int]:
    """Rows of a forward, at most `most_rows`, and images of a decode that take about `limit_s`: powers of two from the smallest batches.

    A tick is how long a new job waits and a lease goes unrenewed, and warming up runs each size several times.
    """
    assert checkpoint.vae is not None
    c, device = checkpoint.config.architecture, checkpoint.device
    x = torch.randn(SMALLEST_FORWARD, c.in_channels, c.input_size, c.input_size, device=device)
    t, y = torch.zeros(SMALLEST_FORWARD, device=device), torch.zeros(SMALLEST_FORWARD, dtype=torch.int64, device=device)

    def fitting(run: Callable[[], Any], smallest: int, most: int) -> int:
        run()  # the first call prepares kernels
        size, seconds = smallest, elapsed(run, device)
        while 2 * size <= most and 2 * size / smallest * seconds <= limit_s:
            size *= 2
        return size

    vae = checkpoint.vae
    rows = fitting(lambda: checkpoint.dit(x, t, y), SMALLEST_FORWARD, most_rows)
    return rows, fitting(lambda: vae.decode(x[:SMALLEST_DECODE]), SMALLEST_DECODE, DECODE_BUCKETS[-1])


class Runner:
    """Holds one checkpoint on one device."""

    def __init__(self, checkpoint: Checkpoint, *, max_rows: int, compile: bool, max_decode: int | None = None) -> None:
        if checkpoint.vae is None:
            raise ValueError("this checkpoint has no VAE, so it cannot be served")
        self.checkpoint, self.max_rows = checkpoint, max_rows
        self.config = checkpoint.config.architecture
        self.device = checkpoint.device
        c = self.config
        self.shape = (c.in_channels, c.input_size, c.input_size)
        self.state = torch.zeros(max_rows, K, *self.shape, device=self.device)
        checkpoint.vae.autoencoder.to(memory_format=torch.channels_last)
        self._decode = checkpoint.vae.decode
        self._forward: Any = checkpoint.dit
        if compile:
            self._forward = torch.compile(checkpoint.dit, dynamic=False)  # a graph per bucket
        self.buckets = row_buckets(max_rows)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(self.buckets) + 1)
        self.decode_buckets = [b for b in DECODE_BUCKETS if b <= max(SMALLEST_DECODE, min(max_rows, max_decode or max_rows))]
        self.slowest_tick_s = 0.0  # the largest forward and the largest decode, measured by warm_up()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run (and so compile) every bucket, and on the CPU keep the threads and buckets that give a row the same bits everywhere."""
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        rows = max(self.buckets[-1], self.decode_buckets[-1])
        x = torch.randn(rows, *self.shape, generator=generator).to(self.device)
        fractions = torch.rand(rows, generator=generator).to(self.device)
        t = fractions * (1.0 if self.config.time_factor != 1.0 else float(self.checkpoint.config.objective.num_timesteps - 1))
        y = torch.randint(self.config.num_classes + 1, (rows,), generator=generator).to(self.device)

        def forward(rows: Tensor) -> Tensor:
            return self._forward(x[rows], t[rows], y[rows])

        def decode(rows: Tensor) -> Tensor:
            return self._decode(x[rows])

        def steady(threads: int) -> bool:
            torch.set_num_threads(threads)
            largest = self.buckets[-1:], self.decode_buckets[-1:]
            return bool(alike_buckets(lambda r: self.checkpoint.dit(x[r], t[r], y[r]), largest[0]) and alike_buckets(decode, largest[1]))

        if self.device.type == "cpu":  # before anything is compiled for a number of threads
            threads = torch.get_num_threads()
            torch.set_num_threads(steady_threads(threads, steady))
            if torch.get_num_threads() < threads:
                log.warning("%d threads instead of %d, so that a seed gives one picture", torch.get_num_threads(), threads)
        order = torch.arange(rows)
        kept = alike_buckets(forward, self.buckets)
        decoded = alike_buckets(decode, self.decode_buckets)
        if self.device.type == "cpu":
            for name, before, after in (("forward", self.buckets, kept), ("decode", self.decode_buckets, decoded)):
                if not after:
                    log.error("%s: a row's bits depend on its place, so a seed may give slightly different pictures in a crowd", name)
                elif before != after:
                    log.warning("%s buckets %s of %s give other bits and are left out", name, sorted({*before} - {*after}), before)
            self.buckets, self.decode_buckets = kept or self.buckets, decoded or self.decode_buckets
        largest = order[: self.buckets[-1]], order[: self.decode_buckets[-1]]
        self.slowest_tick_s = elapsed(lambda: (forward(largest[0]), decode(largest[1])), self.device)
        log.info("warm after %.1f s: rows %s, decode %s", time.perf_counter() - started, self.buckets, self.decode_buckets)

    def plan(self, request: GenerationRequest) -> Plan:
        """ValueError if this model cannot do what the request asks."""
        wrong = [y for y in request.class_labels if y is not None and not 0 <= y < self.config.num_classes]
        if wrong:
            raise ValueError(f"class labels are 0 … {self.config.num_classes - 1}, got {wrong[0]}")
        objective = self.checkpoint.config.objective
        table = build_table(
            objective,
            request.sampler,
            request.steps,
            learn_sigma=self.config.learn_sigma,
            spacing=request.spacing,
            eta=request.eta,
            shift=request.shift,
        )
        return make_plan(table, request, self.config.in_channels)

    @torch.inference_mode()
    def start(self, pictures: Sequence[Picture]) -> None:
        """Fill the slots of newly admitted pictures with their initial noise."""
        if pictures:
            seeds = self._tensor([p.seed for p in pictures], torch.int64)
            slots = self._slots(pictures)
            self.state[slots] = 0  # what an earlier picture's sampler remembered
            self.state[slots, 0] = normal(seeds, torch.zeros_like(seeds), self.shape)

    @torch.inference_mode()
    def step(self, pictures: Sequence[Picture]) -> None:
        """One evaluation for every picture: one forward, one update. Nothing is written if anything throws."""
        slots = self._slots(pictures)
        state = self.state[slots]  # (B, K, C, H, W)
        out = self._evaluate(pictures, state[:, 0])  # (B, C or 2C, H, W)
        plans = [(p.job.plan, p.evaluation) for p in pictures]
        numbers = self._tensor([plan.coefficients[i] for plan, i in plans], torch.float32)  # (B, K·K + K + 3)
        a, b, d, low, high = numbers.split([K * K, K, 1, 1, 1], dim=1)
        if any(plan.noisy[i] for plan, i in plans):
            seeds = self._tensor([p.seed for p in pictures], torch.int64)
            noise = normal(seeds, self._tensor([i + 1 for _, i in plans], torch.int64), self.shape)
        else:
            noise = torch.zeros(1, device=self.device).view(1, 1, 1, 1)  # every d is 0
        self.state[slots] = update(state, out, a.view(-1, K, K), b, d[:, 0], low[:, 0], high[:, 0], noise)

    def _evaluate(self, pictures: Sequence[Picture], x: Tensor) -> Tensor:
        """Network output with guidance applied; rows are all conditional ones, then the null rows of those guided at this step."""
        guided = [i for i, p in enumerate(pictures) if p.job.guided[p.evaluation]]
        null = self.config.null_class
        t = [p.job.plan.t[p.evaluation] for p in pictures]
        y = [null if p.class_label is None else p.class_label for p in pictures]
        count = len(pictures)
        padding = self._bucket(self.buckets, count + len(guided)) - count - len(guided)
        index = [*range(count), *guided, *[0] * padding]
        times = self._tensor([t[i] for i in index], torch.float32)
        classes = self._tensor([*y, *[null] * (len(guided) + padding)], torch.int64)
        out = self._forward(x[self._tensor(index, torch.int64)], times, classes)
        conditional = out[:count]
        if not guided:
            return conditional
        jobs = [pictures[i].job for i in guided]
        scale = self._per_row([job.guidance_scale for job in jobs])
        channels = self._per_row([job.plan.guidance_channels for job in jobs])
        rescale = self._per_row([job.plan.guidance_rescale for job in jobs]) if any(job.plan.guidance_rescale for job in jobs) else None
        where = self._tensor(guided, torch.int64)
        result = conditional.clone()
        result[where] = guide(conditional[where], out[count : count + len(guided)], scale, channels, rescale)
        return result

    @torch.inference_mode()
    def decode(self, pictures: Sequence[Picture]) -> list[np.ndarray | None]:
        """Pixels (H, W, channels) of finished pictures, uint8; None for one whose latent is not finite."""
        images: list[np.ndarray | None] = []
        step = self.decode_buckets[-1]
        for first in range(0, len(pictures), step):
            part = pictures[first : first + step]
            latents = self.state[self._slots(part), 0]
            finite = latents.isfinite().flatten(1).all(1).tolist()
            bucket = self._bucket(self.decode_buckets, len(part))
            padded = torch.cat([latents, latents[:1].expand(bucket - len(part), *self.shape)])
            pixels = to_pixels(self._decode(padded)).cpu().numpy()
            images += [pixels[i] if finite[i] else None for i in range(len(part))]
        return images

    def _bucket(self, buckets: Sequence[int], count: int) -> int:
        return next(b for b in buckets if b >= count)

    def _per_row(self, values: Sequence[float]) -> Tensor:
        return self._tensor(values, torch.float32).view(-1, 1, 1, 1)

    def _slots(self, pictures: Sequence[Picture]) -> Tensor:
        return self._tensor([p.slot for p in pictures], torch.int64)

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        tensor = torch.tensor(values, dtype=dtype)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
