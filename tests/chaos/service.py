"""One Redis and whoever uses it: workers that things happen to, jobs submitted as the API submits them, and the audit at the end."""

import asyncio
import json
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.jobs import CONNECTION, JobStore
from tests.chaos.processes import Process
from tests.chaos.redis_server import RedisServer
from tests.chaos.tiny import MODEL
from tests.chaos.worker import Mishap, run
from worker import protocol
from worker.counts import stats_key
from worker.protocol import FINAL, GenerationRequest
from worker.stores import REDIS, open_store, read_mark

TIMEOUT_S = 240.0  # of a wait that nothing was promised for: a loaded machine is slow
RESULT_TTL_S = 45
QUEUE_LIMIT = 1000
POLL_S = 0.1
_STARTING = threading.Semaphore(2)  # workers at once: to load and to warm up takes a core

QUEUE = f"rq:queue:{protocol.queue_name(MODEL)}"
LEASES = f"rq:wip:{protocol.queue_name(MODEL)}"
KEPT_FOR_EVER = {
    "rq:queues": "rq: the names of all queues there ever were",
    protocol.MODELS_KEY: "the ids of all models that were ever served",
    stats_key(MODEL): "what was counted, for 30 days after the last count: it outlives workers on purpose",
}

T = TypeVar("T")


class TestsEnd(Exception):
    """Nobody waits for the outcome any more."""


@dataclass(frozen=True)
class Ended:
    """A job as it was when it was first seen to have ended."""

    record: dict[str, str]
    events: list[tuple[str, dict[str, Any]]]
    pictures: list[bytes | None]

    @property
    def status(self) -> str:
        return self.record["status"]

    @property
    def attempts(self) -> int:
        return int(self.record.get("attempts", 0))


class Worker(Process):
    """A worker of a service."""

    def __init__(self, service: "Service", log: Path, mishaps: tuple[Mishap, ...], drain_s: float, hang_s: float | None) -> None:
        pictures = {"image_store": service.image_store, "result_ttl_s": RESULT_TTL_S}
        super().__init__(run, service.server.url, service.registry, log, mishaps, drain_s=drain_s, hang_s=hang_s, **pictures)
        self.log = log


