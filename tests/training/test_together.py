"""Several processes train what one would, by gloo: the same losses, the same stops, states that any number of them reads."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from model import checkpoint as checkpoints
from tests.training.together import stop_this_process, together
from tests.training.toy import Duel, Run
from training import state
from training.config import Execution, Recipe, load_recipe
from training.stopping import Interrupted
from training.train_dit import train_dit
from training.train_vae import train_vae
from training.world import World

STEPS = 20
Outcome = tuple[dict[int, float], dict[str, Tensor]]
WAYS = {"replicated": {}, "in micro-batches": {"micro_batch_size": 1}, "spread": {"shard": True}}


def run(
    folder: Path, kind: type[Run], *, resume: bool = False, stop_in: int = -1, bad_in: int = -1, save_every: int = 100, **how: Any
) -> Outcome:
    """A process' own losses by step, and the weights, or none if the run was stopped: asked for in step 7 in process `stop_in`."""
    toy = kind(folder, Execution(tensorboard=False, **how), steps=STEPS, save_every=save_every)
    rank = int(os.environ.get("RANK", "0"))
    if rank == stop_in:
        toy.at[6] = stop_this_process
    if rank == bad_in:
        toy.bad = lambda step: math.nan if step == 12 else 0.0
    try:
        return toy.losses, toy.go(resume=resume)
    except Interrupted:
        return toy.losses, {}


def in_two(*arguments: Any, **named: Any) -> list[Outcome]:
    return together(2, _call, run, arguments, named)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return function(*arguments, **named)


def mean_losses(outcomes: list[Outcome]) -> list[float]:
    """Of the whole batch, in micro-batches too: a toy remembers the last one's alone, so compare only whole shares."""
    return [sum(losses[step] for losses, _ in outcomes) / len(outcomes) for step in sorted(outcomes[0][0])]


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def logged(folder: Path) -> list[float]:
    return [line["loss"] for line in log(folder) if "loss" in line]


def close(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(weights[name], value, rtol=1e-5, atol=1e-6) for name, value in expected.items())


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_two_processes_have_the_losses_of_one(tmp_path: Path, how: dict[str, Any]) -> None:
    alone = run(tmp_path / "one", Run)
    both = in_two(tmp_path / "two", Run, **how)
    if "micro_batch_size" not in how:
        assert mean_losses(both) == pytest.approx(mean_losses([alone]), rel=1e-5)
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-5)
    assert close(both[0][1], alone[1])
    assert [line["processes"] for line in log(tmp_path / "two") if line.get("event") == "start"] == [2]  # one process logs


@pytest.mark.parametrize("how", [WAYS["replicated"], WAYS["spread"]], ids=["replicated", "spread"])
def test_a_run_of_two_processes_resumes_as_if_it_had_never_stopped(tmp_path: Path, how: dict[str, Any]) -> None:
    """One of the two is told to stop; they agree on the step."""
    whole = in_two(tmp_path / "whole", Run, **how)
    first = in_two(tmp_path / "parts", Run, stop_in=1, **how)
    assert sorted(first[0][0]) == sorted(first[1][0]) == list(range(10)) and not first[0][1]
    second = in_two(tmp_path / "parts", Run, resume=True, **how)
    for rank in range(2):
        assert first[rank][0] | second[rank][0] == whole[rank][0]
    assert all(torch.equal(second[0][1][name], value) for name, value in whole[0][1].items())


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, {}), (1, {})), ((1, {}), (2, {})), ((2, {"shard": True}), (1, {})), ((1, {}), (2, {"shard": True}))],
    ids=["2 to 1", "1 to 2", "2 spread to 1", "1 to 2 spread"],
)
def test_a_state_is_read_by_another_number_of_processes(
    tmp_path: Path, before: tuple[int, dict[str, Any]], after: tuple[int, dict[str, Any]]
) -> None:
    expected = run(tmp_path / "whole", Run)
    for (size, how), stop_in, resume in ((before, 0, False), (after, -1, True)):
        named = {"stop_in": stop_in, "resume": resume, **how}
        outcomes = in_two(tmp_path / "parts", Run, **named) if size == 2 else [run(tmp_path / "parts", Run, **named)]
    assert logged(tmp_path / "parts") == pytest.approx(logged(tmp_path / "whole"), rel=1e-5)
    assert close(outcomes[0][1], expected[1])


@pytest.mark.parametrize("how", [WAYS["replicated"], WAYS["spread"]], ids=["replicated", "spread"])
def test_a_loss_that_is_not_finite_in_one_process_is_left_out_in_all(tmp_path: Path, how: dict[str, Any]) -> None:
    alone = run(tmp_path / "one", Run, bad_in=0)
    both = in_two(tmp_path / "two", Run, bad_in=1, **how)
    rollback = next(line for line in log(tmp_path / "two") if line.get("event") == "rollback")
    assert (rollback["step"], rollback["to"], rollback["reason"]) == (13, 12, "on another process")
    assert close(both[0][1], alone[1])


