"""The loop both stages share: schedule, EMA, log, and a resume that is the run that never stopped."""

import math
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from tests.training.toy import Duel, Run, config
from training import state
from training.batches import Batch
from training.config import Execution
from training.ema import EMA
from training.learner import learning_rate
from training.loop import grid
from training.stopping import Interrupted


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
    ema, expected = EMA([model.weight], [0.5]), 5.0
    for step in range(20):
        nn.init.constant_(model.weight, float(step))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        ema.update(step)
        assert ema.averages[0.5][0].item() == pytest.approx(expected, rel=1e-5)
    assert model.weight.item() == 19.0  # the trained weights are not touched


def test_several_averages_are_what_each_would_be_alone() -> None:
    model = nn.Linear(3, 2)
    together, alone = EMA(list(model.parameters()), [0.5, 0.9, 0.1]), [EMA(list(model.parameters()), [d]) for d in (0.5, 0.9, 0.1)]
    for step in range(30):
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(step))
        for ema in (together, *alone):
            ema.update(step)
    for ema in alone:
        for decay, averages in ema.averages.items():
            assert all(torch.equal(a, b) for a, b in zip(averages, together.averages[decay], strict=True))


def test_a_model_has_its_average_for_weights_only_inside() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = EMA([model.weight], [0.9])
    nn.init.constant_(model.weight, 2.0)
    with ema.applied(0.9):
        assert model.weight.item() == 1.0
    assert model.weight.item() == 2.0 and ema.averages[0.9][0].item() == 1.0 and model.weight.requires_grad


# --- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_logs_samples_and_saves(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=120)
    run.go()
    assert sum(run.losses[s] for s in range(110, 120)) < 0.5 * sum(run.losses[s] for s in range(10))
    log = run.log()
    start = {"event": "start", "stage": "test", "steps": 120, "batch_size": 4, "parameters": 41, "processes": 1, "resumed_at": 0}
    assert start.items() <= log[0].items() and log[0]["optimiser"]["steps"] == 120 and log[0]["execution"]["shard"] is False
    assert [line["step"] for line in log[1:-1]] == list(range(10, 121, 10))
    assert log[-1]["event"] == "end" and log[-1]["seconds"] >= 0
    assert log[1]["loss"] == pytest.approx(run.losses[9]) and log[1]["learning_rate"] == learning_rate(run.config, 9)
    assert all(math.isfinite(line["gradient_norm"]) and line["images_per_s"] > 0 and 0 <= line["data_wait"] <= 1 for line in log[1:-1])
    assert all(line["eta_s"] >= 0 for line in log[1:-2]) and log[-2]["eta_s"] == 0
    assert len(list(tmp_path.glob("samples-*.png"))) == 24
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".png") == ["log.jsonl", "state"]


def test_the_last_step_is_logged_sampled_and_saved_whatever_its_number(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=7, sample_every=100)
    run.go()
    assert [line.get("step") for line in run.log()] == [None, 7, 7]
    assert (tmp_path / "samples-000007.png").is_file()
    assert run.saved_step() == 7


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
    assert crashed.saved_step() == 8
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


