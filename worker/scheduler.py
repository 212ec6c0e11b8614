"""Which pictures step next: admission, fairness, capacity. No torch, no Redis.

Capacity is counted in rows of one forward pass: a picture costs two while its guidance is active, else one. A picture is admitted when its
widest step fits beside those of all the others, and then takes part in every tick until it is done: nothing that runs ever waits.
"""

from collections import deque
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

    @property
    def rows(self) -> int:
        """Rows of its next forward: two while guided."""
        return 2 if self.job.guided[self.evaluation] else 1

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
    running: list[Picture] = field(default_factory=list)
    finished: int = 0

    def __post_init__(self) -> None:
        self.waiting.extend(Picture(self, i, label, self.seed + i) for i, label in enumerate(self.class_labels))

    @property
    def evaluations(self) -> int:
        return len(self.guided)

    @property
    def widest(self) -> int:
        return 2 if any(self.guided) else 1

    @property
    def progress(self) -> float:
        """Share of all its evaluations that are done, 0 … 1."""
        done = sum(p.evaluation for p in self.running) + self.finished * self.evaluations
        return done / (len(self.class_labels) * self.evaluations)


class Scheduler:
    """Jobs in order of arrival, pictures in slots."""

    def __init__(self, max_rows: int) -> None:
        if max_rows < 2:
            raise ValueError(f"max_rows must be at least 2, so that one guided picture fits; got {max_rows}")
        self.max_rows = max_rows
        self.jobs: dict[str, Job] = {}
        self.free_slots = list(range(max_rows))[::-1]

    @property
    def committed_rows(self) -> int:
        """Rows that the running pictures may need in one tick."""
        return sum(job.widest * len(job.running) for job in self.jobs.values())

    @property
    def wants_jobs(self) -> bool:
        """Whether another job could step at the next tick. It is asked for even while one large job has pictures waiting, for fairness."""
        unstarted = sum(1 for job in self.jobs.values() if job.waiting and not job.running)
        return self.committed_rows + 2 * unstarted + 2 <= self.max_rows

    def add(self, job: Job) -> None:
        assert job.id not in self.jobs, f"job {job.id} is here already; its slots would be lost"
        self.jobs[job.id] = job

    def admit(self) -> list[Picture]:
        """Give slots to waiting pictures while they fit: first to the job with the fewest running, then in order of arrival.

        A job whose turn it is and that does not fit is waited for: narrower ones that slip past it could starve it.
        """
        admitted: list[Picture] = []
        while True:
            candidates = [job for job in self.jobs.values() if job.waiting]
            job = min(candidates, key=lambda j: len(j.running), default=None)  # min keeps the first of equals: the oldest
            if job is None or job.widest > self.max_rows - self.committed_rows:
                return admitted
            picture = job.waiting.popleft()
            picture.slot = self.free_slots.pop()
            job.running.append(picture)
            admitted.append(picture)

    def batch(self) -> list[Picture]:
        """The pictures of the next tick: all that run."""
        return [picture for job in self.jobs.values() for picture in job.running]

    def retire(self, picture: Picture) -> None:
        """A picture has reached its last evaluation; its slot is free."""
        picture.job.running.remove(picture)
        picture.job.finished += 1
        self.free_slots.append(picture.slot)

    def remove(self, job_id: str) -> None:
        """Forget a job, done or not; its slots are free."""
        job = self.jobs.pop(job_id, None)
        if job:
            self.free_slots += [picture.slot for picture in job.running]
            job.running.clear()
            job.waiting.clear()
