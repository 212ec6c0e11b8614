"""Which pictures step next: rows, slots, fairness. Without torch."""

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.scheduler import Job, Picture, Scheduler

ALWAYS, NEVER = [True] * 4, [False] * 4
INTERVAL = [False, True, True, False]


def job(name: str, images: int = 1, guided: list[bool] | None = None, labels: tuple[int | None, ...] | None = None) -> Job:
    return Job(name, labels or (0,) * images, seed=0, guidance_scale=2.0, guided=ALWAYS if guided is None else guided)


def scheduler_with(*jobs: Job, max_rows: int = 8, slots: int | None = None) -> Scheduler:
    scheduler = Scheduler(max_rows, slots or 4 * max_rows)
    for entry in jobs:
        scheduler.add(entry)
    return scheduler


def tick(scheduler: Scheduler, most_decoded: int = 1000) -> list[Picture]:
    """What the engine does, without a device; returns the pictures that stepped."""
    dealt = scheduler.deal()
    for picture in dealt:
        picture.evaluation += 1
    for picture in scheduler.done()[:most_decoded]:
        scheduler.retire(picture)
    return dealt


def names(pictures: list[Picture]) -> Counter[str]:
    return Counter(picture.job.id for picture in pictures)


def ticks_to_end(scheduler: Scheduler, late: Job, most_decoded: int = 1000, at_most: int = 5000) -> int:
    """Ticks until every picture of a job is done."""
    for count in range(1, at_most):
        tick(scheduler, most_decoded)
        if late.finished == len(late.class_labels):
            return count
    raise AssertionError(f"{late.id} has not ended after {at_most} ticks")


def test_it_loads_no_torch() -> None:
    code = "import sys, worker.scheduler; print('torch' in sys.modules, 'redis' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False"] * 3


def test_a_forward_must_hold_one_guided_picture_and_a_slot_one_picture() -> None:
    with pytest.raises(ValueError, match=r"at least 2.*got 1"):
        Scheduler(1, 4)
    with pytest.raises(ValueError, match=r"slots must be at least 1, got 0"):
        Scheduler(4, 0)


# --- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guided", "pictures"), [(ALWAYS, [4, 4, 4]), (NEVER, [8, 8, 8]), (INTERVAL, [8, 4, 4])], ids=["guided", "unguided", "interval"]
)
def test_every_row_is_dealt_out_anew_at_every_tick(guided: list[bool], pictures: list[int]) -> None:
    """Where guidance begins for eight pictures of one row, four step with two rows and the others pause."""
    scheduler = scheduler_with(job("a", 20, guided), max_rows=8)
    dealt = [tick(scheduler) for _ in range(3)]
    assert [len(batch) for batch in dealt] == pictures
    assert all(sum(2 if p.job.guided[i] else 1 for p in batch) == 8 for i, batch in enumerate(dealt))


def test_a_picture_costs_two_rows_only_while_it_is_guided() -> None:
    scheduler = scheduler_with(job("a", 1, INTERVAL))
    rows = []
    while scheduler.has_work:
        (picture,) = scheduler.deal()
        rows.append(picture.rows)
        picture.evaluation += 1
        for done in scheduler.done():
            scheduler.retire(done)
    assert rows == [1, 2, 2, 1]


def test_an_unconditional_picture_costs_one_row_whatever_the_scale() -> None:
    scheduler = scheduler_with(job("a", labels=(None, 0, None, 0, None)), max_rows=7)
    assert [picture.rows for picture in scheduler.deal()] == [1, 2, 1, 2, 1]
    assert job("a", labels=(None, None)).widest == 1 and job("a", labels=(None, 0)).widest == 2


def test_an_odd_row_is_left_to_a_picture_of_one_row() -> None:
    scheduler = scheduler_with(job("guided", 3), job("plain", 3, NEVER), max_rows=5)
    assert names(scheduler.deal()) == {"guided": 2, "plain": 1}


