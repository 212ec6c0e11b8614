"""Which pictures step next: rows, slots, fairness. Without torch."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.scheduler import Job, Picture, Scheduler

ALWAYS, NEVER = [True] * 4, [False] * 4
INTERVAL = [False, True, True, False]


def job(name: str, images: int = 1, guided: list[bool] | None = None) -> Job:
    return Job(name, (0,) * images, seed=0, guidance_scale=2.0, guided=ALWAYS if guided is None else guided)


def scheduler_with(*jobs: Job, max_rows: int = 8) -> Scheduler:
    scheduler = Scheduler(max_rows)
    for entry in jobs:
        scheduler.add(entry)
    return scheduler


def tick(scheduler: Scheduler) -> list[Picture]:
    """What the engine does, without a device; returns the pictures that are done."""
    scheduler.admit()
    for picture in scheduler.batch():
        picture.evaluation += 1
    done = [picture for picture in scheduler.batch() if picture.done]
    for picture in done:
        scheduler.retire(picture)
    return done


def test_it_loads_no_torch() -> None:
    code = "import sys, worker.scheduler; print('torch' in sys.modules, 'redis' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False"] * 3


def test_a_forward_must_hold_one_guided_picture() -> None:
    with pytest.raises(ValueError, match=r"at least 2.*got 1"):
        Scheduler(1)


@pytest.mark.parametrize(("guided", "expected"), [(ALWAYS, 4), (NEVER, 8), (INTERVAL, 4)], ids=["guided", "unguided", "interval"])
def test_a_picture_that_is_ever_guided_takes_room_for_two_rows(guided: list[bool], expected: int) -> None:
    scheduler = scheduler_with(job("a", 20, guided), max_rows=8)
    assert len(scheduler.admit()) == expected
    assert scheduler.committed_rows == 8


def test_a_picture_costs_two_rows_only_while_it_is_guided() -> None:
    scheduler = scheduler_with(job("a", 1, INTERVAL))
    rows = []
    scheduler.admit()
    for picture in scheduler.batch():
        for _ in INTERVAL:
            rows.append(picture.rows)
            picture.evaluation += 1
    assert rows == [1, 2, 2, 1]


def test_an_odd_row_is_left_to_an_unguided_picture() -> None:
    scheduler = scheduler_with(job("guided", 3), job("plain", 3, NEVER), max_rows=5)
    assert Counter(picture.job.id for picture in scheduler.admit()) == {"guided": 2, "plain": 1}


def test_pictures_carry_their_label_and_seed() -> None:
    scheduler = scheduler_with(Job("a", (3, None, 1), seed=10, guidance_scale=1.0, guided=NEVER))
    assert [(p.index, p.class_label, p.seed) for p in scheduler.admit()] == [(0, 3, 10), (1, None, 11), (2, 1, 12)]


def test_jobs_of_one_arrival_share_the_room() -> None:
    scheduler = scheduler_with(job("a", 64), job("b", 64), max_rows=8)
    assert Counter(picture.job.id for picture in scheduler.admit()) == {"a": 2, "b": 2}


def test_a_late_job_of_one_image_starts_at_the_first_free_slot_under_a_job_of_64() -> None:
    scheduler = scheduler_with(job("large", 64), max_rows=8)
    tick(scheduler)
    scheduler.add(job("late"))
    assert scheduler.admit() == [], "no slot is free yet"
    while not tick(scheduler):
        pass
    assert "late" in {picture.job.id for picture in scheduler.admit()}


def test_a_guided_job_is_not_starved_by_unguided_pictures_that_end_one_by_one() -> None:
    scheduler = scheduler_with(max_rows=4)
    for offset in range(4):  # four unguided jobs out of step, so that never two rows come free at once
        scheduler.add(job(f"plain {offset}", 16, NEVER) if offset == 0 else job(f"plain {offset}", 1, [False] * offset))
        tick(scheduler)
    scheduler.add(job("guided"))
    ticks = 0
    while scheduler.jobs["guided"].finished == 0:
        tick(scheduler)
        ticks += 1
        assert ticks < 3 * len(ALWAYS), "it waits for more than the pictures that ran when it came"


def test_a_job_of_one_image_leaves_a_crowd_at_its_own_last_step() -> None:
    scheduler = scheduler_with(job("long", 2, [True] * 9), job("short", 1, [True] * 2))
    assert tick(scheduler) == []
    assert [picture.job.id for picture in tick(scheduler)] == ["short"]
    assert {picture.job.id for picture in scheduler.batch()} == {"long"}


def test_jobs_are_wanted_while_a_guided_picture_of_one_more_could_step() -> None:
    scheduler = scheduler_with(max_rows=4)
    assert scheduler.wants_jobs
    scheduler.add(job("a"))
    assert scheduler.wants_jobs, "two rows are left"
    scheduler.add(job("b"))
    assert not scheduler.wants_jobs, "both rows of the second are spoken for, though it has not started"
    scheduler.admit()
    assert not scheduler.wants_jobs
    scheduler.remove("a")
    assert scheduler.wants_jobs


def test_pictures_that_wait_behind_others_of_their_job_keep_no_job_out() -> None:
    scheduler = scheduler_with(job("large", 64), max_rows=4)
    scheduler.admit()
    assert not scheduler.wants_jobs, "its pictures fill every row"
    while not tick(scheduler):
        pass
    assert scheduler.wants_jobs, "62 of them wait still, and yet another job may come first"


def test_progress_is_the_share_of_all_evaluations() -> None:
    large = job("a", 4)
    scheduler = scheduler_with(large, max_rows=4)  # two at once
    seen = [large.progress]
    while large.finished < 4:
        tick(scheduler)
        seen.append(large.progress)
    assert seen == [i / 8 for i in range(9)]


def test_slots_are_used_again() -> None:
    scheduler = scheduler_with(job("a", 20), max_rows=4)
    used = set()
    while scheduler.jobs["a"].finished < 20:
        scheduler.admit()
        used |= {picture.slot for picture in scheduler.batch()}
        tick(scheduler)
    assert len(used) == 2
    assert sorted(scheduler.free_slots) == [0, 1, 2, 3]


def test_removing_a_job_frees_its_slots_and_forgets_its_waiting_pictures() -> None:
    scheduler = scheduler_with(job("a", 20), max_rows=4)
    tick(scheduler)
    scheduler.remove("a")
    assert scheduler.batch() == scheduler.admit() == []
    assert scheduler.committed_rows == 0
    assert sorted(scheduler.free_slots) == [0, 1, 2, 3]


def test_removing_an_unknown_job_does_nothing() -> None:
    scheduler = scheduler_with(job("a"))
    scheduler.remove("b")
    assert len(scheduler.admit()) == 1


def test_a_job_cannot_be_added_over_itself() -> None:
    scheduler = scheduler_with(job("a"))
    with pytest.raises(AssertionError, match="slots would be lost"):
        scheduler.add(job("a"))


JOBS = st.tuples(st.integers(1, 9), st.lists(st.booleans(), min_size=1, max_size=6))
EVENTS = st.one_of(st.just("tick"), st.just("tick"), JOBS, st.integers(0, 20))  # step, step, a job comes, a job is removed


@settings(database=None, deadline=None, derandomize=True, max_examples=100)
@given(max_rows=st.integers(2, 12), events=st.lists(EVENTS, max_size=40))
def test_rows_slots_and_pictures_add_up_on_every_random_walk(max_rows: int, events: list[object]) -> None:
    scheduler = Scheduler(max_rows)
    added: dict[str, int] = {}
    removed: set[str] = set()
    finished: Counter[tuple[str, int]] = Counter()

    def step() -> None:
        before = scheduler.batch()
        admitted = scheduler.admit()
        batch = scheduler.batch()
        assert set(before) | set(admitted) == set(batch), "what runs goes on running"
        assert sum(picture.rows for picture in batch) <= scheduler.committed_rows <= max_rows
        slots = [picture.slot for picture in batch] + scheduler.free_slots
        assert sorted(slots) == list(range(max_rows)), "every slot is free or held by one picture"
        if any(entry.waiting for entry in scheduler.jobs.values()):
            assert batch, "nothing waits while nothing runs"
        for picture in tick(scheduler):
            finished[picture.job.id, picture.index] += 1

    for event in events:
        if event == "tick":
            step()
        elif isinstance(event, tuple):
            name = f"job {len(added)}"
            added[name] = event[0]
            scheduler.add(job(name, *event))
        else:
            scheduler.remove(f"job {event}")
            removed.add(f"job {event}")
    while scheduler.batch() or any(entry.waiting for entry in scheduler.jobs.values()):
        step()
    assert all(count == 1 for count in finished.values())
    whole = {(name, i) for name, images in added.items() if name not in removed for i in range(images)}
    assert whole <= set(finished)
    assert scheduler.committed_rows == 0
