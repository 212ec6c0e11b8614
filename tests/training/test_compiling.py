"""A stage's losses through torch.compile, and what is done where there is no compiler."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from tests.training.toy import config
from training.batches import Batch
from training.compiling import compiled
from training.config import Execution
from training.randomness import Draw, normal, sample_numbers, uniform
from training.stage import Player, Stage

CPU = torch.device("cpu")
COMPILE = Execution(compile=True)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """In this process: else the compiler starts a pool of processes that each load torch."""
    torch._dynamo.reset()
    with inductor_config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


@pytest.fixture
def stage() -> Stage:
    torch.manual_seed(0)
    network = nn.Linear(3, 3)

    def losses(batch: Batch) -> dict[str, Tensor]:
        times = uniform(batch["number"], Draw.TIME).float()[:, None]
        noisy = (1 - times) * batch["x"] + times * normal(batch["number"], Draw.NOISE, (3,))
        return {"loss": (network(noisy) - batch["x"]).square().mean()}

    def batch_at(step: int, rows: slice) -> Batch:
        numbers = sample_numbers(step, 4, rows)
        return {"number": numbers, "x": torch.sin(numbers[:, None] + torch.arange(3.0))}

    return Stage("test", {"test": Player(network, config())}, batch_at, losses, lambda _: Image.new("L", (1, 1)), {})


def outcomes(stage: Stage, losses: object) -> list[Tensor]:
    """Losses and gradients of three steps."""
    found = []
    for step in range(3):
        loss = losses(stage.batch_at(step, slice(None)))["loss"]  # type: ignore[operator]
        found += [loss.detach(), *torch.autograd.grad(loss, list(stage.main.network.parameters()))]
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, on the way to its compiler
def test_compiled_losses_are_the_same_with_their_draws_and_gradients(stage: Stage) -> None:
    said: list[str] = []
    losses = compiled(stage, COMPILE, CPU, said.append)
    if said and not os.environ.get("CI"):
        pytest.skip("there is no C++ compiler here")
    assert losses is not stage.losses and not said
    with torch._dynamo.config.patch(error_on_recompile=True):
        for found, expected in zip(outcomes(stage, losses), outcomes(stage, stage.losses), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, on the way to its compiler
def test_without_a_compiler_training_goes_on_and_says_so(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    said: list[str] = []
    with inductor_config.patch({"cpp.cxx": (str(broken),)}):
        assert compiled(stage, COMPILE, CPU, said.append) is stage.losses
    assert len(said) == 1 and said[0].startswith("nothing is compiled, which is slower: ")


def test_nothing_is_compiled_unless_asked_for(stage: Stage) -> None:
    assert compiled(stage, Execution(), CPU, print) is stage.losses
