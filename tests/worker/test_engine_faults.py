"""What throws, runs out of memory or leaves the finite numbers is tried again, and fails alone: its neighbours are unchanged."""

from collections.abc import Callable, Sequence

import pytest
import torch

from tests.worker.engines import Jobs, assert_empty, drain, ends, images, pictures, slot_of, start, traced
from worker.protocol import GenerationRequest
from worker.runner import Runner
from worker.scheduler import Picture

MakeRequest = Callable[..., GenerationRequest]


# --- steps that throw --------------------------------------------------------------------------------------------------


def throw_in_steps(
    monkeypatch: pytest.MonkeyPatch, runner: Runner, when: Callable[[Sequence[Picture]], bool], error: Exception
) -> list[list[Picture]]:
    """A device that cannot bear some groups; returns those that it was given."""
    step, given = runner.step, list[list[Picture]]()

    def run(group: Sequence[Picture]) -> None:
        given.append(list(group))
        if when(group):
            raise error
        step(group)

    monkeypatch.setattr(runner, "step", run)
    return given


def of_class_3(group: Sequence[Picture]) -> bool:
    return any(picture.class_label == 3 for picture in group)


def test_a_job_whose_step_throws_fails_alone(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = pictures(runner, three_jobs)
    throw_in_steps(monkeypatch, runner, of_class_3, RuntimeError("class 3 is too much"))
    engine = start(runner, {"bad": make_request(class_labels=(0, 3, 0), steps=7), **three_jobs})
    events = drain(engine)
    assert ends(events) == {"bad": "the step failed: class 3 is too much", **dict.fromkeys(three_jobs, "done")}
    assert images(events) == clean, "its neighbours have the same pictures, bit for bit"
    assert_empty(engine)


def test_a_job_that_throws_in_the_middle_loses_no_neighbour_a_step(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = pictures(runner, three_jobs)
    throw_in_steps(monkeypatch, runner, lambda group: any(p.class_label == 3 and p.evaluation == 3 for p in group), RuntimeError("no"))
    engine, trace = traced(runner, {**three_jobs, "bad": make_request(class_labels=(3,), steps=7)})
    events = drain(engine)
    assert ends(events) == {"bad": "the step failed: no", **dict.fromkeys(three_jobs, "done")}
    assert [entry["steps"].count(("nine steps", 0, i)) for i, entry in enumerate(trace)] == [1] * 9
    assert images(events) == clean
    assert_empty(engine)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_step_that_throws_only_once_is_survived(runner: Runner, three_jobs: Jobs, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    clean = pictures(runner, three_jobs)
    given = throw_in_steps(monkeypatch, runner, lambda group: len(given) == at + 1, RuntimeError("a hiccup"))
    events = drain(start(runner, three_jobs))
    assert ends(events) == dict.fromkeys(three_jobs, "done") and images(events) == clean
    assert [len(group) for group in given[at + 1 : at + 1 + len(given[at])]] == [1] * len(given[at]), "each was tried alone"


def test_every_job_fails_when_every_step_throws(runner: Runner, three_jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    throw_in_steps(monkeypatch, runner, lambda group: True, RuntimeError("broken"))
    engine = start(runner, three_jobs)
    assert ends(drain(engine)) == dict.fromkeys(three_jobs, "the step failed: broken")
    assert_empty(engine)


@pytest.mark.parametrize("size", ["crowd", "alone"])
def test_a_device_that_answers_no_more_ends_the_worker_and_fails_no_job(
    runner: Runner, three_jobs: Jobs, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """In the crowd's step, or only when its pictures are tried alone."""
    given = throw_in_steps(monkeypatch, runner, lambda group: True, RuntimeError("an illegal memory access"))
    monkeypatch.setattr(runner, "healthy", lambda: size == "alone" and len(given) == 1)
    engine = start(runner, three_jobs)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.tick()
    assert len(given) == (1 if size == "crowd" else 2) and {*engine.jobs} == {*three_jobs}


# --- memory that runs out ----------------------------------------------------------------------------------------------


def rows_of(group: Sequence[Picture]) -> int:
    return sum(picture.rows for picture in group)


@pytest.mark.parametrize("fits", [8, 4])
def test_out_of_memory_in_a_step_halves_the_rows_and_everything_ends_with_the_same_bytes(
    runner: Runner, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fits: int
) -> None:
    jobs = {"a": make_request(class_labels=(0, 1, 2, 3, None), steps=5), "b": make_request(class_labels=(1,) * 4, steps=3, seed=60)}
    clean = pictures(runner, jobs)
    throw_in_steps(monkeypatch, runner, lambda group: rows_of(group) > fits, torch.OutOfMemoryError("CUDA out of memory."))
    engine, trace = traced(runner, jobs)
    events = drain(engine)
    assert ends(events) == dict.fromkeys(jobs, "done") and images(events) == clean
    assert runner.max_rows == fits and runner.buckets[-1] == fits and max(entry["rows"] for entry in trace[2:]) <= fits
    assert "out of memory in a step of 8 pictures" in caplog.text
    assert_empty(engine)


def test_out_of_memory_with_the_fewest_rows_fails_the_job_that_it_happens_to(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = pictures(runner, three_jobs)
    throw_in_steps(monkeypatch, runner, of_class_3, torch.OutOfMemoryError("CUDA out of memory."))
    events = drain(start(runner, {**three_jobs, "bad": make_request(class_labels=(3,))}))
    assert ends(events) == {"bad": "the step failed: CUDA out of memory.", **dict.fromkeys(three_jobs, "done")}
    assert images(events) == clean and runner.max_rows == 4


def test_out_of_memory_while_a_row_of_the_table_is_prepared_spoils_no_picture(
    runner: Runner, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, moved = {"a": make_request(class_labels=(0, 1, 2, 3), steps=5, shift=1.7)}, runner.prepared._moved
    calls: list[int] = []

    def failing_once(values: torch.Tensor) -> torch.Tensor:
        calls.append(len(values))
        if len(calls) == 3:  # after times and classes: the places of the rows
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return moved(values)

    monkeypatch.setattr(runner.prepared, "_moved", failing_once)
    events = drain(start(runner, job))
    assert ends(events) == {"a": "done"} and len(calls) > 3
    assert images(events) == pictures(runner, job)


# --- numbers that are none ---------------------------------------------------------------------------------------------


def test_a_picture_that_leaves_the_finite_numbers_once_is_retried_alone_and_is_the_same(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = {"hit": make_request(class_labels=(0, 1, 3), steps=4, seed=70), **three_jobs}
    clean = pictures(runner, jobs)
    retried: list[int] = []  # sizes of the forwards of what is tried again
    throw_in_steps(monkeypatch, runner, lambda group: any(p.attempt for p in group) and retried.append(len(group)), RuntimeError())
    engine, trace = traced(runner, jobs)

    def poison(tick: int) -> None:
        if tick == 2:
            runner.state[slot_of(engine, "hit", 1)] = torch.nan

    events = drain(engine, poison)
    assert ends(events) == dict.fromkeys(jobs, "done") and images(events) == clean
    steps = [evaluation for entry in trace for job, index, evaluation in entry["steps"] if (job, index) == ("hit", 1)]
    assert steps == [0, 1, 2, 0, 1, 2, 3]
    assert retried == [1] * 4, "in forwards of its own"
    assert "job hit: picture 1 left the finite numbers; it is tried again alone" in caplog.text
    assert_empty(engine)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_picture_that_leaves_the_finite_numbers_twice_fails_its_job_alone(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, steps: int
) -> None:
    clean = pictures(runner, three_jobs)
    engine = start(runner, {"bad": make_request(class_labels=(0, 1), steps=steps), **three_jobs})

    spoiled = spoil_starts(runner, lambda picture: picture.job.id == "bad" and picture.index == 1)
    events = drain(engine)
    assert spoiled == [0, 1], "both attempts"
    assert ends(events) == {"bad": "picture 1 left the finite numbers, also alone", **dict.fromkeys(three_jobs, "done")}
    assert {key: png for key, png in images(events).items() if key[0] != "bad"} == clean
    assert_empty(engine)


def spoil_starts(runner: Runner, which: Callable[[Picture], bool]) -> list[int]:
    """Pictures that begin with no numbers; returns the attempts that did."""
    begin, spoiled = runner.start, list[int]()

    def start_badly(beginning: Sequence[Picture]) -> None:
        begin(beginning)
        for picture in beginning:
            if which(picture):
                spoiled.append(picture.attempt)
                runner.state[picture.slot] = torch.nan

    runner.start = start_badly  # type: ignore[method-assign]
    return spoiled


def test_a_device_that_tells_late_and_twice_that_a_picture_was_lost_has_it_tried_again_once(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, which is ticks behind: by then the picture's slot is another's, and the decoder has told it too."""
    jobs = {"hit": make_request(class_labels=(0, 1), steps=2, seed=70), **three_jobs}
    clean = pictures(runner, jobs)
    lost, late = runner.lost, list[list[tuple[Picture, int]]]()

    def told_late() -> list[tuple[Picture, int]]:
        late.append(lost())
        return late[-3] if len(late) >= 3 else []

    monkeypatch.setattr(runner, "lost", told_late)
    engine, trace = traced(runner, jobs)

    def poison(tick: int) -> None:
        if tick == 1:
            runner.state[slot_of(engine, "hit", 1)] = torch.nan

    events = drain(engine, poison)
    assert sum(len(found) for found in late) == 1
    assert ends(events) == dict.fromkeys(jobs, "done") and images(events) == clean
    steps = [evaluation for entry in trace for job, index, evaluation in entry["steps"] if (job, index) == ("hit", 1)]
    assert steps == [0, 1, 0, 1]