class Service:
    """`with Service(…) as service:` starts the server; the end of the block is the audit of every job that was accepted."""

    def __init__(
        self,
        folder: Path,
        registry: Path,
        checkpoint: str,
        undisturbed: Callable[[GenerationRequest], list[bytes]],
        tests_end: threading.Event,
    ) -> None:
        """`undisturbed`: the PNGs that a request gives when nothing happens."""
        self.server, self.registry, self.checkpoint = RedisServer(folder), registry, checkpoint
        self.undisturbed, self._tests_end = undisturbed, tests_end
        self.image_store: str = REDIS
        self.redis: Any = Redis.from_url(self.server.url, **CONNECTION)
        self.workers: list[Worker] = []
        self.accepted: dict[str, GenerationRequest] = {}
        self.ended: dict[str, Ended] = {}

    def keep_pictures_in_a_folder(self) -> None:
        """Before anything else."""
        self.image_store = str(self.server.folder / "pictures")

    # Workers.

    def spawn(self, *mishaps: Mishap, drain_s: float = 10.0, hang_s: float | None = None) -> Worker:
        """Start one."""
        self.workers.append(Worker(self, self.server.folder / f"worker-{len(self.workers)}.log", mishaps, drain_s, hang_s))
        return self.workers[-1]

    def worker(self, *mishaps: Mishap, drain_s: float = 10.0, hang_s: float | None = None) -> Worker:
        """Start one; returns when it takes jobs, or has been struck already."""
        with _STARTING:
            worker = self.spawn(*mishaps, drain_s=drain_s, hang_s=hang_s)
            self.wait(lambda: not worker.alive or worker.stopped or self.name(worker), "a worker's start")
        return worker

    def name(self, worker: Worker) -> str:
        """rq's key of it; empty while rq does not know it."""
        keys = [key for key in self.redis.smembers("rq:workers") if self.redis.hget(key, "pid") == b"%d" % worker.pid]
        return keys[0].decode() if keys else ""

    def death(self, worker: Worker) -> int:
        """Its exit status, once it has ended."""
        self.wait(lambda: not worker.alive, "a worker's end")
        assert worker.status is not None
        return worker.status

    def stop(self, worker: Worker) -> None:
        """SIGTERM, which it must obey."""
        worker.signal(signal.SIGTERM)
        assert self.death(worker) == 0, worker.log.read_text()

    # Jobs.

    def with_store(self, work: Callable[[JobStore], Awaitable[T]], queue_limit: int = QUEUE_LIMIT) -> T:
        """Runs `await work(store)` over the store of an API."""

        async def main() -> T:
            connection, images = AsyncRedis.from_url(self.server.url, **CONNECTION), open_store(self.image_store)
            store = JobStore(self.redis, connection, queue_limit=queue_limit, result_ttl_s=RESULT_TTL_S, images=images)
            try:
                return await work(store)
            finally:
                store.pictures.close()
                await connection.aclose()

        return asyncio.run(main())

    def submit(self, *requests: GenerationRequest) -> list[str]:
        """All at once; the ids of the jobs that are there now. Raises what the API answers with."""

        async def work(store: JobStore) -> list[str]:
            return await asyncio.gather(*(store.submit(request, self.checkpoint) for request in requests))

        ids = self.with_store(work)
        self.accepted.update(zip(ids, requests, strict=True))
        return ids

    def cancel(self, job_id: str) -> str:
        """As `DELETE /jobs/{id}` does; the status that the job had."""
        return self.with_store(lambda store: store.cancel(job_id))

    def record(self, job_id: str) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.redis.hgetall(protocol.job_key(job_id)).items()}

    def events(self, job_id: str) -> list[tuple[str, dict[str, Any]]]:
        entries = self.redis.xrange(protocol.events_key(job_id))
        return [(fields[b"event"].decode(), json.loads(fields[b"data"])) for _, fields in entries]

    def attempts(self, job_id: str) -> int:
        return int(self.redis.hget(protocol.job_key(job_id), "attempts") or 0)

    def waiting(self) -> list[str]:
        """Ids in the queue, the next to run first."""
        return [job_id.decode() for job_id in self.redis.lrange(QUEUE, 0, -1)]

    def look(self) -> bool:
        """Take note of the jobs that have ended since, while their pictures are there; whether all have."""
        for job_id in [job_id for job_id in self.accepted if job_id not in self.ended]:
            record = self.record(job_id)
            if record["status"] in FINAL:
                self.ended[job_id] = Ended(record, self.events(job_id), self._pictures(job_id, record))
        return len(self.ended) == len(self.accepted)

    def _pictures(self, job_id: str, record: dict[str, str]) -> list[bytes | None]:
        indexes = [image["index"] for image in json.loads(record.get("images") or "[]")]
        fields = {name.encode(): value.encode() for name, value in record.items()}
        return self.with_store(lambda store: store.pictures.read(job_id, fields, indexes)) if indexes else []

    def settle(self) -> None:
        """Return when every job has ended."""
        self.wait(self.look, "the end of all jobs")

    def wait(self, holds: Callable[[], T], what: str, timeout_s: float = TIMEOUT_S) -> T:
        """The first true answer."""
        deadline = time.monotonic() + timeout_s
        while not (answer := holds()):
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
            if self._tests_end.wait(POLL_S):
                raise TestsEnd
        return answer

    # What was promised.

    def lease_ends_soon(self, worker: Worker) -> None:
        """A lease lives at most 30 s after its worker's death, by the server's clock. Call it when the worker has just died."""
        assert not worker.alive
        now = self.redis.time()[0]
        late = {lease: score - now for lease, score in self.redis.zrange(LEASES, 0, -1, withscores=True) if score - now > 30}
        assert not late, f"leases of a dead worker that live for longer: {late}"

    def runs_again(self, job_id: str, attempts: int = 2) -> None:
        """Within 60 s of now it has been started this often."""
        self.wait(lambda: self.attempts(job_id) >= attempts, f"attempt {attempts} of a job", timeout_s=60)

    def audit(self) -> None:
        """Each accepted job has one final state, one `done`, and the pictures of an undisturbed run; then its keys go."""
        if not any(worker.alive for worker in self.workers):
            self.worker()
        self.settle()
        for job_id, request in self.accepted.items():
            ended = self.ended[job_id]
            done = [data for name, data in ended.events if name == "done"]
            assert [data["status"] for data in done] == [ended.status] and ended.events[-1][0] == "done", ended
            expected = self.undisturbed(request) if ended.status == protocol.SUCCEEDED else []
            assert ended.pictures == expected, f"job {job_id} has other pictures than undisturbed: {ended.record}"
            later = self.record(job_id)
            assert not later or (later, self.events(job_id)) == (ended.record, ended.events), "a job changed after its end"
        self._everything_expires()

    def _everything_expires(self) -> None:
        """One worker stays and cleans up; when the longest time to live is over, only its own keys are there."""
        alive = [worker for worker in self.workers if worker.alive]
        for worker in alive[1:]:
            self.stop(worker)
        name = self.wait(lambda: self.name(alive[0]), "that rq knows the worker", timeout_s=60)  # again, where it was forgotten
        of_the_worker = {name, "rq:workers", f"rq:workers:{protocol.queue_name(MODEL)}", protocol.model_key(MODEL)}
        images = open_store(self.image_store)
        turns = {protocol.sweep_key(read_mark(images) or "", what) for what in ("expired", "strays")} if images else set()
        allowed = of_the_worker | set(KEPT_FOR_EVER) | turns
        try:
            self.wait(lambda: not self._keys() - allowed, "the end of every other key", timeout_s=RESULT_TTL_S + 120)
        except AssertionError as error:
            error.add_note(f"left, with seconds to live: { ({key: self.redis.ttl(key) for key in self._keys() - allowed}) }")
            raise
        assert not images or list(images.folders()) == [], "pictures that nobody would ever delete"
        assert self.redis.smembers("rq:workers") == {name.encode()}
        self.stop(alive[0])

    def _keys(self) -> set[str]:
        return {key.decode() for key in self.redis.keys("*")}

    # Beginning and end.

    def __enter__(self) -> "Service":
        self.server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None:
                self.audit()
        except BaseException as late:
            error = late
            raise
        finally:
            if error is not None:
                for worker in self.workers:
                    error.add_note(f"--- {worker.log.name}, status {worker.status}\n{worker.log.read_text()[-3000:]}")
            self.close()

    def close(self) -> None:
        for worker in self.workers:
            worker.signal(signal.SIGKILL)
        self.redis.close()
        with suppress(OSError):
            self.server.kill()
