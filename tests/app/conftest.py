"""The API in this process over a real server; what a worker would write there, the tests write."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from redis import Redis
from starlette.testclient import TestClient

from app.embedded import EmbeddedServer
from app.keys import create_key
from app.main import create_app
from app.settings import Settings
from worker import protocol
from worker.protocol import ModelRecord
from worker.results import JobResults

QUEUE = f"rq:queue:{protocol.queue_name('tiny')}"
RECORD = ModelRecord(
    id="tiny",
    checkpoint="c0ffee" * 10 + "c0de",
    labels=[["cat", "house cat"], ["dog"], ["ship"], ["truck", "lorry"]],
    image_size=16,
    image_channels=1,
    objective="flow",
    samplers=["euler"],
    max_steps=1000,
    defaults={"steps": 4, "guidance_scale": 2.0, "sampler": "euler"},
    quality={"draft": {"steps": 2}, "best": {"steps": 50, "guidance_scale": 3.5}},
    metrics={"class_consistency": 0.97},
    device="cpu",
    dtype="float32",
    max_rows=8,
)


def app_over(server: EmbeddedServer, **changes: Any) -> FastAPI:
    """The application with these settings, whatever the shell's DIT_* are."""
    return create_app(Settings(_env_file=None, **{"redis_url": server.url, "queue_limit": 1000, "result_ttl": 600, **changes}))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def mortal_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """One that a test may stop."""
    server = EmbeddedServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis(server: EmbeddedServer) -> Iterator[Redis]:
    """An empty server."""
    with Redis.from_url(server.url, protocol=2) as client:
        client.flushall()
        yield client


@pytest.fixture(scope="session")
def shared_client(server: EmbeddedServer) -> Iterator[TestClient]:
    with TestClient(app_over(server)) as client:
        yield client


@pytest.fixture
def bare_client(shared_client: TestClient, redis: Redis) -> TestClient:
    """The API while no worker serves a model. An error that no handler takes is raised into the test."""
    return shared_client


@pytest.fixture
def serve(redis: Redis) -> Callable[..., ModelRecord]:
    """`serve(**changes)`: the record that a worker keeps while it serves a model."""

    def write(**changes: Any) -> ModelRecord:
        record = replace(RECORD, **changes)
        redis.set(protocol.model_key(record.id), record.dump(), ex=protocol.MODEL_TTL_S)
        redis.sadd(protocol.MODELS_KEY, record.id)
        return record

    return write


@pytest.fixture
def record(serve: Callable[..., ModelRecord]) -> ModelRecord:
    return serve()


@pytest.fixture
def live(redis: Redis) -> Callable[..., None]:
    """`live(ttl_s=30)`: what rq knows of a worker of the tiny model that was heard of as long ago as this says."""

    def write(ttl_s: int = protocol.WORKER_TTL_S) -> None:
        key = "rq:worker:of-a-test"
        redis.hset(key, "pid", 1)
        redis.expire(key, ttl_s)
        redis.sadd("rq:workers:dit-tiny", key)

    return write


@pytest.fixture
def client(bare_client: TestClient, record: ModelRecord) -> TestClient:
    """The API while one model is served."""
    return bare_client


@pytest.fixture
def open_client(server: EmbeddedServer, record: ModelRecord) -> Callable[..., AbstractContextManager[TestClient]]:
    """`with open_client(queue_limit=1) as client`: the API with other settings."""

    @contextmanager
    def opened(**settings: Any) -> Iterator[TestClient]:
        with TestClient(app_over(server, **settings)) as client:
            yield client

    return opened


@pytest.fixture
def listen(server: EmbeddedServer, record: ModelRecord) -> Callable[..., AbstractContextManager[int]]:
    """`with listen(**settings) as port`: the API behind a real socket, where a stream comes as it is sent."""

    @contextmanager
    def listening(**settings: Any) -> Iterator[int]:
        api = uvicorn.Server(uvicorn.Config(app_over(server, **settings), port=0, log_level="warning", ws="none"))
        thread = threading.Thread(target=api.run)
        thread.start()
        while not api.started and thread.is_alive():
            time.sleep(0.01)
        yield api.servers[0].sockets[0].getsockname()[1]
        api.should_exit = True
        thread.join()

    return listening


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """Where `bearer` makes its keys; not there before the first."""
    return tmp_path / "keys.json"


@pytest.fixture
def bearer(key_file: Path) -> Callable[..., dict[str, str]]:
    """`bearer("alice", scope="generate", **limits)`: makes a key and returns the header that shows it."""

    def make(name: str = "alice", scope: str = "generate", **limits: int) -> dict[str, str]:
        return {"Authorization": f"Bearer {create_key(key_file, name, scope, **limits)[1]}"}

    return make


@pytest.fixture
def submit(client: TestClient) -> Callable[..., str]:
    """`submit(**request)`: queues a job of class 0 and returns its id."""

    def post(**request: Any) -> str:
        answer = client.post("/generate", json={"class_label": 0, **request})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    return post


@contextmanager
def running(work: Callable[[], object]) -> Iterator[None]:
    """Do this in a thread; what it raises is raised at the end."""
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(work)
        yield
        task.result()


class Worker:
    """What a worker writes about one job, by the worker's own code, without a device."""

    def __init__(self, redis: Redis) -> None:
        self.redis, self.results = redis, JobResults(redis)

    def take(self, job_id: str | None = None) -> str:
        """Lease a job, by default the next of the queue."""
        if job_id is None:
            deadline = time.monotonic() + 30
            while (waiting := self.redis.lindex(QUEUE, 0)) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert waiting, "no job came"
            job_id = waiting.decode()
        self.redis.lrem(QUEUE, 1, job_id)
        assert self.results.start(job_id, "execution-1") == "run"
        return job_id

    def tell(self, job_id: str, event: str, data: dict[str, Any], step: int | None = None) -> str:
        return self.results.tell(job_id, "execution-1", event, data, step)

    def picture(self, job_id: str, index: int = 0, png: bytes = b"\x89PNG\r\n\x1a\n of a test") -> dict[str, Any]:
        self.results.store_image(job_id, "execution-1", index, png, 600)
        entry = {"index": index, "seed": 7 + index, "sha256": "0" * 64, "bytes": len(png)}
        self.tell(job_id, "image", {**entry, "url": f"/jobs/{job_id}/images/{index}"})
        return entry

    def succeed(self, job_id: str, count: int = 1) -> str:
        assert self.results.succeed(job_id, "execution-1", [self.picture(job_id, i) for i in range(count)])
        return job_id

    def fail(self, job_id: str, message: str) -> str:
        assert self.results.fail(job_id, "execution-1", message)
        return job_id

    @contextmanager
    def meanwhile(self, work: Callable[["Worker", str], object]) -> Iterator[None]:
        """Take the next job that is queued, in a thread, and do this with it."""
        with running(lambda: work(self, self.take())):
            yield


@pytest.fixture
def worker(redis: Redis) -> Worker:
    return Worker(redis)
