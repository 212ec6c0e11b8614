"""What compose says, started and used as processes: a real redis-server, the API and a worker, until a picture is made and all is stopped.

The model is a tiny one, and nothing is compiled; everything else is the files'.
"""

import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from tests.chaos.redis_server import MISSING
from tests.chaos.tiny import MODEL, save_tiny
from tests.deploy.compose import CPU, ROOT, load
from tests.deploy.container import WAIT_S, Container, Host

QUICK = {"DIT_COMPILE": "false", "DIT_MAX_ROWS": "8", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A machine on which the first steps of docker-compose.yml were done."""
    assert shutil.which("redis-server"), MISSING
    steps = re.search(r"Needs one secret:\s+(.+)", (ROOT / "docker-compose.yml").read_text())
    assert steps
    subprocess.run(["bash", "-c", steps[1]], cwd=tmp_path, check=True, timeout=60)
    host = Host(tmp_path, load(*CPU), free_port(), free_port())
    save_tiny(host.volume("checkpoints"))
    return host


@pytest.fixture
def run(host: Host) -> Iterator[Callable[..., Container]]:
    """`run("api")`: started, and healthy by its own check."""
    started: list[Container] = []

    def start(name: str) -> Container:
        variables = {"api": {"DIT_PORT": str(host.api_port)}, "worker": QUICK}.get(name, {})
        started.append(Container(host, name, **variables).start())
        return started[-1].healthy()

    yield start
    for container in reversed(started):
        container.kill()


@pytest.fixture
def client(host: Host) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"http://127.0.0.1:{host.api_port}", timeout=WAIT_S, trust_env=False) as client:
        yield client


def test_what_compose_says_makes_a_picture_and_stops_in_time(host: Host, run: Callable[..., Container], client: httpx2.Client) -> None:
    redis = run("redis")
    api = run("api")
    assert client.get("/readyz").status_code == 503, "the API is healthy without a worker, and says what is missing"
    worker = Container(host, "worker", **QUICK)
    assert not worker.is_healthy()
    worker = run("worker")
    assert client.get("/readyz").json()["models"] == [MODEL]
    picture = client.post(
        "/generate", json={"class_label": "dog", "seed": 3}, headers={"Prefer": "wait=60", "Accept": "image/png"}, timeout=WAIT_S
    )
    assert picture.status_code == 200 and picture.content.startswith(b"\x89PNG"), picture.text

    password = host.secret("redis-password").read_text().strip()
    assert len(password) == 64
    for container in (redis, api, worker):
        assert password.encode() not in container.visible() and password not in container.said, container.name

    job = submit(client, steps=1000)
    assert worker.stop() == 0, "what it was given it ends, within the time to drain"
    assert client.get(f"/jobs/{job}").json()["status"] == "succeeded"
    assert not worker.is_healthy() and api.is_healthy()
    assert api.stop() in (0, -signal.SIGTERM), "uvicorn ends in order, and then by the signal that asked for it"
    assert redis.stop() == 0


def submit(client: httpx2.Client, **request: Any) -> str:
    """A job that runs."""
    answer = client.post("/generate", json={"class_label": 0, **request})
    assert answer.status_code == 202, answer.text
    job = str(answer.json()["id"])
    with client.stream("GET", f"/jobs/{job}/events") as events:
        assert any(line == "event: progress" for line in events.iter_lines())
    return job


def test_redis_wants_the_password_evicts_nothing_and_keeps_jobs_through_a_crash(
    host: Host, run: Callable[..., Container], client: httpx2.Client
) -> None:
    redis = run("redis")
    address: dict[str, Any] = {"port": host.redis_port, "protocol": 2}
    with Redis(**address) as stranger, pytest.raises(AuthenticationError):
        stranger.ping()
    with Redis(**address, password=host.secret("redis-password").read_text().strip()) as inside:
        settings = {name: inside.config_get(name)[name] for name in ("maxmemory", "maxmemory-policy", "appendonly", "save")}
        assert settings == {"maxmemory": str(1 << 30), "maxmemory-policy": "noeviction", "appendonly": "yes", "save": ""}
        inside.set("job", "waits")
    redis.kill()
    assert not redis.is_healthy()
    run("redis")
    with Redis(**address, password=host.secret("redis-password").read_text().strip()) as inside:
        assert inside.get("job") == b"waits"


def test_a_wrong_password_is_told_and_nothing_is_well(host: Host, run: Callable[..., Container], client: httpx2.Client) -> None:
    run("redis")
    run("api")
    other = host.folder / "other"
    other.write_text("not the password")
    with httpx2.Client(trust_env=False) as direct:
        assert direct.get(f"http://127.0.0.1:{host.api_port}/readyz").status_code == 503
    worker = Container(host, "worker", **QUICK, DIT_REDIS_PASSWORD_FILE=str(other)).start()
    assert worker.process and worker.process.wait(WAIT_S) == 78, "as it is configured, it would fail again"
    assert "dit: Redis does not let this worker in" in worker.said and "Traceback" not in worker.said
    assert not worker.is_healthy()
