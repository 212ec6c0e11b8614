"""The primary dies, its replica takes over: real Sentinels, a real worker, and the API and the commands beside them."""

import asyncio
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app.cli import app
from app.jobs import CONNECTION, JobStore
from app.main import create_app
from app.problems import Problem
from app.settings import Settings
from tests.chaos.processes import Process
from tests.chaos.redis_server import MISSING
from tests.chaos.tiny import picture_request, save_tiny
from tests.chaos.worker import run
from tests.deploy.sentinels import PAGE, PASSWORD, Group, wait
from tests.deploy.test_run import free_port
from worker import protocol
from worker.connect import connect, connect_async
from worker.patience import Patience

BODY = {"class_label": "dog", "seed": 3, "steps": 4}
LONG = {"class_label": "cat", "seed": 5, "steps": 1000, "num_images": 4}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    assert shutil.which("redis-server"), MISSING
    with Group(tmp_path, [free_port() for _ in range(5)]) as group:
        yield group


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(PASSWORD)
    return path


@pytest.fixture
def client(group: Group, password: Path) -> Iterator[TestClient]:
    settings = Settings(_env_file=None, redis_url=group.url, redis_password_file=password, queue_limit=100)
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def worker(group: Group, tmp_path: Path) -> Iterator[Process]:
    save_tiny(tmp_path / "registry")
    url = group.url.replace("://", f"://:{PASSWORD.replace(' ', '%20')}@")
    process = Process(run, url, tmp_path / "registry", tmp_path / "worker.log", (), drain_s=10.0, hang_s=None)
    yield process
    process.signal(9)


def ended(client: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    """The job, once it has ended."""

    def look() -> Any:
        answer = client.get(f"/jobs/{job['id']}")
        assert answer.status_code in (200, 503), answer.text
        return answer.json() if answer.status_code == 200 and answer.json()["finished_at"] else None

    return dict(wait(look, "the end of a job"))


def accepted(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    """The job, however often the API says that it is not to be had yet."""

    def post() -> Any:
        answer = client.post("/generate", json=body)
        assert answer.status_code == 202 or (answer.status_code == 503 and answer.headers["Retry-After"]), answer.text
        return answer.json() if answer.status_code == 202 else None

    return dict(wait(post, "a 202"))


def test_jobs_outlast_a_failover(
    group: Group, client: TestClient, worker: Process, tmp_path: Path, password: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait(lambda: client.get("/readyz").status_code == 200, f"a worker; its log is {tmp_path / 'worker.log'}")
    before = ended(client, accepted(client, BODY))
    jobs = [accepted(client, LONG) for _ in range(3)]
    wait(lambda: client.get(f"/jobs/{jobs[0]['id']}").json()["progress"]["step"] > 0, "a step")
    group.meet()
    group.follow()
    group.kill_primary()
    after = ended(client, accepted(client, BODY))

    assert [ended(client, job)["status"] for job in (before, after, *jobs)] == ["succeeded"] * 5
    assert worker.alive, (tmp_path / "worker.log").read_text()
    pictures = [client.get(f"/jobs/{job['id']}/images/0").content for job in (before, after)]
    assert pictures[0].startswith(b"\x89PNG") and pictures[0] == pictures[1]
    assert Redis.info(group.replica, "replication")["role"] == "master"
    assert client.get("/readyz").status_code == 200

    monkeypatch.setenv("DIT_REDIS_URL", group.url)
    monkeypatch.setenv("DIT_REDIS_PASSWORD_FILE", str(password))
    assert CliRunner().invoke(app, ["jobs", "dead"]).stdout == "no job was given up\n"


def test_a_failover_that_an_operator_asks_for_loses_no_write(group: Group) -> None:
    """The page's two commands: without the pause the old primary would take writes for some ten seconds more, which nobody gets."""
    pause = re.search(r"redis-cli client pause (\d+) (\w+)", PAGE)
    failover = re.search(r"redis-cli -p 26379 (sentinel failover mymaster)", PAGE)
    assert pause and failover
    group.meet()
    group.follow()
    with (
        connect(group.url, password=PASSWORD, protocol=2, socket_timeout=1.0) as client,
        Redis(port=group.ports[2], password=PASSWORD) as sentinel,
    ):
        client.set_retry(Patience(60))
        done = int(client.incr("calls"))
        group.primary.client_pause(int(pause[1]), all=pause[2] == "all")
        sentinel.execute_command(*failover[1].split())
        while Redis.info(group.replica, "replication")["role"] != "master":
            done = int(client.incr("calls"))
        assert client.incr("calls") == done + 1
        assert int(group.replica.get("calls") or 0) == done + 1


def test_what_the_replica_had_not_got_is_lost_and_the_api_says_so(group: Group) -> None:
    """Replication is asynchronous: a 202 says that the primary has the job."""

    async def scenario() -> None:
        options = {**CONNECTION, "password": PASSWORD}
        with connect(group.url, **options) as sync:
            connection = connect_async(group.url, **options)
            store = JobStore(sync, connection, queue_limit=100, result_ttl_s=600)
            group.meet()
            kept = await store.submit(picture_request(), "c" * 64)
            group.follow()
            group.replica.config_set("masterauth", "another")  # it cannot come back
            group.primary.client_kill_filter(_type="slave")
            lost = await store.submit(picture_request(), "c" * 64)
            group.kill_primary()
            wait(lambda: Redis.info(group.replica, "replication")["role"] == "master", "the failover")
            assert (await eventually(store, kept))["status"] == protocol.QUEUED
            with pytest.raises(Problem, match="there is no job") as problem:
                await store.get(lost)
            assert problem.value.status == 404
            await connection.aclose()

    asyncio.run(scenario())


async def eventually(store: JobStore, job_id: str) -> dict[str, Any]:
    """The job; the Sentinels may take a moment to say who is the primary."""
    while True:
        try:
            return await store.get(job_id)
        except RedisError:
            await asyncio.sleep(0.05)
