"""The loop: admit → step → retire. Knows pictures and pixels; of Redis and rq it knows nothing.

`tick()` advances the pictures of one model by one evaluation and returns what came of it, for `rq_worker` to tell. Each checkpoint that is
resident has a lane: its runner, and the scheduler of its jobs. Lanes with work take turns.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from worker import counts
from worker.device import is_out_of_memory
from worker.images import encode_png, encode_preview
from worker.protocol import GenerationRequest, ModelRecord
from worker.runner import Decoding, Runner
from worker.scheduler import Job, Picture, Scheduler
from worker.stats import Stats

log = logging.getLogger("dit.engine")

ENCODERS = 2  # threads that make PNGs
MOST_ENCODING = 64  # pictures that may wait for them; more would pile up in memory
PREVIEWS = 5  # looks at a picture on its way, the picture itself among them
_IDLE_S = 0.01  # a tick that only waits for a model to load


@dataclass(frozen=True)
class ImageReady:
    job_id: str
    index: int
    seed: int
    png: bytes
    sha256: str


@dataclass(frozen=True)
class Preview:
    """What a picture looks like on its way."""

    job_id: str
    index: int
    share: float  # of its evaluations that were done
    url: str  # data:image/…


@dataclass(frozen=True)
class JobDone:
    job_id: str


@dataclass(frozen=True)
class JobFailed:
    job_id: str
    message: str
    kind: str  # of counts.FAILURES


Event = ImageReady | Preview | JobDone | JobFailed


class Models(Protocol):
    """The checkpoints that the engine may run: worker.models.Shelf, or one that is always there (worker.models.OneModel)."""

    crowded: bool  # a checkpoint that is wanted finds no memory until jobs of others have ended

    def records(self) -> list[ModelRecord]:
        """What to tell of each model, its newest version."""

    def runner(self, model: str, checkpoint: str) -> Runner | None:
        """The runner of a checkpoint, None while it is being loaded. ValueError if there is none, or it could not be loaded."""

    def poll(self, busy: set[str]) -> None:
        """Between two ticks: take in what was loaded, look for new versions. `busy` are the checkpoints that have jobs."""


@dataclass(eq=False)
class Lane:
    """One resident checkpoint and its jobs."""

    model: str  # that it is counted for: of several with the same weights, the first that had a job
    checkpoint: str
    runner: Runner
    scheduler: Scheduler
    last_turn: float = 0.0
    decoding: list[tuple[list[tuple[Picture, int]], Decoding, float]] = field(default_factory=list)  # since when, monotonic
    previewing: list[tuple[list[tuple[str, int, float]], Decoding]] = field(default_factory=list)  # job, picture, share


@dataclass(eq=False)
class Entry:
    """A job that the engine has."""

    request: GenerationRequest
    checkpoint: str
    alone: bool
    previews: bool = False
    request_id: str = ""
    lane: Lane | None = None  # None while its checkpoint is being loaded
    delivered: int = 0


class Engine:
    """Runs the pictures of many jobs together. Not for several threads, but for `ticking_since` and `slowest_tick_s`."""

    def __init__(self, models: Models, trace: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.models = models
        self.lanes: dict[str, Lane] = {}
        self.jobs: dict[str, Entry] = {}
        self.slowest_tick_s = 0.0  # of the runners used so far, as they measured when they warmed up
        self.ticking_since: float | None = None  # monotonic seconds at which the tick in progress began, for a watchdog
        self.stats = Stats()
        self._trace = trace
        self._encoder = ThreadPoolExecutor(max_workers=ENCODERS, thread_name_prefix="png")
        self._encoding: list[tuple[Picture, Future[tuple[bytes, str]]]] = []
        self._previews: list[tuple[tuple[str, int, float], Future[str]]] = []

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def wants(self, model: str) -> bool:
        """Whether a job of this model, at its newest version, would step at the next tick, and keep no other waiting for memory."""
        if self.models.crowded or any(entry.alone for entry in self.jobs.values()):
            return False
        here = [entry for entry in self.jobs.values() if entry.request.model == model]
        if any(entry.lane is None for entry in here):
            return False  # its checkpoint is being loaded: enough to know what it is needed for
        return all(lane.scheduler.wants_jobs for lane in {entry.lane for entry in here if entry.lane})

    def add(
        self,
        job_id: str,
        request: GenerationRequest,
        checkpoint: str,
        *,
        alone: bool = False,
        previews: bool = False,
        request_id: str = "",
    ) -> None:
        """Take a job in; ValueError if its model cannot do it. `alone`: nothing else may run beside it, which the caller sees to.

        `request_id` is for the log.
        """
        assert job_id not in self.jobs and not (alone and self.jobs)
        runner = self.models.runner(request.model, checkpoint)
        entry = Entry(request, checkpoint, alone, previews, request_id)
        if runner is not None:
            self._enter(job_id, entry, runner)
        self.jobs[job_id] = entry

    def _enter(self, job_id: str, entry: Entry, runner: Runner) -> None:
        """Give a job to the lane of its checkpoint. ValueError if the model cannot do it."""
        request, plan = entry.request, runner.plan(entry.request)
        self.slowest_tick_s = max(self.slowest_tick_s, runner.slowest_tick_s)
        lane = self.lanes.get(entry.checkpoint)
        if lane is None:
            scheduler = Scheduler(runner.max_rows, runner.slots)
            lane = self.lanes[entry.checkpoint] = Lane(request.model, entry.checkpoint, runner, scheduler)
        lane.scheduler.add(Job(job_id, request.class_labels, request.seed, request.guidance_scale, plan.guided, plan))
        entry.lane = lane

    def remove(self, job_id: str) -> None:
        """Stop a job between two ticks; its slots are free at once."""
        entry = self.jobs.pop(job_id, None)
        if entry and entry.lane:
            entry.lane.scheduler.remove(job_id)
        self._encoding = [(p, f) for p, f in self._encoding if p.job.id != job_id]

    def progress(self, job_id: str) -> float:
        """Share of the job's evaluations that are done, 0 … 1."""
        entry = self.jobs.get(job_id)
        if entry is None:
            return 1.0
        return entry.lane.scheduler.jobs[job_id].progress if entry.lane and job_id in entry.lane.scheduler.jobs else 0.0

    def _about(self, job_id: str) -> dict[str, str]:
        """What a line of the log about a job carries."""
        entry = self.jobs.get(job_id)
        return {"job_id": job_id, "request_id": entry.request_id if entry else ""}

    def tick(self) -> list[Event]:
        """One forward for the pictures of one lane. A picture that throws or leaves the finite numbers fails its own job only."""
        self.ticking_since = began = time.monotonic()
        try:
            events = self._take_in()
            waiting = [lane for lane in self.lanes.values() if lane.scheduler.has_work]
            turn: dict[str, Any] = {}
            coming = bool(self._encoding) or any(lane.decoding for lane in self.lanes.values())
            if waiting:
                lane = min(waiting, key=lambda lane: lane.last_turn)
                lane.last_turn = began
                events += self._turn(lane, turn)
                self.stats.observe(lane.model, "tick_s", time.monotonic() - began)
            elif self.jobs and not coming:
                time.sleep(_IDLE_S)
            events += self._collect(wait=not waiting)
            if coming and not waiting:
                turn = {"rows": 0, "bucket": 0, "pictures": 0, "jobs": 0, "steps": [], "decoded": 0}
            if self._trace and turn:
                self._trace({"t": began, "seconds": time.monotonic() - began, **turn})
            return events
        finally:
            self.ticking_since = None

    def rest(self) -> None:
        """Between two ticks, also where none comes: lanes without jobs go, so that their memory can; new versions are looked for."""
        self.lanes = {name: lane for name, lane in self.lanes.items() if lane.scheduler.jobs}
        self.models.poll({entry.checkpoint for entry in self.jobs.values()})

    def _take_in(self) -> list[Event]:
        """Jobs whose checkpoint has been loaded meanwhile, or could not be."""
        self.rest()
        failed: dict[str, str] = {}
        for job_id, entry in self.jobs.items():
            if entry.lane is None:
                try:
                    runner = self.models.runner(entry.request.model, entry.checkpoint)
                    if runner is not None:
                        self._enter(job_id, entry, runner)
                except ValueError as error:
                    failed[job_id] = str(error)
        return self._fail(failed, counts.REFUSED)

    def _turn(self, lane: Lane, trace: dict[str, Any]) -> list[Event]:
        """Step what the scheduler deals, then start one decoder batch: where decoding takes seconds, others step in between."""
        dealt = lane.scheduler.deal()
        if self._trace:
            rows, jobs = sum(picture.rows for picture in dealt), len({picture.job.id for picture in dealt})
            steps = [(p.job.id, p.index, p.evaluation) for p in dealt]
            trace |= {"checkpoint": lane.checkpoint, "rows": rows, "bucket": lane.runner.bucket(rows) if rows else 0}
            trace |= {"pictures": len(dealt), "jobs": jobs, "steps": steps}
        before = [picture.evaluation for picture in dealt]
        events = self._fail(self._step(lane, dealt), counts.STEP)
        # Of a step that failed nothing came: what lies in the slot may be an earlier picture's, of another job.
        self._look_at(lane, [picture for picture, at in zip(dealt, before, strict=True) if picture.evaluation > at])
        events += self._fail(self._retry(lane, lane.runner.lost()), counts.NOT_FINITE)
        finished = lane.scheduler.done()[: lane.runner.decode_buckets[-1]]
        if finished:
            failed = self._guarded(lane, finished, self._decode, lane.runner.decoder.halve, "decoder")
            events += self._fail(failed, counts.DECODER)
        if self._trace:
            trace["decoded"] = len(finished)
        return events

    def _step(self, lane: Lane, dealt: list[Picture]) -> dict[str, str]:
        """Advance the pictures dealt: together, but for those that are being retried, each by itself. → job id: message."""
        crowd = [picture for picture in dealt if not picture.attempt]
        failed: dict[str, str] = {}
        for group in (*lane.runner.groups(crowd), *([picture] for picture in dealt if picture.attempt)):
            self.ticking_since = time.monotonic()
            failed.update(self._guarded(lane, group, self._advance, lane.runner.halve, "step"))
        lane.scheduler.max_rows = lane.runner.max_rows
        return failed

    def _look_at(self, lane: Lane, stepped: list[Picture]) -> None:
        """Begin previews of pictures that have come a fifth further. One that goes wrong costs a preview and nothing else."""
        due = [p for p in stepped if not p.done and p.evaluation % _every(p) == 0 and (e := self.jobs.get(p.job.id)) and e.previews]
        for first in range(0, len(due), lane.runner.decode_buckets[-1]):
            batch = due[first : first + lane.runner.decode_buckets[-1]]
            try:
                decoding = lane.runner.preview(batch)
            except RuntimeError:  # out of memory too
                log.warning("previews of %d pictures could not be made", len(batch), exc_info=True)
            else:
                lane.previewing.append(([(p.job.id, p.index, p.evaluation / p.job.evaluations) for p in batch], decoding))

    def _guarded(
        self, lane: Lane, group: list[Picture], run: Callable[[Lane, list[Picture]], None], halve: Callable[[], bool], what: str
    ) -> dict[str, str]:
        """Run something for a group. Too little memory: smaller groups from the next tick on. If it throws: for each picture alone, and the
        culprit fails. → job id: message.
        """
        try:
            run(lane, group)
            return {}
        except Exception as error:
            if is_out_of_memory(error):
                self.stats.count(lane.model, "out_of_memory")
                if halve():
                    log.warning("out of memory in a %s of %d pictures; from now on it takes half of them", what, len(group))
                    return {}
                log.exception("out of memory in the smallest %s", what)
            elif not lane.runner.healthy():  # every job would fail, whose fault it is not: the process ends, and its leases with it
                raise
            else:
                log.exception("a %s of %d pictures failed; each is tried alone", what, len(group))
        failed: dict[str, str] = {}
        for picture in group:
            self.ticking_since = time.monotonic()  # each is a step of its own: many in a row do not hang
            try:
                run(lane, [picture])
            except Exception as error:
                if not lane.runner.healthy():
                    raise
                log.exception("job %s failed in a %s", picture.job.id, what, extra=self._about(picture.job.id))
                failed[picture.job.id] = f"the {what} failed: {error}"
        return failed

    def _advance(self, lane: Lane, group: list[Picture]) -> None:
        rows = sum(picture.rows for picture in group)
        lane.runner.start([picture for picture in group if picture.evaluation == 0])
        lane.runner.step(group)
        self.stats.observe(lane.model, "rows", rows)
        self.stats.count(lane.model, "bucket_rows", lane.runner.bucket(rows))
        for picture in group:
            picture.evaluation += 1

    def _decode(self, lane: Lane, finished: list[Picture]) -> None:
        began = time.monotonic()
        lane.decoding.append(([(picture, picture.attempt) for picture in finished], lane.runner.decode(finished), began))
        for picture in finished:
            lane.scheduler.retire(picture)

    def _retry(self, lane: Lane, lost: list[tuple[Picture, int]]) -> dict[str, str]:
        """Pictures that left the finite numbers begin again, once, in forwards of their own. → job id: message, for the second time.

        `lost` has with each the attempt in which it happened: the device tells it late, sometimes twice.
        """
        failed: dict[str, str] = {}
        for picture, attempt in lost:
            if lane.scheduler.jobs.get(picture.job.id) is not picture.job or attempt != picture.attempt:
                continue
            self.stats.count(lane.model, "not_finite")
            if picture.attempt:
                failed[picture.job.id] = f"picture {picture.index} left the finite numbers, also alone"
                continue
            about = self._about(picture.job.id)
            log.warning("job %s: picture %d left the finite numbers; it is tried again alone", picture.job.id, picture.index, extra=about)
            picture.attempt += 1
            lane.scheduler.restart(picture)
        return failed

    def _fail(self, failed: dict[str, str], kind: str) -> list[Event]:
        for job_id in failed:
            self.remove(job_id)
        return [JobFailed(job_id, message, kind) for job_id, message in failed.items()]

    def _collect(self, wait: bool) -> list[Event]:
        """What the decoder and the encoders have finished; waits for them only when nothing else is left to do, or too much piles up."""
        events: list[Event] = []
        for lane in self.lanes.values():
            while lane.decoding and (wait or lane.decoding[0][1].ready()):
                pictures, decoding, began = lane.decoding.pop(0)
                events += self._encode(lane, pictures, decoding)
                self.stats.observe(lane.model, "decode_s", time.monotonic() - began)
        events += self._previewed()
        waiting, too_many = [], len(self._encoding) - MOST_ENCODING
        for place, (picture, task) in enumerate(self._encoding):
            if wait or task.done() or place < too_many:
                events += self._deliver(picture, task)
            else:
                waiting.append((picture, task))
        self._encoding = [entry for entry in waiting if entry[0].job.id in self.jobs]
        return events

    def _previewed(self) -> list[Event]:
        """Previews that are ready, of jobs that are still here; nobody waits for them."""
        for lane in self.lanes.values():
            while lane.previewing and lane.previewing[0][1].ready():
                pictures, decoding = lane.previewing.pop(0)
                for picture, pixels in zip(pictures, decoding.result(), strict=True):
                    if pixels is not None:
                        self._previews.append((picture, self._encoder.submit(encode_preview, pixels)))
        done = [(picture, task) for picture, task in self._previews if task.done()]
        self._previews = [entry for entry in self._previews if entry not in done]
        return [Preview(*picture, task.result()) for picture, task in done if picture[0] in self.jobs and not task.exception()]

    def _encode(self, lane: Lane, pictures: list[tuple[Picture, int]], decoding: Decoding) -> list[Event]:
        lost = []
        for (picture, attempt), pixels in zip(pictures, decoding.result(), strict=True):
            if lane.scheduler.jobs.get(picture.job.id) is not picture.job or attempt != picture.attempt:
                continue  # removed, or begun again, meanwhile
            if pixels is None:
                lost.append((picture, attempt))
            else:
                request = self.jobs[picture.job.id].request
                task = self._encoder.submit(encode_png, pixels, request, picture.index, lane.checkpoint)
                self._encoding.append((picture, task))
        return self._fail(self._retry(lane, lost), counts.NOT_FINITE)

    def _deliver(self, picture: Picture, task: "Future[tuple[bytes, str]]") -> list[Event]:
        job_id = picture.job.id
        if job_id not in self.jobs:
            return []  # it failed a moment ago
        try:
            png, digest = task.result()
        except Exception as error:
            log.exception("job %s: a picture could not be encoded", job_id, extra=self._about(job_id))
            return self._fail({job_id: f"picture {picture.index} could not be encoded: {error}"}, counts.ENCODER)
        events: list[Event] = [ImageReady(job_id, picture.index, picture.seed, png, digest)]
        entry = self.jobs[job_id]
        entry.delivered += 1
        if entry.delivered == entry.request.num_images:
            self.remove(job_id)
            events.append(JobDone(job_id))
        return events


def _every(picture: Picture) -> int:
    """Evaluations from one preview to the next."""
    return -(-picture.job.evaluations // PREVIEWS)
