"""The loop both stages share: schedule, EMA, log, and a resume that is the run that never stopped."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from training.config import OptimiserConfig
from training.ema import EMA
from training.loop import STATE, Interrupted, fit, grid, learning_rate, step_generator


def config(steps: int = 12, **changes: Any) -> OptimiserConfig:
    values = {"batch_size": 4, "learning_rate": 0.05, "final_learning_rate": 0.001, "warmup_steps": 3, "sample_every": 5, "save_every": 100}
    return OptimiserConfig(steps=steps, **{**values, **changes})


class Run:
    """A regression whose every number comes from the step; it remembers its losses and does what it is told at a step."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.made_of = folder, {"block": changes.pop("block", "adaln")}
        self.config = config(**changes)
        self.losses: dict[int, float] = {}
        self.at: dict[int, Callable[[], None]] = {}

    def loss_at(self, step: int) -> dict[str, Tensor]:
        if step in self.at:
            self.at.pop(step)()
        x = torch.randn(4, 3, generator=step_generator(0, step))
        loss = (self.model(x) - x.sum(1, keepdim=True).sin()).square().mean()
        self.losses[step] = float(loss.detach())
        return {"loss": loss}

    def go(self, resume: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        preview = lambda _: Image.new("L", (4, 4))  # noqa: E731
        how: dict[str, Any] = {"preview": preview, "resume": resume, "title": "test", "made_of": self.made_of}
        averaged, seconds = fit(self.model, self.loss_at, self.config, self.folder, **how)
        assert seconds > 0
        return averaged.state_dict()

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]


def stop(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


# --- schedule and EMA --------------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    c = config(steps=103, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=3)
    assert [learning_rate(c, s) for s in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert learning_rate(c, 53) == pytest.approx(0.55)
    assert learning_rate(c, 28) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(c, 102) == pytest.approx(0.1, abs=0.001)
    falling = [learning_rate(c, s) for s in range(3, 103)]
    assert falling == sorted(falling, reverse=True)


def test_the_learning_rate_may_start_without_warm_up_and_stay_constant() -> None:
    c = config(steps=5, learning_rate=1e-4, final_learning_rate=1e-4, warmup_steps=0)
    assert [learning_rate(c, s) for s in range(5)] == pytest.approx([1e-4] * 5)


def test_the_average_follows_its_formula_and_is_warmed_up() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 5.0)
    ema, expected = EMA(model, decay=0.5), 5.0
    for step in range(20):
        nn.init.constant_(model.weight, float(step))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        ema.update(model, step)
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert model.weight.item() == 19.0  # the trained weights are not touched


def test_the_average_is_a_model_of_its_own() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters()) and model.weight.requires_grad


def test_random_numbers_of_a_step_are_its_own() -> None:
    a, again, b = (torch.rand(4, generator=step_generator(0, s)) for s in (3, 3, 4))
    assert torch.equal(a, again) and not torch.equal(a, b)


# --- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_logs_samples_and_saves(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=120)
    run.go()
    assert sum(run.losses[s] for s in range(110, 120)) < 0.5 * sum(run.losses[s] for s in range(10))
    log = run.log()
    assert log[0]["event"] == "start" and log[0]["stage"] == "test" and log[0]["optimiser"]["steps"] == 120 and log[0]["parameters"] == 41
    assert [line["step"] for line in log[1:-1]] == list(range(10, 121, 10))
    assert log[-1]["event"] == "end" and log[-1]["seconds"] >= 0
    assert log[1]["loss"] == pytest.approx(run.losses[9]) and log[1]["learning_rate"] == learning_rate(run.config, 9)
    assert all(math.isfinite(line["gradient_norm"]) and line["images_per_s"] > 0 for line in log[1:-1])
    assert len(list(tmp_path.glob("samples-*.png"))) == 24
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".png") == ["log.jsonl", STATE]


def test_the_last_step_is_logged_sampled_and_saved_whatever_its_number(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=7, sample_every=100)
    run.go()
    assert [line.get("step") for line in run.log()] == [None, 7, 7]
    assert (tmp_path / "samples-000007.png").is_file()
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("stop_at", [0, 4, 10])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, stop_at: int, number: int) -> None:
    whole = Run(tmp_path / "whole")
    expected = whole.go()
    parts = Run(tmp_path / "parts")
    parts.at[stop_at] = lambda: stop(number)
    with pytest.raises(Interrupted, match=f"saved at step {stop_at + 1} of 12 in .*--resume"):
        parts.go()
    assert sorted(parts.losses) == list(range(stop_at + 1))
    weights = parts.go(resume=True)
    assert parts.losses == whole.losses
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert [line["event"] for line in parts.log() if "event" in line] == ["start", "interrupted", "start", "end"]
    assert parts.log()[0]["resumed_at"] == 0
    assert next(line for line in parts.log()[1:] if line.get("event") == "start")["resumed_at"] == stop_at + 1


