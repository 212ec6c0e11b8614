"""The block cache: the middle blocks run at every n-th evaluation only, per picture, whatever shares its batch."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import Checkpoint
from model.sampling import runs_all_blocks, sample
from worker.engine import Engine, ImageReady
from worker.models import OneModel
from worker.protocol import GenerationRequest, ModelRecord
from worker.runner import Runner

MakeRequest = Callable[..., GenerationRequest]


@pytest.fixture
def runner(build_checkpoint: Callable[..., Checkpoint], record: ModelRecord) -> Runner:
    checkpoint = build_checkpoint("flow", depth=4)
    checkpoint.hash = record.checkpoint
    runner = Runner(checkpoint, max_rows=16, compile=False, block_cache=True)
    runner.warm_up()
    return runner


def pictures(runner: Runner, record: ModelRecord, jobs: dict[str, GenerationRequest]) -> dict[tuple[str, int], bytes]:
    engine = Engine(OneModel(runner, record))
    for name, request in jobs.items():
        engine.add(name, request, record.checkpoint)
    found = {}
    while engine.busy:
        for event in engine.tick():
            if isinstance(event, ImageReady):
                found[event.job_id, event.index] = event.png
    return found


def test_it_is_renewed_at_every_nth_evaluation_and_where_guidance_begins() -> None:
    assert runs_all_blocks([True] * 7, 3) == [True, False, False, True, False, False, True]
    assert runs_all_blocks([False, False, True, True, True, False], 3) == [True, False, True, True, False, False]
    assert runs_all_blocks([True, False], 1) == [True, True]


@pytest.mark.parametrize("block", ["adaln-zero", "adaln", "cross-attention", "in-context"])
def test_a_change_taken_from_the_same_evaluation_gives_the_whole_forward(build_checkpoint: Callable[..., Checkpoint], block: str) -> None:
    dit = build_checkpoint(block=block, depth=4).dit
    assert list(dit.middle) == [1, 2]
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 4])
    with torch.inference_mode():
        whole, change = dit.cached(x, t, y)
        again, _ = dit.cached(x, t, y, change)
        moved, _ = dit.cached(x, t, y, torch.zeros_like(change))
    torch.testing.assert_close(whole, dit(x, t, y))
    torch.testing.assert_close(again, whole)
    assert (moved - whole).abs().max() > 1e-3, "the middle does something"


def test_a_picture_is_that_of_the_reference_and_the_same_in_a_crowd(runner: Runner, record: ModelRecord, make_request: MakeRequest) -> None:
    cached = make_request(steps=9, block_cache=3, guidance_interval=(0.2, 0.7))
    others = {"plain": make_request(steps=9), "two": make_request(class_labels=(1, None, 2), steps=7, block_cache=2, seed=40)}
    alone = pictures(runner, record, {"x": cached})
    crowd = pictures(runner, record, {**others, "x": cached})
    assert alone["x", 0] == crowd["x", 0]
    assert pictures(runner, record, {"plain": others["plain"]})["plain", 0] == crowd["plain", 0]
    with torch.inference_mode():
        expected = sample(
            runner.checkpoint,
            [0],
            steps=9,
            guidance_scale=2.0,
            guidance_interval=(0.2, 0.7),
            sampler="euler",
            seeds=[7],
            block_cache=3,
        )
    assert np.abs(decoded(alone["x", 0]).astype(int) - expected[0, ..., 0].numpy()).max() <= 1


def decoded(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png)))


def test_fewer_blocks_run(runner: Runner, record: ModelRecord, make_request: MakeRequest) -> None:
    ran: list[int] = []
    for i, block in enumerate(runner.checkpoint.dit.blocks):
        block.register_forward_pre_hook(lambda module, inputs, i=i: ran.append(i))
    pictures(runner, record, {"x": make_request(steps=6, block_cache=3)})
    assert [ran.count(i) for i in range(4)] == [6, 2, 2, 6]


def test_without_one_a_request_for_it_is_refused(make_runner: Callable[..., Runner], make_request: MakeRequest) -> None:
    with pytest.raises(ValueError, match="no block cache; DIT_BLOCK_CACHE"):
        make_runner().plan(make_request(block_cache=2))
