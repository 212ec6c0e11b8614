"""One worker serves every block and every part: late jobs share its steps, and each picture is the reference sampler's, bit for bit."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from model.config import BLOCKS
from model.sampling import sample
from worker.protocol import GenerationRequest
from worker.runner import Runner
from worker.scheduler import Job, Scheduler

EVERY_PART = {"qk_norm": True, "rms_norm": True, "swiglu": True, "rope": True}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The CPU's kernels share rows out among threads, and so depend most on how many rows there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def served(runner: Runner, requests: Sequence[GenerationRequest]) -> list[list[np.ndarray | None]]:
    """Each request's pictures; the next one joins at every tick."""
    scheduler = Scheduler(runner.max_rows)
    pictures: list[list[np.ndarray | None]] = [[None] * request.num_images for request in requests]
    tick = 0
    while tick < len(requests) or scheduler.batch():
        if tick < len(requests):
            request = requests[tick]
            plan = runner.plan(request)
            scheduler.add(Job(str(tick), request.class_labels, request.seed, request.guidance_scale, plan.guided, plan))
        runner.start(scheduler.admit())
        batch = scheduler.batch()
        runner.step(batch)
        for picture in batch:
            picture.evaluation += 1
        done = [picture for picture in batch if picture.done]
        for picture, pixels in zip(done, runner.decode(done), strict=True):
            pictures[int(picture.job.id)][picture.index] = pixels
            scheduler.retire(picture)
        tick += 1
    return pictures


@pytest.mark.parametrize("parts", [{}, EVERY_PART], ids=["plain", "every part"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("objective", "sampler"), [("flow", "euler"), ("diffusion", "ddpm")])
def test_the_same_worker_serves_every_block_as_the_reference_samples_it(
    make_runner: Callable[..., Runner],
    make_request: Callable[..., GenerationRequest],
    objective: str,
    sampler: str,
    block: str,
    parts: dict[str, bool],
) -> None:
    runner = make_runner(objective, max_rows=16, block=block, **parts)
    requests = [
        make_request(sampler=sampler, class_labels=(0, 1, 2, None), steps=5, seed=11),
        make_request(sampler=sampler, class_labels=(3,), steps=3, guidance_scale=1.0, seed=4),
        make_request(sampler=sampler, class_labels=(2, 3), steps=4, guidance_scale=3.5, seed=20),
    ]
    for request, pictures in zip(requests, served(runner, requests), strict=True):
        seeds = range(request.seed, request.seed + request.num_images)
        settings = {"steps": request.steps, "guidance_scale": request.guidance_scale, "sampler": sampler, "seeds": seeds}
        expected = sample(runner.checkpoint, request.class_labels, **settings).numpy()
        assert expected.std() > 1, "the pictures show something"
        assert all(picture is not None for picture in pictures)
        assert np.array_equal(np.stack(pictures), expected)