def test_a_run_resumes_from_its_last_save_after_a_crash(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", save_every=4)
    expected = whole.go()
    crashed = Run(tmp_path / "crashed", save_every=4)

    def crash() -> None:
        raise RuntimeError("power cut")

    crashed.at[10] = crash
    with pytest.raises(RuntimeError, match="power cut"):
        crashed.go()
    assert torch.load(tmp_path / "crashed" / STATE, weights_only=True)["step"] == 8
    weights = crashed.go(resume=True)
    assert crashed.losses == whole.losses and all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_finished_run_resumes_to_the_same_average(tmp_path: Path) -> None:
    run = Run(tmp_path)
    expected = run.go()
    run.losses.clear()
    assert all(torch.equal(value, expected[name]) for name, value in run.go(resume=True).items()) and not run.losses


def test_a_stop_in_the_last_step_is_no_interruption(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.at[11] = stop
    run.go()
    assert run.log()[-1]["event"] == "end"


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = Run(tmp_path)
    run.at[2] = stop
    with pytest.raises(Interrupted):
        run.go()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_images_per_second_count_what_was_trained_since_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One second a step by a false clock: batch 4 is 4 images/s, before and after a resume in between two lines."""
    run = Run(tmp_path, steps=35, sample_every=100)
    run.at[6] = stop
    clock = {"now": 0.0}
    monkeypatch.setattr("training.loop.time.perf_counter", lambda: clock["now"])
    loss_at = run.loss_at

    def a_second_later(step: int) -> dict[str, Tensor]:
        clock["now"] += 1
        return loss_at(step)

    run.loss_at = a_second_later  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        run.go()
    run.go(resume=True)
    assert {line["step"]: line["images_per_s"] for line in run.log() if "images_per_s" in line} == {10: 4, 20: 4, 30: 4, 35: 4}


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go()
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        run.go()
    assert (tmp_path / STATE).read_bytes() == before


def test_nothing_is_resumed_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to resume"):
        Run(tmp_path / "none").go(resume=True)
    assert not (tmp_path / "none").exists()


def test_a_run_is_not_resumed_under_another_schedule(tmp_path: Path) -> None:
    """A cosine over other steps would jump, and the result would be neither run."""
    run = Run(tmp_path)
    run.at[4] = stop
    with pytest.raises(Interrupted):
        run.go()
    with pytest.raises(ValueError, match=r"learning_rate.*0\.05.*0\.01"):
        Run(tmp_path, learning_rate=0.01).go(resume=True)
    with pytest.raises(ValueError, match=r"started with block = adaln, the recipe now says in-context"):
        Run(tmp_path, block="in-context").go(resume=True)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=30)
    loss_at = run.loss_at
    run.loss_at = lambda step: {"loss": loss_at(step)["loss"] * (math.nan if step > 10 else 1)}  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="the loss became nan at step"):
        run.go()
    assert all("NaN" not in line for line in (tmp_path / "log.jsonl").read_text().splitlines())


def poison(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.fill_(math.nan)


@pytest.mark.parametrize("how", ["between two log lines", "at Ctrl-C"])
def test_weights_that_are_not_finite_never_replace_a_good_state(tmp_path: Path, how: str) -> None:
    run = Run(tmp_path, steps=40, save_every=4 if how == "between two log lines" else 8)

    def spoil() -> None:
        poison(run.model)
        if how == "at Ctrl-C":
            stop()

    run.at[8 if how == "at Ctrl-C" else 11] = spoil
    with pytest.raises((FloatingPointError, Interrupted)):
        run.go()
    state = torch.load(tmp_path / STATE, weights_only=True)
    assert state["step"] == 8 and all(bool(torch.isfinite(v).all()) for v in state["model"].values())


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    """√x at 0 has a finite value and an infinite slope: the loss looks well, the weights after it do not."""
    run = Run(tmp_path, steps=20, save_every=10)
    loss_at = run.loss_at

    def steep(step: int) -> dict[str, Tensor]:
        loss = loss_at(step)["loss"]
        return {"loss": loss + (run.model[0].weight * 0).sum().sqrt() if step == 9 else loss}

    run.loss_at = steep  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError):
        run.go()
    assert not (tmp_path / STATE).exists()


def test_an_interrupted_save_keeps_the_state_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, save_every=4)
    save, calls = torch.save, []

    def sometimes(state: object, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError("no space left")
        save(state, path)

    monkeypatch.setattr(torch, "save", sometimes)
    with pytest.raises(OSError, match="no space left"):
        run.go()
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == 4


# --- grids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_grid_lays_pictures_out_row_by_row(channels: int, mode: str) -> None:
    images = torch.stack([torch.full((2, 3, channels), 10 * (i + 1), dtype=torch.uint8) for i in range(5)])
    picture = grid(images, columns=2, scale=2)
    assert picture.mode == mode and picture.size == (2 * 3 * 2, 3 * 2 * 2)
    corners = [picture.getpixel((6 * (i % 2), 4 * (i // 2))) for i in range(6)]
    assert [c if channels == 1 else c[0] for c in corners] == [10, 20, 30, 40, 50, 0]