def test_images_per_second_and_waiting_count_what_was_trained_since_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One second a step by a false clock, and ten a preview: batch 4 is 4 images/s, before and after a resume in between two lines."""
    run = Run(tmp_path, steps=35, sample_every=5)
    run.at[6] = stop
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    loss = run.loss

    def later(batch: Batch) -> dict[str, Tensor]:
        clock["now"] += 1
        return loss(batch)

    def ten_seconds_later(model: nn.Module) -> Image.Image:
        clock["now"] += 10
        return Image.new("L", (4, 4))

    monkeypatch.setattr(run, "loss", later)
    monkeypatch.setattr(run, "preview", ten_seconds_later)
    with pytest.raises(Interrupted):
        run.go()
    run.go(resume=True)
    assert {line["step"]: line["images_per_s"] for line in run.log() if "images_per_s" in line} == {10: 4, 20: 4, 30: 4, 35: 4}
    assert [line["eta_s"] for line in run.log() if "eta_s" in line][-2:] == [pytest.approx(5 * (23 + 40) / 23, abs=0.1), 0]


def test_the_time_lost_waiting_for_data_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a false clock a batch takes three seconds of waiting, and a step one."""
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    run = Run(tmp_path, steps=20, sample_every=100)
    loss = run.loss

    class Slow(Future):  # type: ignore[type-arg]
        def result(self, timeout: float | None = None) -> Batch:
            clock["now"] += 3
            return super().result(timeout)

    def later(batch: Batch) -> dict[str, Tensor]:
        clock["now"] += 1
        return loss(batch)

    monkeypatch.setattr("concurrent.futures.thread._base.Future", Slow)
    monkeypatch.setattr(run, "loss", later)
    run.go()
    assert [line["data_wait"] for line in run.log() if "data_wait" in line] == [0.75, 0.75]


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go()
    before = {path: path.read_bytes() for path in (tmp_path / state.STATE).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        run.go()
    assert before and all(path.read_bytes() == content for path, content in before.items())


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


# --- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_goes_on_past_a_step_that_is_not_finite(tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, steps=30)
    run.bad = lambda step: value if step == 13 else 0.0
    weights = run.go()
    rollback = next(line for line in run.log() if line.get("event") == "rollback")
    assert rollback == {"event": "rollback", "step": 14, "to": 13, "reason": f"loss {value}, gradient_norm {math.nan}"} or (
        rollback["reason"] == f"loss {value}"  # a constant added to the loss leaves the gradient as it is
    )
    assert f"loss {value} at step 14: that step is left out, and training goes on with the weights of step 13" in capsys.readouterr().err
    assert [line["step"] for line in run.log() if "loss" in line] == [10, 20, 30]
    assert all(bool(torch.isfinite(w).all()) for w in weights.values()) and math.isfinite(run.losses[29])
    assert "NaN" not in (tmp_path / "log.jsonl").read_text().replace(str(math.nan), "")


def test_a_step_that_is_left_out_is_as_if_it_had_never_been(tmp_path: Path) -> None:
    """The weights before it, and the data, times and rate of the step after it: what a run does that gets no gradient there."""
    without = Run(tmp_path / "without", steps=16)
    expected: dict[str, Tensor] = {}

    def keep(run: Run, into: dict[str, Tensor]) -> Callable[[], None]:
        return lambda: into.update({name: value.clone() for name, value in run.model.state_dict().items()})

    without.at[13] = keep(without, expected)
    without.go()
    run, before, after = Run(tmp_path / "bad", steps=16), {}, {}
    run.bad = lambda step: math.nan if step == 13 else 0.0
    run.at[13], run.at[14] = keep(run, before), keep(run, after)
    run.go()
    assert all(torch.equal(before[name], value) and torch.equal(after[name], value) for name, value in expected.items())


def test_a_run_that_rolled_back_resumes(tmp_path: Path) -> None:
    whole, parts = (Run(tmp_path / name, steps=30, save_every=10) for name in ("whole", "parts"))
    whole.bad = parts.bad = lambda step: math.nan if step == 13 else 0.0
    expected = whole.go()
    parts.at[24] = stop
    with pytest.raises(Interrupted):
        parts.go()
    weights = parts.go(resume=True)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_losses_that_stay_not_finite_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=200, save_every=10)
    run.bad = lambda step: math.nan if step > 10 else 0.0
    with pytest.raises(FloatingPointError, match=r"loss nan at step 15, after 3 rollbacks; the last saved state is .*00000010"):
        run.go()
    told = [(line["step"], line["to"]) for line in run.log() if line.get("event") == "rollback"]
    assert told == [(12, 11), (13, 10), (14, 10)]
    assert run.saved_step() == 10


def poison(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.fill_(math.nan)


@pytest.mark.parametrize("how", ["between two log lines", "at Ctrl-C"])
def test_weights_that_are_not_finite_are_replaced_by_the_last_saved_ones(tmp_path: Path, how: str) -> None:
    run = Run(tmp_path, steps=40, save_every=8)

    def spoil() -> None:
        poison(run.model)
        if how == "at Ctrl-C":
            stop()

    run.at[17] = spoil
    if how == "at Ctrl-C":
        with pytest.raises(Interrupted):
            run.go()
        assert run.saved_step() == 18
    weights = run.go(resume=how == "at Ctrl-C")
    assert [line["to"] for line in run.log() if line.get("event") == "rollback"] == [16]
    assert all(bool(torch.isfinite(w).all()) for w in weights.values()) and math.isfinite(run.losses[39])


def test_a_gradient_that_is_not_finite_is_never_followed(tmp_path: Path) -> None:
    """√x at 0 has a finite value and an infinite slope: the loss looks well, the weights after it would not."""
    run = Run(tmp_path, steps=20, save_every=10)
    loss = run.loss

    def steep(batch: Batch) -> dict[str, Tensor]:
        losses = loss(batch)
        return {"loss": losses["loss"] + (run.model[0].weight * 0).sum().sqrt()} if 9 in run.losses and 10 not in run.losses else losses

    run.loss = steep  # type: ignore[method-assign]
    weights = run.go()
    assert [(line["step"], line["reason"]) for line in run.log() if line.get("event") == "rollback"] == [(10, "gradient_norm nan")]
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())


# --- saving ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_save_keeps_the_state_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run(tmp_path / "whole", save_every=4)
    expected = whole.go()
    run = Run(tmp_path / "full", save_every=4)
    save, calls = dcp.save, []

    def sometimes(tensors: dict[str, Tensor], **how: Any) -> None:
        calls.append(how)
        save(tensors, **how)
        if len(calls) == 3:
            raise OSError("no space left")

    monkeypatch.setattr(dcp, "save", sometimes)
    with pytest.raises(OSError, match="no space left"):
        run.go()
    assert run.saved_step() == 4 and (tmp_path / "full" / "state" / "00000008.tmp").is_dir()
    weights = run.go(resume=True)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert [path.name for path in (tmp_path / "full" / "state").iterdir()] == ["00000012"]