def test_an_odd_row_is_left_to_an_unconditional_picture_behind_others_of_its_job() -> None:
    scheduler = scheduler_with(job("mixed", labels=(0, 0, 0, None)), max_rows=5)
    dealt = scheduler.deal()
    assert [picture.index for picture in dealt] == [0, 1, 3] and [p.index for p in scheduler.jobs["mixed"].waiting] == [2]


def test_pictures_carry_their_label_and_seed() -> None:
    scheduler = scheduler_with(Job("a", (3, None, 1), seed=10, guidance_scale=1.0, guided=NEVER))
    assert [(p.index, p.class_label, p.seed) for p in scheduler.deal()] == [(0, 3, 10), (1, None, 11), (2, 1, 12)]


def test_within_a_job_those_that_started_first_end_first() -> None:
    large = job("large", 12)
    scheduler = scheduler_with(large, max_rows=8)
    ended: list[int] = []
    while scheduler.has_work:
        for picture in scheduler.deal():
            picture.evaluation += 1
        for picture in scheduler.done():
            ended.append(picture.index)
            scheduler.retire(picture)
    assert ended == list(range(12))


# --- fairness ----------------------------------------------------------------------------------------------------------


def test_jobs_share_the_rows() -> None:
    scheduler = scheduler_with(job("a", 64), job("b", 64), max_rows=8)
    assert names(scheduler.deal()) == {"a": 2, "b": 2}
    scheduler.add(job("c", 64))
    turns = sum((names(tick(scheduler)) for _ in range(6)), Counter())
    assert turns == {"a": 8, "b": 8, "c": 8}, "four pictures a tick for three jobs"


def test_a_late_job_of_one_image_steps_at_the_next_tick_and_pictures_of_a_larger_one_pause_in_their_slots() -> None:
    scheduler = scheduler_with(job("large", 64), max_rows=8)
    first = tick(scheduler)
    assert [picture.evaluation for picture in first] == [1] * 4
    scheduler.add(job("late"))
    slots = {picture.index: picture.slot for picture in first}
    assert names(tick(scheduler)) == {"large": 3, "late": 1}
    assert [picture.evaluation for picture in first] == [2, 2, 2, 1], "one of them waits where it is"
    assert {picture.index: picture.slot for picture in first} == slots
    for _ in range(3):
        assert names(tick(scheduler))["late"] == 1
    assert scheduler.jobs["late"].finished == 1
    assert names(tick(scheduler)) == {"large": 4}


