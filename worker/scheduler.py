"""Which pictures step next: admission, fairness, capacity. No torch, no Redis.

Capacity is counted in rows of one forward pass: a picture costs two while its guidance is active, else one. Every tick deals out the rows
anew, one picture a job and turn, so that a job which has just come steps at the next tick, whatever else runs; the pictures of a large
job for which no row is left pause where they are, in their slots. A slot is the memory of one started picture: their number is the bound
in bytes.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Picture:
    """One picture of a job on its way from noise to latents."""

    job: "Job"
    index: int
    class_label: int | None
    seed: int
    slot: int = -1
    evaluation: int = 0  # network evaluations done
    attempt: int = 0  # 1 after it left the finite numbers: it steps in forwards of its own

    @property
    def guided(self) -> bool:
        """Whether its next evaluation is guided; an unconditional picture has nothing to be guided from."""
        return self.class_label is not None and self.job.guided[self.evaluation]

    @property
    def rows(self) -> int:
        """Rows of its next forward."""
        return 2 if self.guided else 1

    @property
    def done(self) -> bool:
        return self.evaluation >= self.job.evaluations


@dataclass(eq=False)
class Job:
    """A job's pictures and what they share. `plan` belongs to the runner."""

    id: str
    class_labels: tuple[int | None, ...]
    seed: int
    guidance_scale: float
    guided: list[bool]  # per evaluation
    plan: Any = None
    waiting: deque[Picture] = field(default_factory=deque)
    running: list[Picture] = field(default_factory=list)  # those with a slot, in the order they started
    finished: int = 0
    last_dealt: int = 0  # by the scheduler's count: when one of its pictures was dealt rows last
    last_retired: int = 0  # when one was retired last
    widest: int = field(init=False)  # rows that its widest picture ever needs

    def __post_init__(self) -> None:
        self.waiting.extend(Picture(self, i, label, self.seed + i) for i, label in enumerate(self.class_labels))
        self.widest = 2 if any(self.guided) and any(label is not None for label in self.class_labels) else 1

    @property
    def evaluations(self) -> int:
        return len(self.guided)

    @property
    def progress(self) -> float:
        """Share of all its evaluations that are done, 0 … 1."""
        done = sum(p.evaluation for p in self.running) + self.finished * self.evaluations
        return done / (len(self.class_labels) * self.evaluations)


class Scheduler:
    """Jobs in order of arrival, pictures in slots."""

    def __init__(self, max_rows: int, slots: int) -> None:
        if max_rows < 2:
            raise ValueError(f"max_rows must be at least 2, so that one guided picture fits; got {max_rows}")
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.max_rows = max_rows
        self.jobs: dict[str, Job] = {}
        self.free_slots = list(range(slots))[::-1]
        self._count = itertools.count(1)

    @property
    def wants_jobs(self) -> bool:
        """Whether another job would step at the next tick: each job here is promised a picture a tick, and none waits for a slot.

        One job alone never keeps a second out: where there is no room for both, they take turns.
        """
        promised = sum(job.widest for job in self.jobs.values())
        slotless = sum(1 for job in self.jobs.values() if job.waiting and not job.running)
        return (promised + 2 <= self.max_rows or len(self.jobs) < 2) and slotless < len(self.free_slots)

    @property
    def has_work(self) -> bool:
        """Whether anything is left to step or to decode."""
        return any(job.waiting or job.running for job in self.jobs.values())

    def add(self, job: Job) -> None:
        assert job.id not in self.jobs, f"job {job.id} is here already; its slots would be lost"
        self.jobs[job.id] = job

    def deal(self) -> list[Picture]:
        """The pictures of the next tick, at most `max_rows` rows: turn by turn one picture of each job, those longest without a turn first.

        Within a job, pictures that have started go before new ones, the earliest started first, so that finished ones leave soon. New ones
        get their slot here.
        """
        left = self.max_rows
        dealt: list[Picture] = []
        turns = [(job, self._candidates(job)) for job in sorted(self.jobs.values(), key=lambda job: job.last_dealt)]
        while turns and left:
            again = []
            for job, candidates in turns:
                picture = next((picture for picture in candidates if picture.rows <= left), None)
                if picture is None:
                    continue
                if picture.slot < 0:
                    self._start(picture)
                dealt.append(picture)
                left -= picture.rows
                job.last_dealt = next(self._count)
                again.append((job, candidates))
            turns = again
        return dealt

    def _candidates(self, job: Job) -> Iterator[Picture]:
        yield from [picture for picture in job.running if not picture.done]
        for picture in list(job.waiting):
            if self.free_slots:
                yield picture

    def _start(self, picture: Picture) -> None:
        picture.job.waiting.remove(picture)
        picture.job.running.append(picture)
        picture.slot = self.free_slots.pop()

    def done(self) -> list[Picture]:
        """Pictures at their last evaluation, which hold their slots until they are retired: by turns, one of each job, those first of which
        none was retired for longest. So a large job whose pictures wait for a slow decoder delays no other.
        """
        turns = [(turn, p) for job in self.jobs.values() for turn, p in enumerate(p for p in job.running if p.done)]
        return [picture for _, picture in sorted(turns, key=lambda entry: (entry[0], entry[1].job.last_retired))]

    def retire(self, picture: Picture) -> None:
        """A picture's latents have been read; its slot is free."""
        picture.job.running.remove(picture)
        picture.job.finished += 1
        picture.job.last_retired = next(self._count)
        self.free_slots.append(picture.slot)

    def restart(self, picture: Picture) -> None:
        """A picture begins again; one that was retired waits for a slot, before all others of its job."""
        picture.evaluation = 0
        if picture not in picture.job.running:
            picture.slot = -1
            picture.job.finished -= 1
            picture.job.waiting.appendleft(picture)

    def remove(self, job_id: str) -> None:
        """Forget a job, done or not; its slots are free."""
        job = self.jobs.pop(job_id, None)
        if job:
            self.free_slots += [picture.slot for picture in job.running]
            job.running.clear()
            job.waiting.clear()