def test_a_line_that_a_killed_run_left_half_written_is_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.at[4] = stop
    with pytest.raises(Interrupted):
        run.go()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run.go(resume=True)
    assert [line["event"] for line in run.log() if "event" in line] == ["start", "interrupted", "start", "end"]


def test_a_folder_that_takes_no_state_is_known_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(OSError, match="no space left"):
        run.go()
    assert not run.losses


# --- several averages --------------------------------------------------------------------------------------------------


def test_any_of_several_averages_can_be_published_from_a_finished_run(tmp_path: Path) -> None:
    alone = Run(tmp_path / "alone", ema_decay=0.9).go()
    run = Run(tmp_path / "several", ema_decay=(0.5, 0.9))
    first = run.go()
    other = run.go(resume=True, publish=0.9)
    assert all(torch.equal(other[name], value) for name, value in alone.items())
    assert any(not torch.equal(other[name], value) for name, value in first.items())
    with pytest.raises(ValueError, match=r"there is no average of decay 0\.7; ema_decay is 0\.5, 0\.9"):
        run.go(resume=True, publish=0.7)


def test_without_an_average_the_last_weights_are_the_result(tmp_path: Path) -> None:
    run = Run(tmp_path, ema_decay=())
    weights = run.go()
    assert all(torch.equal(weights[name], value) for name, value in run.model.state_dict().items())


# --- execution ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_losses_do_not_depend_on_how_a_batch_is_split(tmp_path: Path, size: int) -> None:
    whole, split = Run(tmp_path / "whole", steps=20), Run(tmp_path / "split", Execution(size, tensorboard=False), steps=20)
    expected, weights = whole.go(), split.go()
    assert [line["loss"] for line in split.log() if "loss" in line] == pytest.approx([whole.losses[9], whole.losses[19]], rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def test_a_run_may_be_resumed_with_another_split(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.at[4] = stop
    with pytest.raises(Interrupted):
        run.go()
    run.execution = Execution(2, tensorboard=False)
    run.go(resume=True)
    assert run.log()[-1]["event"] == "end"


def test_one_process_cannot_spread_its_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one process has nobody to share its network with"):
        Run(tmp_path, Execution(shard=True)).go()


def test_numbers_and_pictures_go_to_tensorboard(tmp_path: Path) -> None:
    Run(tmp_path, Execution(), steps=20).go()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "gradient_norm", "learning_rate", "images_per_s", "data_wait", "eta_s"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [10, 20]
    assert [event.step for event in events.Images("samples")] == [5, 10, 15, 20]


def test_only_products_are_in_bfloat16(tmp_path: Path) -> None:
    run = Run(tmp_path, precision="bfloat16", ema_decay=(0.5, 0.9))
    loss, products = run.loss, []

    def watched(batch: Batch) -> dict[str, Tensor]:
        products.append(run.model(batch["x"]).dtype)
        return loss(batch)

    run.loss = watched  # type: ignore[method-assign]
    weights = run.go()
    saved = dcp.FileSystemReader(tmp_path / "state" / "00000012").read_metadata().state_dict_metadata
    assert {"test.network.0.weight", "test.average-0.5.0.weight", "test.optimiser.exp_avg_sq.0.weight"} <= set(saved)
    assert {tensor.properties.dtype for tensor in saved.values()} == {value.dtype for value in weights.values()} == {torch.float32}
    assert set(products) == {torch.bfloat16}


# --- several networks --------------------------------------------------------------------------------------------------


def test_each_of_two_networks_makes_its_own_loss_small(tmp_path: Path) -> None:
    run = Duel(tmp_path, steps=300, batch_size=32, learning_rate=0.02, sample_every=100)
    run.go()
    lines = [line for line in run.log() if "loss" in line]
    assert {"judge", "judge_gradient_norm", "gradient_norm"} <= set(lines[0])
    assert lines[2]["judge"] < lines[0]["judge"]  # the judge learns
    assert run.model(torch.zeros(1, 3)).item() > 1.0  # and the artist moves to where the judge sees the real ones
    assert run.log()[0]["parameters"] == 4


def test_a_resumed_duel_is_the_one_that_never_stopped(tmp_path: Path) -> None:
    whole, parts = Duel(tmp_path / "whole"), Duel(tmp_path / "parts")
    expected = whole.go()
    parts.at[5] = stop
    with pytest.raises(Interrupted):
        parts.go()
    weights = parts.go(resume=True)
    assert parts.losses == whole.losses and all(torch.equal(weights[name], value) for name, value in expected.items())
    assert all(torch.equal(a, b) for a, b in zip(parts.judge.parameters(), whole.judge.parameters(), strict=True))


# --- grids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_grid_lays_pictures_out_row_by_row(channels: int, mode: str) -> None:
    images = torch.stack([torch.full((2, 3, channels), 10 * (i + 1), dtype=torch.uint8) for i in range(5)])
    picture = grid(images, columns=2, scale=2)
    assert picture.mode == mode and picture.size == (2 * 3 * 2, 3 * 2 * 2)
    corners = [picture.getpixel((6 * (i % 2), 4 * (i // 2))) for i in range(6)]
    assert [c if channels == 1 else c[0] for c in corners] == [10, 20, 30, 40, 50, 0]
