"""Jobs of several checkpoints on one engine: they share the time, and wait for what is being loaded."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from tests.worker.engines import assert_empty, drain, ends, images, pictures, start
from worker.engine import Engine
from worker.protocol import GenerationRequest
from worker.runner import Runner

MakeRequest = Callable[..., GenerationRequest]


# --- several checkpoints -----------------------------------------------------------------------------------------------


class Two:
    """Two models, each with a checkpoint that is there once it was polled for `ready_after` times."""

    crowded = False

    def __init__(self, runners: dict[str, Runner], ready_after: int = 0) -> None:
        self.runners, self.polls_left, self.busy = runners, ready_after, list[set[str]]()

    def records(self) -> list[Any]:
        return []

    def runner(self, model: str, checkpoint: str) -> Runner | None:
        return None if self.polls_left > 0 else self.runners[checkpoint]

    def poll(self, busy: set[str]) -> None:
        self.polls_left -= 1
        self.busy.append(busy)


@pytest.fixture
def two(runner: Runner, make_runner: Callable[..., Runner]) -> dict[str, Runner]:
    other = make_runner(seed=5)
    other.checkpoint.hash = "cd" * 32
    return {each.checkpoint.hash: each for each in (runner, other)}


def test_two_checkpoints_share_the_time_and_each_picture_is_its_checkpoints(two: dict[str, Runner], make_request: MakeRequest) -> None:
    trace: list[dict[str, Any]] = []
    engine = Engine(Two(two), lambda entry: trace.append(entry) if entry["pictures"] else None)
    request = make_request(class_labels=(0, 1, 2), steps=6)
    for identity in two:
        engine.add(identity, replace(request, model=identity), identity)
    arrived = images(drain(engine))
    assert [entry["checkpoint"] for entry in trace] == [*two] * 6, "turn by turn"
    for identity, runner in two.items():
        alone = pictures(runner, {identity: replace(request, model="tiny")})
        assert [pixels_of(arrived[identity, i]) for i in range(3)] == [pixels_of(alone[identity, i]) for i in range(3)]
    assert pixels_of(arrived["ab" * 32, 0]) != pixels_of(arrived["cd" * 32, 0])


def pixels_of(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).tobytes()


def test_a_late_checkpoint_gets_its_turn_at_once_and_a_lane_without_jobs_goes(two: dict[str, Runner], make_request: MakeRequest) -> None:
    trace: list[dict[str, Any]] = []
    engine, (one, other) = Engine(Two(two), trace.append), two
    engine.add("a", make_request(steps=8), one)
    for _ in range(3):
        engine.tick()
    engine.add("b", make_request(steps=1, model="other"), other)
    engine.tick()
    assert trace[-1]["checkpoint"] == other and {*engine.lanes} == {one, other}
    drain(engine)
    assert_empty(engine)


def test_a_lane_without_jobs_goes_also_where_no_tick_comes(runner: Runner, make_request: MakeRequest) -> None:
    """Else an idle worker would keep a model that has made room for another."""
    engine = start(runner, {"a": make_request(), "b": make_request(steps=9)})
    for _ in range(4):
        engine.tick()
    engine.rest()
    assert len(engine.lanes) == 1, "while one of them runs"
    drain(engine)
    engine.rest()
    assert not engine.lanes


def test_a_job_waits_for_its_checkpoint_while_others_run_and_no_second_one_of_its_model_is_wanted(
    two: dict[str, Runner], make_request: MakeRequest
) -> None:
    models = Two(two)
    engine, (one, other) = Engine(models), two
    engine.add("a", make_request(steps=2), one)
    models.polls_left = 4
    engine.add("b", make_request(model="other", class_labels=(0, 1)), other)
    assert engine.wants("tiny") and not engine.wants("other") and engine.progress("b") == 0.0
    events = drain(engine)
    assert ends(events) == {"a": "done", "b": "done"} and len(images(events)) == 3
    assert models.busy[0] == {one, other}, "what a job waits for is not given up for another"
    assert engine.wants("other")


def test_a_job_that_turns_out_wrong_when_its_checkpoint_is_there_fails_alone(two: dict[str, Runner], make_request: MakeRequest) -> None:
    models = Two(two, ready_after=2)
    engine, (one, other) = Engine(models), two
    engine.add("good", make_request(), one)
    engine.add("bad", make_request(model="other", class_labels=(9,)), other)
    events = drain(engine)
    assert ends(events) == {"good": "done", "bad": "class labels are 0 … 3, got 9"}
    assert_empty(engine)


def test_a_job_removed_before_its_checkpoint_is_there_leaves_no_trace(two: dict[str, Runner], make_request: MakeRequest) -> None:
    engine = Engine(Two(two, ready_after=100))
    engine.add("gone", make_request(), next(iter(two)))
    engine.tick()
    engine.remove("gone")
    assert_empty(engine)


def test_no_job_is_wanted_while_a_checkpoint_waits_for_memory(two: dict[str, Runner]) -> None:
    models = Two(two)
    engine = Engine(models)
    assert engine.wants("tiny")
    models.crowded = True
    assert not engine.wants("tiny") and not engine.wants("other")