@pytest.mark.parametrize("max_rows", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("steps", [1, 2, 10, 250])
def test_a_late_job_of_one_image_ends_within_three_times_its_steps_under_a_job_of_64(max_rows: int, steps: int) -> None:
    for large_steps in (1, 3, 1000):
        scheduler = scheduler_with(job("large", 64, [True] * large_steps), max_rows=max_rows)
        for _ in range(min(large_steps, 7)):
            tick(scheduler)
        assert scheduler.wants_jobs
        late = job("late", 1, [True] * steps)
        scheduler.add(late)
        assert ticks_to_end(scheduler, late) <= (steps if max_rows >= 4 else 2 * steps)


@pytest.mark.parametrize("guided", [ALWAYS, NEVER, INTERVAL], ids=["guided", "unguided", "interval"])
def test_a_job_that_is_wanted_among_many_ends_in_as_many_ticks_as_alone(guided: list[bool]) -> None:
    scheduler = scheduler_with(job("large", 64, [True] * 30), max_rows=16)
    count = 0
    while scheduler.wants_jobs:
        late = job(f"late {count}", 1, guided * (count % 5 + 1))
        scheduler.add(late)
        count += 1
    assert count >= 7
    assert ticks_to_end(scheduler, late) == late.evaluations


def test_a_guided_job_is_not_starved_by_unguided_pictures() -> None:
    scheduler = scheduler_with(max_rows=4)
    for offset in range(4):  # four unguided jobs out of step, more than are wanted: as after rows were halved
        scheduler.add(job(f"plain {offset}", 16 if offset == 0 else 1, [False] * (9 + offset)))
        tick(scheduler)
    late = job("guided")
    scheduler.add(late)
    assert ticks_to_end(scheduler, late) <= 2 * len(ALWAYS)


def test_jobs_that_have_no_room_together_take_turns() -> None:
    """After the device ran out of memory there may be more jobs than rows."""
    jobs = [job(f"job {i}", 3) for i in range(8)]
    scheduler = scheduler_with(*jobs, max_rows=16)
    tick(scheduler)
    scheduler.max_rows = 4
    turns = [tick(scheduler) for _ in range(8)]
    assert {len(batch) for batch in turns} == {2}
    assert sum((names(batch) for batch in turns), Counter()) == dict.fromkeys((j.id for j in jobs), 2)


def test_a_slow_decoder_takes_pictures_job_by_job_so_that_a_late_one_does_not_wait_behind_a_larger_job() -> None:
    scheduler = scheduler_with(job("large", 64, [False]), max_rows=16)
    for _ in range(3):
        tick(scheduler, most_decoded=2)
    assert len(scheduler.done()) > 30
    late = job("late", 1, [True] * 2)
    scheduler.add(late)
    assert ticks_to_end(scheduler, late, most_decoded=2) == 2


def test_a_slow_decoder_gives_every_job_its_turn() -> None:
    jobs = [job(f"job {i}", 20, [False]) for i in range(5)]
    scheduler = scheduler_with(*jobs, max_rows=20)
    for _ in range(10):
        tick(scheduler, most_decoded=2)
    assert [entry.finished for entry in jobs] == [4] * 5


def test_a_job_of_one_image_leaves_a_crowd_at_its_own_last_step() -> None:
    scheduler = scheduler_with(job("long", 2, [True] * 9), job("short", 1, [True] * 2))
    tick(scheduler)
    assert scheduler.jobs["short"].finished == 0
    tick(scheduler)
    assert scheduler.jobs["short"].finished == 1
    assert names(tick(scheduler)) == {"long": 2}


# --- admission ---------------------------------------------------------------------------------------------------------


def test_jobs_are_wanted_while_a_guided_picture_of_one_more_could_step_at_every_tick() -> None:
    scheduler = scheduler_with(max_rows=6)
    for name in "abc":
        assert scheduler.wants_jobs
        scheduler.add(job(name, 64))
    assert not scheduler.wants_jobs, "every row is promised"
    scheduler.remove("b")
    assert scheduler.wants_jobs


def test_a_job_that_is_never_guided_is_promised_one_row() -> None:
    scheduler = scheduler_with(*(job(name, 64, NEVER) for name in "abc"), max_rows=5)
    assert scheduler.wants_jobs
    scheduler.add(job("d", labels=(None,)))
    assert not scheduler.wants_jobs, "one row is left, and the next may be guided"


def test_no_job_is_wanted_that_would_find_no_slot() -> None:
    scheduler = scheduler_with(job("a", 20, NEVER), max_rows=8, slots=8)
    assert scheduler.wants_jobs
    scheduler.deal()
    assert not scheduler.free_slots and not scheduler.wants_jobs
    for picture in scheduler.jobs["a"].running:
        picture.evaluation += 4
    scheduler.retire(scheduler.done()[0])
    assert scheduler.wants_jobs, "a slot is free"
    scheduler.add(job("b"))
    assert not scheduler.wants_jobs, "which b will take"
    assert names(scheduler.deal()) == {"b": 1}


# --- slots -------------------------------------------------------------------------------------------------------------


def test_slots_are_used_again() -> None:
    scheduler = scheduler_with(job("a", 20), max_rows=4)
    used: set[int] = set()
    while scheduler.has_work:
        used |= {picture.slot for picture in tick(scheduler)}
    assert len(used) == 2 and sorted(scheduler.free_slots) == list(range(16))


def test_no_more_pictures_start_than_there_are_slots() -> None:
    scheduler = scheduler_with(job("a", 20, NEVER), max_rows=8, slots=3)
    assert len(scheduler.deal()) == 3 and len(scheduler.jobs["a"].waiting) == 17


def test_a_picture_that_begins_again_keeps_its_slot_and_its_place() -> None:
    scheduler = scheduler_with(job("a", 2), max_rows=4)
    picture, other = tick(scheduler)
    slot = picture.slot
    scheduler.restart(picture)
    assert (picture.evaluation, picture.slot, other.evaluation) == (0, slot, 1)
    assert tick(scheduler) == [picture, other] and picture.evaluation == 1


def test_a_picture_that_begins_again_after_its_slot_was_given_back_is_the_first_of_its_job_to_get_one() -> None:
    large = job("a", 6, [True])
    scheduler = scheduler_with(large, max_rows=4)
    first, _ = tick(scheduler)
    assert first.done and large.finished == 2 and first not in large.running
    scheduler.restart(first)
    assert (large.finished, first.slot, large.waiting[0]) == (1, -1, first)
    assert scheduler.deal()[0] is first and first.slot >= 0
    while scheduler.has_work:
        tick(scheduler)
    assert large.finished == 6 and sorted(scheduler.free_slots) == list(range(16))


def test_removing_a_job_frees_its_slots_and_forgets_its_waiting_pictures() -> None:
    scheduler = scheduler_with(job("a", 20), max_rows=4)
    tick(scheduler)
    scheduler.remove("a")
    assert scheduler.deal() == scheduler.done() == [] and not scheduler.has_work
    assert sorted(scheduler.free_slots) == list(range(16))


def test_removing_an_unknown_job_does_nothing() -> None:
    scheduler = scheduler_with(job("a"))
    scheduler.remove("b")
    assert len(scheduler.deal()) == 1


def test_a_job_cannot_be_added_over_itself() -> None:
    scheduler = scheduler_with(job("a"))
    with pytest.raises(AssertionError, match="slots would be lost"):
        scheduler.add(job("a"))


def test_progress_is_the_share_of_all_evaluations() -> None:
    large = job("a", 4)
    scheduler = scheduler_with(large, max_rows=4)  # two at once
    seen = [large.progress]
    while large.finished < 4:
        tick(scheduler)
        seen.append(large.progress)
    assert seen == [i / 8 for i in range(9)]


# --- random walks ------------------------------------------------------------------------------------------------------

JOBS = st.tuples(st.lists(st.sampled_from([0, 1, None]), min_size=1, max_size=9), st.lists(st.booleans(), min_size=1, max_size=6))
EVENTS = st.one_of(
    st.just("tick"),
    st.just("tick"),
    JOBS,  # a job comes, if one is wanted
    st.tuples(st.just("remove"), st.integers(0, 20)),
    st.tuples(st.just("restart"), st.integers(0, 200)),
    st.just("halve"),
)


class Walk:
    """A scheduler, and what must hold of it at every tick."""

    def __init__(self, max_rows: int, slots: int, most_decoded: int) -> None:
        self.scheduler, self.slots, self.most_decoded = Scheduler(max_rows, slots), slots, most_decoded
        self.added: list[Job] = []
        self.removed: set[str] = set()
        self.finished: Counter[tuple[str, int]] = Counter()
        self.retired: list[Picture] = []
        self.waited: Counter[str] = Counter()  # ticks without a turn, of jobs that could have had one

    def do(self, event: Any) -> None:
        match event:
            case "tick":
                self.step()
            case "halve":
                self.scheduler.max_rows = max(2, self.scheduler.max_rows // 2)
                self.waited.clear()
            case ("remove", int(number)):
                self.scheduler.remove(f"job {number}")
                self.removed.add(f"job {number}")
            case ("restart", int(number)):
                self.restart(number)
            case (labels, guided):
                if self.scheduler.wants_jobs:
                    self.added.append(job(f"job {len(self.added)}", guided=guided, labels=tuple(labels)))
                    self.scheduler.add(self.added[-1])

    def restart(self, number: int) -> None:
        """Any picture that runs or has just been retired, as when the device tells late that it left the finite numbers."""
        here = [p for entry in self.scheduler.jobs.values() for p in entry.running]
        gone = [p for p in self.retired if p.job.id in self.scheduler.jobs]
        if here or gone:
            picture = (here + gone)[number % len(here + gone)]
            if picture in gone:
                self.retired.remove(picture)
                self.finished[picture.job.id, picture.index] -= 1
            self.scheduler.restart(picture)

    def step(self) -> None:
        scheduler = self.scheduler
        able = {p.job.id for entry in scheduler.jobs.values() for p in entry.running if not p.done}
        dealt = scheduler.deal()
        left = scheduler.max_rows - sum(picture.rows for picture in dealt)
        assert left >= 0 and len(set(dealt)) == len(dealt)
        for entry in scheduler.jobs.values():
            assert not [p for p in entry.running if not p.done and p not in dealt and p.rows <= left], (
                "a picture pauses while rows are free"
            )
            if scheduler.free_slots:
                assert not [p for p in entry.waiting if p.rows <= left], "a picture waits while rows and slots are free"
        self.check_slots()
        for name in able - names(dealt).keys():
            self.waited[name] += 1
            assert self.waited[name] <= len(scheduler.jobs), f"{name} is starved"
        for name in names(dealt):
            del self.waited[name]
        for picture in dealt:
            picture.evaluation += 1
        done = scheduler.done()
        for picture in done[: self.most_decoded]:
            scheduler.retire(picture)
            self.finished[picture.job.id, picture.index] += 1
            self.retired.append(picture)
        assert not scheduler.has_work or dealt or done, "nothing moves any more"
        self.check_slots()

    def check_slots(self) -> None:
        held = [picture.slot for entry in self.scheduler.jobs.values() for picture in entry.running]
        assert sorted(held + self.scheduler.free_slots) == list(range(self.slots)), "every slot is free or held by one picture"


@settings(database=None, deadline=None, derandomize=True, max_examples=200)
@given(
    max_rows=st.integers(2, 12),
    slots=st.integers(1, 30),
    most_decoded=st.integers(1, 8),
    events=st.lists(EVENTS, max_size=60),
)
def test_rows_slots_and_pictures_add_up_on_every_random_walk_and_no_job_starves(
    max_rows: int, slots: int, most_decoded: int, events: list[Any]
) -> None:
    walk = Walk(max_rows, slots, most_decoded)
    for event in events:
        walk.do(event)
    for _ in range(5000):
        if not walk.scheduler.has_work:
            break
        walk.step()
    assert not walk.scheduler.has_work
    whole = {(entry.id, i): 1 for entry in walk.added if entry.id not in walk.removed for i in range(len(entry.class_labels))}
    assert whole == {key: count for key, count in walk.finished.items() if key[0] not in walk.removed}
    assert all(entry.finished == len(entry.class_labels) for entry in walk.added if entry.id not in walk.removed)


@settings(database=None, deadline=None, derandomize=True, max_examples=100)
@given(
    max_rows=st.integers(2, 24),
    crowd=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 40), st.booleans()), max_size=12),
    before=st.integers(0, 30),
    steps=st.integers(1, 40),
)
def test_a_job_of_one_image_that_is_wanted_ends_within_three_times_its_steps_whatever_runs(
    max_rows: int, crowd: list[tuple[int, int, bool]], before: int, steps: int
) -> None:
    """Alone with a full batch it takes its number of steps."""
    scheduler = scheduler_with(max_rows=max_rows)
    for number, (images, length, guided) in enumerate(crowd):
        if scheduler.wants_jobs:
            scheduler.add(job(f"job {number}", images, [guided] * length))
        tick(scheduler)
    for _ in range(before):
        tick(scheduler)
    if scheduler.wants_jobs:
        late = job("late", 1, [True] * steps)
        scheduler.add(late)
        assert ticks_to_end(scheduler, late) <= 3 * steps
