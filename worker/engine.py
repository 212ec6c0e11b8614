"""The loop: admit → step → retire. Knows pictures and pixels; of Redis and rq it knows nothing.

`tick()` advances every running picture by one evaluation and returns what came of it, for `rq_worker` to tell.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from worker.images import encode_png
from worker.protocol import GenerationRequest
from worker.runner import Runner
from worker.scheduler import Job, Picture, Scheduler

log = logging.getLogger("dit.engine")


@dataclass(frozen=True)
class ImageReady:
    job_id: str
    index: int
    seed: int
    png: bytes
    sha256: str


@dataclass(frozen=True)
class JobDone:
    job_id: str


@dataclass(frozen=True)
class JobFailed:
    job_id: str
    message: str


Event = ImageReady | JobDone | JobFailed


class Engine:
    """Runs the pictures of many jobs together. Not for several threads."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.scheduler = Scheduler(runner.max_rows)
        self.requests: dict[str, GenerationRequest] = {}
        self._encoder = ThreadPoolExecutor(max_workers=2, thread_name_prefix="png")
        self._encoding: list[tuple[Picture, Future[tuple[bytes, str]]]] = []
        self._delivered: dict[str, int] = {}

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    @property
    def wants_jobs(self) -> bool:
        return self.scheduler.wants_jobs

    def add(self, job_id: str, request: GenerationRequest) -> None:
        """Take a job in; ValueError if the model cannot do it."""
        plan = self.runner.plan(request)
        self.requests[job_id], self._delivered[job_id] = request, 0
        self.scheduler.add(Job(job_id, request.class_labels, request.seed, request.guidance_scale, plan.guided, plan))

    def remove(self, job_id: str) -> None:
        """Stop a job between two ticks; its slots are free at once."""
        self.scheduler.remove(job_id)
        self.requests.pop(job_id, None)
        self._delivered.pop(job_id, None)
        self._encoding = [(p, f) for p, f in self._encoding if p.job.id != job_id]

    def progress(self, job_id: str) -> float:
        """Share of the job's evaluations that are done, 0 … 1."""
        job = self.scheduler.jobs.get(job_id)
        return job.progress if job else 1.0

    def tick(self) -> list[Event]:
        """One forward for everything that runs. A picture that throws or leaves the finite numbers fails its own job only."""
        events: list[Event] = []
        self.runner.start(self.scheduler.admit())
        batch = [p for p in self.scheduler.batch() if not p.done]
        if batch:
            events += self._fail(self._step(batch))
        # One decoder batch a tick: where decoding takes seconds, leases are renewed and others step in between.
        events += self._finish([p for p in self.scheduler.batch() if p.done][: self.runner.decode_buckets[-1]])
        return events + self._collect(wait=not self.scheduler.batch())

    def _step(self, batch: list[Picture]) -> dict[str, str]:
        """Advance a batch; if the forward throws, each picture alone, so that only the culprit's job fails. → job id: message."""
        try:
            self.runner.step(batch)
        except Exception as error:
            if len(batch) == 1:
                log.exception("job %s failed in a step", batch[0].job.id)
                return {batch[0].job.id: f"the step failed: {error}"}
            failed: dict[str, str] = {}
            for picture in batch:
                failed.update(self._step([picture]))
            return failed
        for picture in batch:
            picture.evaluation += 1
        return {}

    def _finish(self, finished: list[Picture]) -> list[Event]:
        if not finished:
            return []
        broken: dict[str, str] = {}
        for picture, pixels in zip(finished, self.runner.decode(finished), strict=True):
            self.scheduler.retire(picture)
            if pixels is None:
                broken[picture.job.id] = f"picture {picture.index} left the finite numbers"
            else:
                request = self.requests[picture.job.id]
                task = self._encoder.submit(encode_png, pixels, request, picture.index, self.runner.checkpoint.hash)
                self._encoding.append((picture, task))
        return self._fail(broken)

    def _fail(self, failed: dict[str, str]) -> list[Event]:
        for job_id in failed:
            self.remove(job_id)
        return [JobFailed(job_id, message) for job_id, message in failed.items()]

    def _collect(self, wait: bool) -> list[Event]:
        """Encoded pictures; waits for the encoder only when nothing else is left to do."""
        events: list[Event] = []
        pending = []
        for picture, task in self._encoding:
            if not (wait or task.done()):
                pending.append((picture, task))
                continue
            png, digest = task.result()
            job_id = picture.job.id
            events.append(ImageReady(job_id, picture.index, picture.seed, png, digest))
            self._delivered[job_id] += 1
            if self._delivered[job_id] == self.requests[job_id].num_images:
                self.remove(job_id)
                events.append(JobDone(job_id))
        self._encoding = [entry for entry in pending if entry[0].job.id in self.requests]
        return events
