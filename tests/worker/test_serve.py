"""Before anything is served: a compiler that fails and a memory that is too small cost speed, not the service."""

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from model.checkpoint import Checkpoint
from worker import serve
from worker.runner import Runner


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Rows, images a decode and compiling of every runner that was warmed up; those with over 8 rows do not fit."""
    seen: list[tuple[int, int, bool]] = []
    build = Runner.__init__

    def init(self: Runner, checkpoint: Checkpoint, *, max_rows: int, compile: bool, max_decode: int | None = None) -> None:
        build(self, checkpoint, max_rows=max_rows, compile=False, max_decode=max_decode)
        seen.append((max_rows, max_decode or 0, compile))

    def warm_up(self: Runner) -> None:
        if self.max_rows > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate everything")
        if seen[-1][2]:
            raise BackendCompilerFailed(lambda: None, RuntimeError("a header is gone"), None)

    monkeypatch.setattr(Runner, "__init__", init)
    monkeypatch.setattr(Runner, "warm_up", warm_up)
    return seen


def test_batches_that_do_not_fit_are_halved_and_a_failing_compiler_is_left_out(
    build_checkpoint: Callable[..., Checkpoint], tried: list[tuple[int, int, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    runner = serve._warm_runner(build_checkpoint("flow"), 32, 4, compile=True)
    assert tried == [(32, 4, True), (16, 2, True), (8, 2, True), (8, 2, False)] and runner.max_rows == 8
    assert "out of memory with 32 rows" in caplog.text and "a header is gone" in caplog.text


def test_a_model_that_does_not_fit_at_all_says_so(
    build_checkpoint: Callable[..., Checkpoint], tried: list[tuple[int, int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Runner) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate everything")

    monkeypatch.setattr(Runner, "warm_up", full)
    with pytest.raises(ValueError, match=r"does not fit the device: CUDA out of memory\.$"):
        serve._warm_runner(build_checkpoint("flow"), 8, 2, compile=False)
    assert tried[-1] == (4, 2, False)
