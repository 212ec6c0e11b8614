"""Workers over one queue, on a clock of events: the real scheduler decides what steps, a measured curve says how long that takes.

A worker goes round as `worker.rq_worker` and `worker.engine` do: it looks into the queue if a look is due and the scheduler wants jobs,
steps what the scheduler deals, decodes one batch of what is done, and delivers what it decoded the round before. An idle one is rung for.

Not as in reality: devices are alike, and each round of so many rows takes the same; a decode counts whole, also where a device does it
beside the next steps; Redis, network and API take constants, however many ask; nothing fails, and nobody cancels.
"""

import heapq
import json
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from worker.rq_worker import CALLS_PER_S, LOOK_EVERY_S
from worker.scheduler import Job, Picture, Scheduler

SUBMIT_S = 0.003  # from the request until the job is queued, as the next of 2026-11-25-overhead.md
RING_S = 0.0008  # from then until an idle worker has taken it, unless a busy one that looks does so before: benchmarks/ring.py
START_S = 0.0012  # from then until it steps: 2 ms in all, see above
ENCODE_S = 0.001  # of a last picture's PNG, when there is nothing else to do


@dataclass(frozen=True)
class Curve:
    """How long a device takes, as benchmarks/curve.py measures it."""

    device: str
    command: str  # that measured it
    max_rows: int
    slots: int
    step_s: dict[int, float]  # rows of a forward → seconds of a round that steps them
    decode_s: dict[int, float]  # images of a batch → seconds
    between_s: float = 0.0  # that a worker spends between two rounds, on Redis mostly

    def __post_init__(self) -> None:
        times = [*self.step_s.values(), *self.decode_s.values()]
        if not self.step_s or not self.decode_s or min(times) <= 0 or self.between_s < 0:
            raise ValueError(f"a curve has rows → seconds and images → seconds, all above 0; got {self.step_s} and {self.decode_s}")
        if max(self.step_s) < self.max_rows:
            raise ValueError(f"the curve ends at {max(self.step_s)} rows, and a forward may have {self.max_rows}")

    @classmethod
    def read(cls, path: Path) -> Self:
        """ValueError for a file that has another shape."""
        try:
            values = json.loads(path.read_text())
            curves = {name: {int(size): float(s) for size, s in values[name].items()} for name in ("step_s", "decode_s")}
            named = {name: values[name] for name in ("device", "command", "max_rows", "slots")}
            return cls(**named, **curves, between_s=float(values.get("between_s", 0.0)))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no curve as benchmarks/curve.py writes it: {error!r}") from error

    def faster(self, times: float) -> "Curve":
        """A device that does the same so many times as fast."""
        curves: dict[str, Any] = {name: {size: s / times for size, s in getattr(self, name).items()} for name in ("step_s", "decode_s")}
        return replace(self, device=f"{self.device} × {times:g}", between_s=self.between_s / times, **curves)


@dataclass(frozen=True)
class Asked:
    """A job to come."""

    at: float  # s
    pictures: int
    guided: tuple[bool, ...]  # per evaluation, as worker.plan has it

    @property
    def work(self) -> int:
        """Row evaluations."""
        return self.pictures * (len(self.guided) + sum(self.guided))


@dataclass(eq=False)
class Worker:
    """One device and its loop."""

    scheduler: Scheduler
    jobs: dict[str, Asked] = field(default_factory=dict)
    undelivered: dict[str, int] = field(default_factory=dict)
    decoded: list[Picture] = field(default_factory=list)
    look_at: float = 0.0
    busy_s: float = 0.0
    rows: int = 0
    rounds: int = 0


