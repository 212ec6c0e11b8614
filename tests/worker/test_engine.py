"""Many jobs at once: each ends by itself, fails by itself, and gets every picture once."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.engine import Engine, Event, ImageReady, JobDone
from worker.protocol import GenerationRequest
from worker.runner import Runner
from worker.scheduler import Picture

MakeRequest = Callable[..., GenerationRequest]
Jobs = dict[str, GenerationRequest]


def drain(engine: Engine, before_tick: Callable[[int], None] = lambda tick: None) -> list[tuple[int, Event]]:
    """Tick until nothing is left → (tick, event)."""
    events: list[tuple[int, Event]] = []
    tick = 0
    while engine.busy:
        before_tick(tick)
        events += [(tick, event) for event in engine.tick()]
        tick += 1
        assert tick < 1000, "the engine does not come to an end"
    return events


def start(runner: Runner, jobs: Jobs) -> Engine:
    engine = Engine(runner)
    for name, request in jobs.items():
        engine.add(name, request)
    return engine


def images(events: list[tuple[int, Event]]) -> dict[tuple[str, int], bytes]:
    return {(event.job_id, event.index): event.png for _, event in events if isinstance(event, ImageReady)}


def ends(events: list[tuple[int, Event]]) -> dict[str, str]:
    """Job → how it ended; each ends once."""
    found = [
        (event.job_id, "done" if isinstance(event, JobDone) else event.message) for _, event in events if not isinstance(event, ImageReady)
    ]
    assert len({name for name, _ in found}) == len(found), "a job ended twice"
    return dict(found)


def assert_empty(engine: Engine) -> None:
    """Nothing of any job is left."""
    assert not engine.busy and not engine.scheduler.jobs and not engine._encoding and not engine._delivered
    assert sorted(engine.scheduler.free_slots) == list(range(engine.runner.max_rows))


@pytest.fixture
def runner(make_runner: Callable[..., Runner]) -> Runner:
    return make_runner(max_rows=16)


@pytest.fixture
def three_jobs(make_request: MakeRequest) -> Jobs:
    return {
        "two steps": make_request(steps=2, class_labels=(0, 1)),
        "nine steps": make_request(steps=9, seed=50, guidance_scale=1.0),
        "five steps": make_request(steps=5, class_labels=(2, None, 1), seed=90),
    }


def test_jobs_of_different_steps_end_independently_and_early_ones_leave_at_once(runner: Runner, three_jobs: Jobs) -> None:
    engine = start(runner, three_jobs)
    running: list[set[str]] = []
    events = drain(engine, lambda tick: running.append({p.job.id for p in engine.scheduler.batch()}))
    assert running[1:] == [{*three_jobs}] + [{"nine steps", "five steps"}] * 3 + [{"nine steps"}] * 4
    assert ends(events) == dict.fromkeys(three_jobs, "done")
    assert_empty(engine)


def test_every_picture_arrives_once_and_before_the_end_of_its_job(runner: Runner, three_jobs: Jobs) -> None:
    events = [event for _, event in drain(start(runner, three_jobs))]
    arrived = Counter((event.job_id, event.index) for event in events if isinstance(event, ImageReady))
    assert arrived == {(name, i): 1 for name, request in three_jobs.items() for i in range(request.num_images)}
    for name in three_jobs:
        mine = [event for event in events if event.job_id == name]
        assert isinstance(mine[-1], JobDone)


def test_a_picture_comes_with_its_seed_and_the_hash_of_its_bytes(runner: Runner, make_request: MakeRequest) -> None:
    for _, event in drain(start(runner, {"a": make_request(class_labels=(0, 1, 2), seed=40)})):
        if isinstance(event, ImageReady):
            assert event.seed == 40 + event.index
            assert event.sha256 == hashlib.sha256(event.png).hexdigest()


def test_more_pictures_than_slots_all_get_done(runner: Runner, make_request: MakeRequest) -> None:
    engine = start(runner, {"large": make_request(class_labels=(0, 1, 2, 3) * 10, steps=2)})
    events = drain(engine)
    assert len(images(events)) == 40
    assert events[-1][0] == 9, "8 guided pictures at once, 5 rounds of 2 steps"
    assert_empty(engine)


def test_late_request_joins_the_running_batch(runner: Runner, make_request: MakeRequest) -> None:
    engine = start(runner, {"early": make_request(steps=8)})

    def join(tick: int) -> None:
        if tick == 3:
            engine.add("late", make_request(steps=2, seed=99))

    events = drain(engine, join)
    assert max(tick for tick, _ in events) == 7, "the early one waited for nobody"
    assert images(events)["late", 0] == images(drain(start(runner, {"x": make_request(steps=2, seed=99)})))["x", 0]


def test_progress_rises_from_nothing_to_everything(runner: Runner, make_request: MakeRequest) -> None:
    engine = start(runner, {"a": make_request(steps=4, class_labels=(0, 1))})
    seen: list[float] = []
    drain(engine, lambda tick: seen.append(engine.progress("a")))
    assert seen == [0.0, 0.25, 0.5, 0.75]
    assert engine.progress("a") == 1.0, "a job that has left is done"


def throwing_on(runner: Runner, bad_class: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The forward of a device that cannot bear a class."""
    forward = runner._forward

    def run(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if (y == bad_class).any():
            raise RuntimeError(f"class {bad_class} is too much")
        return forward(x, t, y)

    return run


def test_a_job_whose_step_throws_fails_alone(runner: Runner, three_jobs: Jobs, make_request: MakeRequest) -> None:
    clean = images(drain(start(runner, three_jobs)))
    runner._forward = throwing_on(runner, bad_class=3)
    engine = start(runner, {"bad": make_request(class_labels=(0, 3, 0), steps=7), **three_jobs})
    events = drain(engine)
    assert ends(events) == {"bad": "the step failed: class 3 is too much", **dict.fromkeys(three_jobs, "done")}
    assert images(events) == clean, "its neighbours have the same pictures, bit for bit"
    assert_empty(engine)


def test_a_job_that_throws_in_the_middle_fails_alone_and_loses_no_neighbour_a_step(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest
) -> None:
    clean = images(drain(start(runner, three_jobs)))
    whole, broken = runner._forward, throwing_on(runner, bad_class=3)
    engine = start(runner, {**three_jobs, "bad": make_request(class_labels=(3,), steps=7)})

    def break_down(tick: int) -> None:
        runner._forward = whole if tick < 3 else broken

    events = drain(engine, break_down)
    assert ends(events)["bad"].startswith("the step failed")
    assert max(tick for tick, _ in events) == 8, "nine steps took nine ticks"
    assert images(events) == clean
    assert_empty(engine)


def test_every_job_fails_when_every_step_throws(runner: Runner, three_jobs: Jobs) -> None:
    def broken(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    runner._forward = broken
    engine = start(runner, three_jobs)
    assert ends(drain(engine)) == dict.fromkeys(three_jobs, "the step failed: out of memory")
    assert_empty(engine)


def test_a_job_that_leaves_the_finite_numbers_fails_alone(runner: Runner, three_jobs: Jobs, make_request: MakeRequest) -> None:
    clean = images(drain(start(runner, three_jobs)))
    engine = start(runner, {"bad": make_request(class_labels=(0, 1), steps=3), **three_jobs})

    def poison(tick: int) -> None:
        if tick == 1:
            runner.state[engine.scheduler.jobs["bad"].running[1].slot] = torch.nan

    events = drain(engine, poison)
    assert ends(events) == {"bad": "picture 1 left the finite numbers", **dict.fromkeys(three_jobs, "done")}
    assert {key: png for key, png in images(events).items() if key[0] != "bad"} == clean
    assert_empty(engine)


@pytest.mark.parametrize("when", [0, 1, 4])
def test_a_job_removed_in_mid_flight_leaves_no_trace(runner: Runner, three_jobs: Jobs, make_request: MakeRequest, when: int) -> None:
    clean = images(drain(start(runner, three_jobs)))
    engine = start(runner, {"gone": make_request(steps=6, class_labels=(0,) * 20), **three_jobs})

    def remove(tick: int) -> None:
        if tick == when:
            engine.remove("gone")
            assert len(engine.scheduler.free_slots) + len(engine.scheduler.batch()) == 16

    events = drain(engine, remove)
    assert ends(events) == dict.fromkeys(three_jobs, "done")
    assert images(events) == clean
    assert_empty(engine)


def test_a_removed_job_may_come_back(runner: Runner, make_request: MakeRequest) -> None:
    request = make_request(class_labels=(0, 1), steps=4)
    clean = images(drain(start(runner, {"a": request})))
    engine = start(runner, {"a": request})

    def again(tick: int) -> None:
        if tick == 2:
            engine.remove("a")
            engine.add("a", request)

    assert images(drain(engine, again)) == clean


@pytest.mark.parametrize("change", [{"sampler": "ddpm"}, {"sampler": ""}, {"class_labels": (0, 4)}, {"steps": 1001}], ids=str)
def test_what_the_model_cannot_do_is_refused_at_the_door_and_nothing_is_lost(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, change: dict[str, object]
) -> None:
    engine = start(runner, three_jobs)
    engine.tick()
    with pytest.raises(ValueError):
        engine.add("bad", make_request(**change))
    assert "bad" not in engine.requests and "bad" not in engine.scheduler.jobs
    assert ends(drain(engine)) == dict.fromkeys(three_jobs, "done")
    assert_empty(engine)


def test_an_empty_engine_ticks_for_nothing(runner: Runner) -> None:
    engine = Engine(runner)
    assert engine.tick() == [] and not engine.busy and engine.wants_jobs


def test_the_same_request_gives_the_same_bytes_under_any_name_and_beside_any_job(runner: Runner, three_jobs: Jobs) -> None:
    alone = {name: images(drain(start(runner, {"x": request}))) for name, request in three_jobs.items()}
    crowd = images(drain(start(runner, {**three_jobs, **{f"{n} again": replace(r, seed=r.seed + 1000) for n, r in three_jobs.items()}})))
    for name, pictures in alone.items():
        assert {index: png for (_, index), png in pictures.items()} == {i: png for (n, i), png in crowd.items() if n == name}


def test_one_decoder_batch_a_tick_while_others_go_on(runner: Runner, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where decoding takes seconds, leases must be renewed in between; the slots of those that wait keep their latents."""
    jobs = {"five": make_request(steps=1, class_labels=(0, 1, 2, 3, None), guidance_scale=1.0), "one": make_request(steps=6, seed=99)}
    expected = images(drain(start(runner, jobs)))
    runner.decode_buckets = [2]
    sizes: list[int] = []
    decode = runner.decode

    def counting(pictures: Sequence[Picture]) -> list[np.ndarray | None]:
        sizes.append(len(pictures))
        return decode(pictures)

    monkeypatch.setattr(runner, "decode", counting)
    engine = start(runner, jobs)
    steps: list[int] = []
    events = drain(engine, lambda tick: steps.extend(p.evaluation for p in engine.scheduler.batch() if p.job.id == "one"))
    assert sizes == [2, 2, 1, 1] and steps == [1, 2, 3, 4, 5]
    assert images(events) == expected and ends(events) == {"five": "done", "one": "done"}
    assert_empty(engine)
