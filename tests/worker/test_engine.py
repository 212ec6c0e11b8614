"""Many jobs at once: each ends by itself and gets every picture once."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from tests.worker.engines import Jobs, assert_empty, drain, ends, images, pictures, start, traced
from worker.engine import ImageReady, JobDone
from worker.protocol import GenerationRequest
from worker.runner import Runner
from worker.scheduler import Picture

MakeRequest = Callable[..., GenerationRequest]


# --- the loop ----------------------------------------------------------------------------------------------------------


def test_jobs_of_different_steps_end_independently_and_early_ones_leave_at_once(runner: Runner, three_jobs: Jobs) -> None:
    engine, trace = traced(runner, three_jobs)
    events = drain(engine)
    running = [{job for job, _, _ in entry["steps"]} for entry in trace]
    assert running == [{*three_jobs}] * 2 + [{"nine steps", "five steps"}] * 3 + [{"nine steps"}] * 4
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
    events = drain(start(runner, {"a": make_request(class_labels=(0, 1, 2), seed=40)}))
    ready = [event for _, event in events if isinstance(event, ImageReady)]
    assert {event.index: event.seed for event in ready} == {0: 40, 1: 41, 2: 42}
    assert all(event.sha256 == hashlib.sha256(event.png).hexdigest() for event in ready)


def test_more_pictures_than_rows_all_get_done_with_every_row_in_use(runner: Runner, make_request: MakeRequest) -> None:
    engine, trace = traced(runner, {"large": make_request(class_labels=(0, 1, 2, 3) * 10, steps=2)})
    assert len(images(drain(engine))) == 40
    assert [entry["rows"] for entry in trace] == [16] * 10, "8 guided pictures at once, 5 rounds of 2 steps"
    assert_empty(engine)


def test_a_late_job_steps_at_the_next_tick_under_a_job_of_64(runner: Runner, make_request: MakeRequest) -> None:
    late, large = make_request(steps=5, seed=99), make_request(class_labels=(0, 1, 2, 3) * 16, steps=12)
    engine, trace = traced(runner, {"large": large})

    def join(tick: int) -> None:
        if tick == 3:
            assert engine.wants("tiny")
            engine.add("late", late, runner.checkpoint.hash)

    events = drain(engine, join)
    assert [i for i, entry in enumerate(trace) if any(job == "late" for job, _, _ in entry["steps"])] == [3, 4, 5, 6, 7]
    assert [len(entry["steps"]) for entry in trace[:9]] == [8] * 9, "one picture of the large job pauses"
    assert images(events) == {**pictures(runner, {"large": large}), **pictures(runner, {"late": late})}


def test_progress_rises_from_nothing_to_everything(runner: Runner, make_request: MakeRequest) -> None:
    engine = start(runner, {"a": make_request(steps=4, class_labels=(0, 1))})
    seen: list[float] = []
    drain(engine, lambda tick: seen.append(engine.progress("a")))
    assert seen[:4] == [0.0, 0.25, 0.5, 0.75] and set(seen[4:]) <= {1.0}
    assert engine.progress("a") == 1.0, "a job that has left is done"


def test_an_empty_engine_ticks_for_nothing(runner: Runner) -> None:
    engine, trace = traced(runner, {})
    assert engine.tick() == [] and not engine.busy and engine.wants("tiny") and trace == []


def test_the_same_request_gives_the_same_bytes_under_any_name_and_beside_any_job(runner: Runner, three_jobs: Jobs) -> None:
    crowd = pictures(runner, {**three_jobs, **{f"{n} again": replace(r, seed=r.seed + 1000) for n, r in three_jobs.items()}})
    for name, request in three_jobs.items():
        alone = {i: png for (_, i), png in pictures(runner, {"x": request}).items()}
        assert alone == {i: png for (n, i), png in crowd.items() if n == name}


def test_no_other_job_is_wanted_beside_one_that_runs_alone(runner: Runner, make_request: MakeRequest) -> None:
    engine = start(runner, {})
    engine.add("dangerous", make_request(), runner.checkpoint.hash, alone=True)
    assert not engine.wants("tiny")
    drain(engine)
    assert engine.wants("tiny")


def test_a_watchdog_sees_since_when_a_tick_is_running(runner: Runner, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, step = start(runner, {"a": make_request(steps=1)}), runner.step
    seen: list[float | None] = [engine.ticking_since]

    def watched(group: Sequence[Picture]) -> None:
        seen.append(engine.ticking_since)
        step(group)

    monkeypatch.setattr(runner, "step", watched)
    engine.tick()
    assert seen[0] is None and seen[1] is not None and engine.ticking_since is None
    assert engine.slowest_tick_s == runner.slowest_tick_s > 0
    monkeypatch.setattr(engine.models, "poll", lambda busy: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.tick()
    assert engine.ticking_since is None


def test_the_trace_tells_what_each_tick_did(runner: Runner, make_request: MakeRequest) -> None:
    jobs = {"a": make_request(steps=2, class_labels=(0, None)), "b": make_request(steps=1, guidance_scale=1.0)}
    engine, trace = traced(runner, jobs)
    drain(engine)
    assert [entry["t"] for entry in trace] == sorted(entry["t"] for entry in trace) and all(entry["seconds"] > 0 for entry in trace)
    keys = ("checkpoint", "rows", "bucket", "pictures", "jobs", "decoded", "steps")
    first, second = ({key: entry[key] for key in keys} for entry in trace)
    identity = runner.checkpoint.hash
    assert {**first, "steps": sorted(first["steps"])} == {
        **{"checkpoint": identity, "rows": 4, "bucket": 4, "pictures": 3, "jobs": 2, "decoded": 1},
        "steps": [("a", 0, 0), ("a", 1, 0), ("b", 0, 0)],
    }
    assert second == {
        **{"checkpoint": identity, "rows": 3, "bucket": 3, "pictures": 2, "jobs": 1, "decoded": 2},
        "steps": [("a", 0, 1), ("a", 1, 1)],
    }


# --- jobs that go ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [0, 1, 4])
def test_a_job_removed_in_mid_flight_leaves_no_trace(runner: Runner, three_jobs: Jobs, make_request: MakeRequest, when: int) -> None:
    clean = pictures(runner, three_jobs)
    engine = start(runner, {"gone": make_request(steps=6, class_labels=(0,) * 20), **three_jobs})
    (lane,) = engine.lanes.values()

    def remove(tick: int) -> None:
        if tick == when:
            engine.remove("gone")
            held = [picture for job in lane.scheduler.jobs.values() for picture in job.running]
            assert len(lane.scheduler.free_slots) + len(held) == runner.slots

    events = drain(engine, remove)
    assert ends(events) == dict.fromkeys(three_jobs, "done")
    assert images(events) == clean
    assert_empty(engine)


def test_a_removed_job_may_come_back(runner: Runner, make_request: MakeRequest) -> None:
    request = make_request(class_labels=(0, 1), steps=4)
    clean = pictures(runner, {"a": request})
    engine = start(runner, {"a": request})

    def again(tick: int) -> None:
        if tick == 2:
            engine.remove("a")
            engine.add("a", request, runner.checkpoint.hash)

    assert images(drain(engine, again)) == clean


@pytest.mark.parametrize("change", [{"sampler": "ddpm"}, {"sampler": ""}, {"class_labels": (0, 4)}, {"steps": 1001}], ids=str)
def test_what_the_model_cannot_do_is_refused_at_the_door_and_nothing_is_lost(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, change: dict[str, object]
) -> None:
    engine = start(runner, three_jobs)
    engine.tick()
    with pytest.raises(ValueError):
        engine.add("bad", make_request(**change), runner.checkpoint.hash)
    assert "bad" not in engine.jobs and all("bad" not in lane.scheduler.jobs for lane in engine.lanes.values())
    assert ends(drain(engine)) == dict.fromkeys(three_jobs, "done")
    assert_empty(engine)


@pytest.mark.parametrize(("model", "checkpoint"), [("tiny", "cd" * 32), ("other", "ab" * 32)])
def test_a_checkpoint_that_is_not_here_is_refused_at_the_door(
    runner: Runner, make_request: MakeRequest, model: str, checkpoint: str
) -> None:
    engine = start(runner, {})
    with pytest.raises(ValueError, match=f"checkpoint {checkpoint[:12]} of {model} is not here, only abababababab of tiny"):
        engine.add("a", make_request(model=model), checkpoint)
    assert not engine.busy
