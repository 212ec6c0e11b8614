"""The API in this process over a real server; what a worker would write there, the tests write."""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from redis import Redis
from starlette.testclient import TestClient

from app.door import Door
from app.embedded import EmbeddedServer
from app.keys import create_key
from app.main import create_app
from app.settings import Settings
from tests.app.described import FAULTS, watch
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
    return watch(create_app(Settings(_env_file=None, **{"redis_url": server.url, "queue_limit": 1000, "result_ttl": 600, **changes})))


@pytest.fixture(autouse=True)
def described() -> Iterator[None]:
    """What the test's answers were is what the API's description says."""
    FAULTS.clear()
    yield
    assert FAULTS == []


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
def on_port(listen: Callable[..., AbstractContextManager[str]], record: ModelRecord) -> Callable[..., AbstractContextManager[int]]:
    """`with on_port(**settings) as port`: the API behind a real socket, where a stream comes as it is sent, while one model is served."""

    @contextmanager
    def opened(**settings: Any) -> Iterator[int]:
        with listen(**settings) as url:
            yield int(url.rpartition(":")[2])

    return opened


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


# --- over sockets ------------------------------------------------------------------------------------------------------


@contextmanager
def listening(app: Any, port: int = 0) -> Iterator[str]:
    """The application on a port of this host, served by a thread; its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, http=Door, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield "http://{}:{}".format(*server.servers[0].sockets[0].getsockname())
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def listen(server: EmbeddedServer) -> Callable[..., AbstractContextManager[str]]:
    """`with listen(app, port) as url`: an application; by default the API, with these settings."""

    def listen(app: Any = None, port: int = 0, **settings: Any) -> AbstractContextManager[str]:
        return listening(app_over(server, **settings) if app is None else app, port)

    return listen


@pytest.fixture(scope="session")
def shared_url(listen: Callable[..., AbstractContextManager[str]]) -> Iterator[str]:
    with listen() as url:
        yield url


@pytest.fixture
def bare_url(shared_url: str, redis: Redis) -> str:
    """The address of the API while no worker serves a model."""
    return shared_url


@pytest.fixture
def url(bare_url: str, record: ModelRecord) -> str:
    """The address of the API while one model is served."""
    return bare_url


class Wire:
    """What lies between a client and a server: it can be cut, lose answers, and knows what the client said."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.said: list[bytes] = []
        self.answers_to_lose = 0
        self._target, self._listener = target, socket.create_server(("127.0.0.1", 0))
        self.url = "http://{}:{}".format(*self._listener.getsockname())
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._ends.append(near)
                far = socket.create_connection(self._target)
                self._ends.append(far)
                self._start(self._carry, near, far, True)
                self._start(self._carry, far, near, False)

    def _carry(self, source: socket.socket, sink: socket.socket, forth: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if forth:
                    self.said.append(data)
                elif self.answers_to_lose:
                    self.answers_to_lose -= 1
                    break
                sink.sendall(data)
        _hang_up(source, sink)

    def cut(self) -> None:
        _hang_up(*self._ends)

    def close(self) -> None:
        _hang_up(self._listener, *self._ends)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()


def _hang_up(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):  # the other side was first
            each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def wire(url: str) -> Iterator[Wire]:
    """A wire to the API while one model is served."""
    host, port = url.removeprefix("http://").split(":")
    wire = Wire((host, int(port)))
    yield wire
    wire.close()


@pytest.fixture
def paint(worker: Worker) -> Callable[..., dict[str, Any]]:
    """`paint(job_id, index, seed)`: a finished picture with its true sha256, kept and told as a worker does; its bytes tell the seed."""

    def paint(job_id: str, index: int = 0, seed: int = 7) -> dict[str, Any]:
        png = b"\x89PNG\r\n\x1a\n of seed %d" % seed
        entry = {"index": index, "seed": seed, "sha256": hashlib.sha256(png).hexdigest(), "bytes": len(png)}
        worker.results.store_image(job_id, "execution-1", index, png, 600)
        worker.tell(job_id, "image", {**entry, "url": f"/jobs/{job_id}/images/{index}"})
        return entry

    return paint