class Fleet:
    """`workers` of the same curve over one queue."""

    def __init__(self, curve: Curve, workers: int) -> None:
        self.curve = curve
        sizes, largest = sorted(curve.step_s), max(curve.decode_s)
        self._step_s = [0.0] + [curve.step_s[sizes[bisect_left(sizes, rows)]] for rows in range(1, curve.max_rows + 1)]
        batches = sorted(curve.decode_s)
        self._decode_s = [0.0] + [curve.decode_s[batches[bisect_left(batches, images)]] for images in range(1, largest + 1)]
        self._largest = largest
        self._look_s = max(LOOK_EVERY_S, workers / CALLS_PER_S)
        self.workers = [Worker(Scheduler(curve.max_rows, curve.slots)) for _ in range(workers)]
        self.queue: deque[tuple[str, Asked]] = deque()

    def run(self, asked: Sequence[Asked], *, until: float = float("inf")) -> Iterator[tuple[Asked, float]]:
        """Each job with the time of its end, in the order of the ends; jobs that have not ended at `until` do not come."""
        coming = iter(enumerate(asked))
        idle, clock = deque(self.workers), list[tuple[float, int, Worker]]()
        number, job = next(coming, (0, None))
        order = 0
        while clock or job:
            if job is not None and (not clock or job.at + SUBMIT_S <= clock[0][0]):
                self.queue.append((str(number), job))
                if idle:
                    order += 1
                    heapq.heappush(clock, (job.at + SUBMIT_S + RING_S, order, idle.popleft()))
                number, job = next(coming, (0, None))
                continue
            now, _, worker = heapq.heappop(clock)
            if now > until:
                return
            took, ended = self._round(worker, now)
            for one in ended:
                yield one, now + took
            if worker.jobs or self.queue:
                order += 1
                heapq.heappush(clock, (now + took + self.curve.between_s, order, worker))
            else:
                idle.append(worker)

    def _round(self, worker: Worker, now: float) -> tuple[float, list[Asked]]:
        """Seconds that it takes, and the jobs that end with it."""
        scheduler, starts = worker.scheduler, not worker.jobs
        if now >= worker.look_at or starts:
            worker.look_at = now + self._look_s
            while self.queue and scheduler.wants_jobs:
                self._take(worker, *self.queue.popleft())
        if not worker.jobs:  # another was quicker
            return 0.0, []
        dealt = scheduler.deal()
        rows = sum(picture.rows for picture in dealt)
        for picture in dealt:
            picture.evaluation += 1
        finished = scheduler.done()[: self._largest]
        took = self._step_s[rows] + self._decode_s[len(finished)] + (START_S if starts else 0.0)
        before, worker.decoded = worker.decoded, finished
        for picture in finished:
            scheduler.retire(picture)
        if not scheduler.has_work:  # what was just decoded is waited for
            before, worker.decoded = before + finished, []
            took += ENCODE_S
        worker.busy_s += took
        worker.rows += rows
        worker.rounds += 1
        return took, [ended for picture in before if (ended := self._deliver(worker, picture))]

    def _take(self, worker: Worker, name: str, asked: Asked) -> None:
        worker.jobs[name], worker.undelivered[name] = asked, asked.pictures
        worker.scheduler.add(Job(name, (0,) * asked.pictures, 0, 1.0, list(asked.guided)))

    def _deliver(self, worker: Worker, picture: Picture) -> Asked | None:
        name = picture.job.id
        worker.undelivered[name] -= 1
        if worker.undelivered[name]:
            return None
        del worker.undelivered[name]
        worker.scheduler.remove(name)
        return worker.jobs.pop(name)


def pace(curve: Curve, draw: Callable[[int], Sequence[Asked]]) -> dict[str, float]:
    """Row evaluations and pictures a second of one worker whose queue is never empty; `draw(n)` gives n jobs that wait from the start."""
    jobs = draw(400)
    ends = list(Fleet(curve, 1).run(jobs))
    first, last = len(ends) // 4, 3 * len(ends) // 4  # neither the filling nor the emptying
    seconds = ends[last][1] - ends[first][1]
    done = [asked for asked, _ in ends[first:last]]
    return {"rows_per_s": sum(asked.work for asked in done) / seconds, "pictures_per_s": sum(asked.pictures for asked in done) / seconds}