def test_two_networks_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    alone = run(tmp_path / "one", Duel)
    both = in_two(tmp_path / "two", Duel)
    assert mean_losses(both) == pytest.approx(mean_losses([alone]), rel=1e-5)
    assert close(both[0][1], alone[1])


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 4 cannot be shared evenly by 3 processes"):
        World(0, 3, torch.device("cpu")).share(4)
    assert [World(rank, 2, torch.device("cpu")).share(4) for rank in range(2)] == [slice(0, 2), slice(2, 4)]


RECIPE = """
[data]
image_size = 16
image_channels = 1
[vae]
latent_channels = 4
block_out_channels = [8, 16]
layers_per_block = 1
norm_num_groups = 4
mid_block_attention = false
kl_weight = 1e-3
[vae.optimiser]
steps = 1
batch_size = 8
learning_rate = 1e-3
final_learning_rate = 1e-3
warmup_steps = 0
[dit]
patch_size = 2
hidden_size = 32
depth = 2
num_heads = 2
objective = "flow"
learn_sigma = false
[dit.optimiser]
steps = 1_000_000
batch_size = 8
learning_rate = 1e-3
final_learning_rate = 1e-3
warmup_steps = 0
[defaults]
steps = 4
guidance_scale = 2.0
sampler = "euler"
"""


def test_the_command_under_torchrun_stops_and_saves_when_torchrun_is_told_to(tmp_path: Path, make_idx_folder: Callable[..., Path]) -> None:
    recipe, data, out = tmp_path / "endless.toml", make_idx_folder(tmp_path / "data"), tmp_path / "dit"
    recipe.write_text(RECIPE)
    vae = train_vae(load_recipe(str(recipe)), data, tmp_path / "vae")
    scripts = Path(sys.executable).parent
    train = ["train", "dit", str(recipe), "--data", str(data), "--vae", str(vae), "--out", str(out), "--no-tensorboard"]
    command = [str(scripts / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python", str(scripts / "dit"), *train]
    with (tmp_path / "said").open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as torchrun:
        try:
            deadline = time.monotonic() + 240
            while not (out / "log.jsonl").is_file() or not logged(out):
                assert torchrun.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
                time.sleep(0.2)
            torchrun.send_signal(signal.SIGTERM)
            torchrun.wait(240)
        finally:
            torchrun.terminate()
    stopped = log(out)[-1]
    assert stopped["event"] == "interrupted" and log(out)[0]["processes"] == 2
    newest = state.newest(out)
    assert newest and int(newest.name) == stopped["step"]


def killed_while_saving(folder: Path) -> None:
    """By the system, in the second of two saves, when its tensors lie on the disk and nothing says yet that they are all."""
    save, calls = dcp.save, []

    def last(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        calls.append(named)
        if len(calls) == 3:  # one before the first step
            os.kill(os.getpid(), signal.SIGKILL)

    dcp.save = last
    run(folder, Run, save_every=4)


def test_a_process_that_is_killed_while_it_saves_loses_nothing_saved(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Run, save_every=4)
    with pytest.raises(EOFError):
        together(1, killed_while_saving, tmp_path / "killed")
    assert sorted(path.name for path in (tmp_path / "killed" / "state").iterdir()) == ["00000004", "00000008.tmp"]
    losses, weights = run(tmp_path / "killed", Run, resume=True, save_every=4)
    assert sorted(losses) == list(range(4, STEPS)) and losses.items() <= whole[0].items()
    assert all(torch.equal(weights[name], value) for name, value in whole[1].items())


@pytest.mark.parametrize("how", [{}, {"shard": True, "activation_checkpointing": True}], ids=["replicated", "spread"])
def test_both_stages_in_two_processes_are_those_of_one(
    tmp_path: Path, make_idx_folder: Callable[..., Path], tiny_recipe: Callable[..., Recipe], how: dict[str, Any]
) -> None:
    recipe, data = tiny_recipe(steps=10, precision="float32"), make_idx_folder(tmp_path / "data")
    recipe = replace(recipe, defaults=replace(recipe.defaults, dtype="float32"))
    train_dit(recipe, data, train_vae(recipe, data, tmp_path / "one" / "vae"), tmp_path / "one" / "dit")
    execution, two = Execution(micro_batch_size=2, tensorboard=False, **how), tmp_path / "two"
    together(2, _call, train_vae, (recipe, data, two / "vae"), {"execution": replace(execution, shard=False)})
    together(2, _call, train_dit, (recipe, data, tmp_path / "one" / "vae", two / "dit"), {"execution": execution})
    for stage in ("vae", "dit"):
        assert logged(tmp_path / "two" / stage) == pytest.approx(logged(tmp_path / "one" / stage), rel=1e-5)
    one, two = (checkpoints.load(tmp_path / name / "dit" / "checkpoint").dit.state_dict() for name in ("one", "two"))
    assert all(torch.allclose(two[name], value, rtol=1e-4, atol=1e-5) for name, value in one.items())
