"""A checkpoint folder becomes a warm runner: a compiler that fails and a memory that is too small cost speed, not the service."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from model.checkpoint import CheckpointError, load
from tests.worker.plays import by_itself, reference_latents
from worker import load as load_module
from worker.load import Loader
from worker.protocol import GenerationRequest
from worker.runner import Runner

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(tmp_path)


def loader(**changes: Any) -> Loader:
    return Loader(CPU, torch.float32, **{"compile": False, "max_rows": 8, **changes})


def test_a_folder_becomes_a_warm_runner(folder: Path, make_request: Callable[..., GenerationRequest]) -> None:
    runner = loader()(folder)
    assert runner.checkpoint.hash == load(folder).hash and runner.max_rows == 8 and runner.buckets == [2, 3, 4, 6, 8]
    assert runner.slowest_tick_s > 0
    torch.testing.assert_close(by_itself(runner, make_request())[0], reference_latents(runner, make_request())[0], rtol=1e-4, atol=1e-4)


def test_the_network_takes_the_type_and_on_the_cpu_the_decoder_stays_in_float32(folder: Path) -> None:
    runner = Loader(CPU, torch.bfloat16, compile=False, max_rows=4)(folder)
    assert runner.checkpoint.dit.x_embedder.proj.weight.dtype == torch.bfloat16
    assert runner.checkpoint.vae.autoencoder.dtype == torch.float32


def test_rows_are_measured_once_for_an_architecture_where_none_are_given(
    folder: Path, tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured: list[int] = []

    def affordable(checkpoint: object, most_rows: int, limit_s: float) -> tuple[int, int, dict[int, float]]:
        measured.append(most_rows)
        return 16, 4, {4: 0.001, 8: 0.0015, 16: 0.002}

    monkeypatch.setattr(load_module, "affordable", affordable)
    caplog.set_level("INFO")
    loading = loader(max_rows=None)
    runners = [loading(folder), loading(make_checkpoint(tmp_path, name="next", seed=1))]
    assert [(r.max_rows, r.decode_buckets) for r in runners] == [(16, [2, 4])] * 2 and measured == [64]
    assert "a forward of rows, uncompiled, takes 4: 1.0 ms, 8: 1.5 ms, 16: 2.0 ms" in caplog.text
    assert "at most 16 rows to a forward and 4 images to a decode" in caplog.text
    loading(make_checkpoint(tmp_path, name="deeper", depth=3))
    assert len(measured) == 2


def test_a_later_runner_takes_the_threads_that_the_first_found_to_be_steady(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []
    warm_up = Runner.warm_up

    def watched(self: Runner, *, choose_threads: bool) -> None:
        chosen.append(choose_threads)
        warm_up(self, choose_threads=choose_threads)

    monkeypatch.setattr(Runner, "warm_up", watched)
    loading = loader()
    torch.set_num_threads(2)
    loading(folder)
    settled = torch.get_num_threads()
    torch.set_num_threads(3)  # as a thread that begins has its own number
    loading(folder)
    assert chosen == [True, False] and torch.get_num_threads() == settled


# --- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Rows, images a decode and compiling of every runner that was warmed up; those with over 8 rows do not fit, and none compiles."""
    seen: list[tuple[int, int, bool]] = []
    build, warm_up = Runner.__init__, Runner.warm_up

    def init(self: Runner, checkpoint: Any, *, max_rows: int, max_decode: int, compile: bool, **options: Any) -> None:
        build(self, checkpoint, max_rows=max_rows, max_decode=max_decode, compile=False, **options)
        seen.append((max_rows, max_decode, compile))

    def warm(self: Runner, *, choose_threads: bool) -> None:
        if self.max_rows > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate everything")
        if seen[-1][2]:
            raise BackendCompilerFailed(lambda: None, RuntimeError("a header is gone"), None)
        warm_up(self, choose_threads=choose_threads)

    monkeypatch.setattr(Runner, "__init__", init)
    monkeypatch.setattr(Runner, "warm_up", warm)
    monkeypatch.setattr(load_module, "can_compile", lambda device: True)
    monkeypatch.setattr(load_module, "affordable", lambda *arguments: (32, 4, {32: 0.1}))
    return seen


def test_batches_that_do_not_fit_are_halved_and_a_failing_compiler_is_left_out(
    folder: Path, tried: list[tuple[int, int, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    runner = loader(max_rows=None, compile=True)(folder)
    assert tried == [(32, 4, True), (16, 2, True), (8, 2, True), (8, 2, False)] and runner.max_rows == 8
    assert "out of memory with 32 rows" in caplog.text and "a header is gone" in caplog.text


def test_a_runner_that_did_not_fit_is_gone_before_the_next_is_made(
    folder: Path, tried: list[tuple[int, int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its memory would be missing for the next."""
    alive = [0, 0]  # now, most
    build = Runner.__init__

    def init(self: Runner, *arguments: Any, **options: Any) -> None:
        alive[0] += 1
        alive[1] = max(alive)
        build(self, *arguments, **options)

    def gone(self: Runner) -> None:
        alive[0] -= 1

    monkeypatch.setattr(Runner, "__init__", init)
    monkeypatch.setattr(Runner, "__del__", gone, raising=False)
    runner = loader(max_rows=None)(folder)
    assert len(tried) == 3 and runner.max_rows == 8 and alive == [1, 1]


@pytest.mark.parametrize("where", ["measuring", "warming up", "loading"])
def test_a_model_that_does_not_fit_at_all_says_so(
    folder: Path, tried: list[tuple[int, int, bool]], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate everything")

    owner, name = {"measuring": (load_module, "affordable"), "warming up": (Runner, "warm_up"), "loading": (load_module, "load")}[where]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(ValueError, match=r"tiny does not fit the device: CUDA out of memory\.$"):
        loader(max_rows=8)(folder)
    assert tried == ([(8, 4, False), (4, 2, False)] if where == "warming up" else [])


def test_without_a_compiler_the_model_runs_uncompiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(load_module, "can_compile", lambda device: False)
    loading = loader(compile=True)
    assert not loading.compile and "no C++ compiler was found" in caplog.text


def test_a_folder_that_is_not_sound_or_has_no_vae_is_refused(
    folder: Path, tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        loader()(tmp_path / "nothing")
    checkpoint = load(folder)
    checkpoint.vae = None
    monkeypatch.setattr(load_module, "load", lambda *arguments: checkpoint)
    with pytest.raises(ValueError, match="tiny has no VAE, so it cannot be served"):
        loader()(folder)
