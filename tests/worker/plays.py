"""Jobs that join and leave at given ticks, on the scheduler and a runner: the engine without its encoder. Beside it the slow reference."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from model.noise import normal
from model.samplers import DIFFUSION, FLOW, build_table
from model.sampling import SMALLEST_BATCH, sample_latents
from model.spacing import SPACINGS
from worker.protocol import ALL_CHANNELS, FIRST_THREE_CHANNELS, LARGEST_SEED, GenerationRequest
from worker.runner import Runner
from worker.scheduler import Job, Picture, Scheduler

Done = tuple[Tensor, np.ndarray | None]  # latents, pixels
SAMPLERS = {"flow": list(FLOW), "diffusion": list(DIFFUSION)}
EVERY_SAMPLER = [(objective, sampler) for objective, names in SAMPLERS.items() for sampler in names]
LABELS = [0, 1, 2, 3, None]


@dataclass
class Play:
    """One run; jobs are called by their place in `joins`."""

    runner: Runner
    rng: random.Random | None = None  # shuffles the places of the batch
    before_step: Callable[[int, list[Picture]], None] = lambda tick, batch: None
    rows: list[int] = field(default_factory=list)  # of each tick, without padding
    lost: list[tuple[str, int]] = field(default_factory=list)  # what left the finite numbers
    pictures: dict[tuple[str, int], Done] = field(default_factory=dict)  # (job, index)

    def run(self, joins: Sequence[tuple[int, GenerationRequest]], leaves: dict[str, int] | None = None) -> dict[tuple[str, int], Done]:
        scheduler, leaves = Scheduler(self.runner.max_rows, self.runner.slots), leaves or {}
        last = max(tick for tick, _ in joins)
        tick = 0
        while tick <= last or scheduler.has_work:
            for name, (when, request) in enumerate(joins):
                if when == tick:
                    scheduler.add(self._job(str(name), request))
            for name, when in leaves.items():
                if when == tick:
                    scheduler.remove(name)
            self._tick(scheduler, tick)
            tick += 1
        return self.pictures

    def _job(self, name: str, request: GenerationRequest) -> Job:
        plan = self.runner.plan(request)
        return Job(name, request.class_labels, request.seed, request.guidance_scale, plan.guided, plan)

    def _tick(self, scheduler: Scheduler, tick: int) -> None:
        batch = scheduler.deal()
        if self.rng:
            self.rng.shuffle(batch)
        self.runner.start([picture for picture in batch if picture.evaluation == 0])
        if batch:
            self.before_step(tick, batch)
            self.rows.append(sum(picture.rows for picture in batch))
        for group in self.runner.groups(batch):
            self.runner.step(group)
        self.lost += [(picture.job.id, picture.index) for picture, _ in self.runner.lost()]
        for picture in batch:
            picture.evaluation += 1
        self._decode(scheduler, scheduler.done()[: self.runner.decode_buckets[-1]])

    def _decode(self, scheduler: Scheduler, done: list[Picture]) -> None:
        if done:
            latents = [self.runner.state[picture.slot, 0].clone() for picture in done]
            for picture, latent, pixels in zip(done, latents, self.runner.decode(done).result(), strict=True):
                self.pictures[picture.job.id, picture.index] = latent, pixels
                scheduler.retire(picture)


def by_itself(runner: Runner, request: GenerationRequest, index: int = 0) -> Done:
    """One picture of a request, alone."""
    return Play(runner).run([(0, alone(request, index))])["0", 0]


def alone(request: GenerationRequest, index: int) -> GenerationRequest:
    """The request for one picture of a job."""
    return replace(request, class_labels=(request.class_labels[index],), seed=request.seed + index)


def same(one: Done, other: Done) -> bool:
    assert one[1] is not None and other[1] is not None, "a picture left the finite numbers"
    return torch.equal(one[0], other[0]) and np.array_equal(one[1], other[1])


def random_request(rng: random.Random, objective: str) -> GenerationRequest:
    sampler = rng.choice(SAMPLERS[objective])
    return GenerationRequest(
        model="tiny",
        class_labels=tuple(rng.choices(LABELS, k=rng.choice([1, 1, 2, 3, 5]))),
        guidance_scale=rng.choice([1.0, 1.0, 1.3, 2.0, 7.5]),
        guidance_interval=rng.choice([(0.0, 1.0), (0.0, 1.0), (0.2, 0.7), (0.0, 0.0)]),
        steps=rng.randint(1, 6),
        sampler=sampler,
        seed=rng.choice([rng.randrange(100), rng.randrange(LARGEST_SEED - 4)]),
        spacing=rng.choice([None, *SPACINGS]) if objective == "diffusion" else None,
        eta=rng.choice([0.0, 0.3, 1.0]) if sampler == "ddim" else 0.0,
        shift=rng.choice([1.0, 0.5, 3.0]) if objective == "flow" else 1.0,
        guidance_channels=rng.choice([ALL_CHANNELS, FIRST_THREE_CHANNELS]),
        guidance_rescale=rng.choice([0.0, 0.0, 0.4, 1.0]),
    )


def reference_latents(runner: Runner, request: GenerationRequest) -> Tensor:
    """Latents (B, C, H, W) of `model.sampling.sample_latents`, the slow loop, for the same request; padded as `sample` pads."""
    config, count = runner.checkpoint.config, request.num_images
    null = config.architecture.null_class
    padding = max(0, SMALLEST_BATCH - count)
    labels: Iterable[int | None] = [*request.class_labels, *[None] * padding]
    seeds = torch.tensor([*range(request.seed, request.seed + count), *[0] * padding])
    table = build_table(
        config.objective,
        request.sampler,
        request.steps,
        learn_sigma=config.architecture.learn_sigma,
        spacing=request.spacing,
        eta=request.eta,
        shift=request.shift,
    )
    return sample_latents(
        runner.checkpoint.dit,
        normal(seeds, torch.zeros_like(seeds), runner.shape),
        torch.tensor([null if label is None else label for label in labels]),
        null,
        table,
        guidance_scale=request.guidance_scale,
        guidance_interval=request.guidance_interval,
        guidance_channels=3 if request.guidance_channels == FIRST_THREE_CHANNELS else None,
        guidance_rescale=request.guidance_rescale,
        seeds=seeds,
    )[:count]
