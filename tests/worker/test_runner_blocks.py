"""One worker serves every block and every part: late jobs share its steps, and each picture is the reference sampler's."""

from collections.abc import Callable, Iterator

import pytest
import torch

from model.config import BLOCKS
from tests.worker.plays import Play, by_itself, reference_latents, same
from worker.protocol import GenerationRequest
from worker.runner import Runner

EVERY_PART = {"qk_norm": True, "rms_norm": True, "swiglu": True, "rope": True}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The CPU's kernels share rows out among threads, and so depend most on how many rows there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


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
    found = Play(runner).run(list(enumerate(requests)))
    for name, request in enumerate(requests):
        ours = [found[str(name), i] for i in range(request.num_images)]
        latents = torch.stack([latent for latent, _ in ours])
        torch.testing.assert_close(latents, reference_latents(runner, request), rtol=1e-4, atol=1e-4)
        assert all(same(picture, by_itself(runner, request, i)) for i, picture in enumerate(ours))
        assert all(pixels.std() > 1 for _, pixels in ours), "the pictures show something"
