"""Stores of each kind, the API over one, and an S3 server."""

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.worker.engines import pictures
from tests.worker.stores.served import MakeRequest, Open
from worker import protocol
from worker.protocol import ModelRecord
from worker.runner import Runner


class S3Server:
    """A real S3 server in this process, which goes away and comes back with what it had."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._make, self._server = ThreadedMotoServer, ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def leave(self) -> None:
        self._server.stop()

    def come_back(self) -> None:
        self._server = self._make("127.0.0.1", port=self._port, verbose=False)
        self._server.start()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.leave()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an empty bucket, which the environment gives access to."""
    import s3fs

    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    given = {
        "ACCESS_KEY_ID": "of-tests",
        "SECRET_ACCESS_KEY": "top-secret",
        "ENDPOINT_URL_S3": s3_server.url,
        "EC2_METADATA_DISABLED": "true",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(skip_instance_cache=True).call_s3("create_bucket", Bucket=name)
    return name


@pytest.fixture(params=["redis", "folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        return "redis"
    return str(tmp_path / "pictures") if request.param == "folder" else f"s3://{request.getfixturevalue('bucket')}/pictures"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where only what a folder is matters."""
    return tmp_path / "pictures"


@pytest.fixture
def open_api(redis_url: str, redis: Redis, record: ModelRecord) -> Open:
    """`with open_api(image_store=…) as client`: the API, while a worker serves the tiny model."""

    @contextmanager
    def opened(**settings: Any) -> Iterator[TestClient]:
        redis.set(protocol.model_key(record.id), record.dump())
        redis.sadd(protocol.MODELS_KEY, record.id)
        settings = {"redis_url": redis_url, "queue_limit": 1000, "result_ttl": 600, **settings}
        with TestClient(create_app(Settings(_env_file=None, **settings))) as client:
            yield client

    return opened


@pytest.fixture(params=["folder", "s3"])
def outside(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of a store that is not Redis."""
    return str(tmp_path / "pictures") if request.param == "folder" else f"s3://{request.getfixturevalue('bucket')}/pictures"


_DRAWN: list[bytes] = []


@pytest.fixture
def expected(make_runner: Callable[..., Runner], make_request: MakeRequest) -> list[bytes]:
    """The pictures of BODY, by an engine without any store."""
    if not _DRAWN:
        made = pictures(make_runner(max_rows=8), {"job": make_request(class_labels=(0, 1, None))})
        _DRAWN.extend(made["job", index] for index in range(3))
    return _DRAWN
