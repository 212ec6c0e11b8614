"""What docs/operations.md says of a backup of Redis, done: a copy is restored, and serves its jobs."""

import asyncio
import re
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from redis import Redis

from app.jobs import CONNECTION, JobStore
from tests.chaos.processes import Process
from tests.chaos.redis_server import MISSING, RedisServer
from tests.chaos.tiny import picture_request, save_tiny
from tests.chaos.worker import run
from tests.deploy.compose import ROOT
from tests.deploy.sentinels import wait
from worker.connect import connect_async

PAGE = (ROOT / "docs" / "operations.md").read_text().partition("## Backup")[2].partition("\n## ")[0]

T = TypeVar("T")


def with_store(url: str, work: Callable[[JobStore], Awaitable[T]]) -> T:
    async def main() -> T:
        connection = connect_async(url, **CONNECTION)
        with Redis.from_url(url, **CONNECTION) as sync:
            answer = await work(JobStore(sync, connection, queue_limit=100, result_ttl_s=3600))
        await connection.aclose()
        return answer

    return asyncio.run(main())


def submit(url: str, checkpoint: str) -> str:
    return with_store(url, lambda store: store.submit(picture_request(), checkpoint))


def job(url: str, job_id: str) -> dict[str, Any]:
    return with_store(url, lambda store: store.get(job_id))


def picture(url: str, job_id: str) -> bytes:
    return with_store(url, lambda store: store.image(job_id, 0))[0]


def words(command: str, **places: Path) -> list[str]:
    """A command of the page, with folders of this machine in the places of its own."""
    (line,) = re.findall(rf"{command}[^\n`]*", PAGE)
    for place in sorted(places, key=len, reverse=True):
        line = line.replace(f"/{place}", str(places[place]))
    return line.split()


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert shutil.which("redis-server"), MISSING
    return tmp_path_factory.mktemp("b")  # a socket's path must be short


@pytest.fixture
def start(folder: Path) -> Any:
    """`start("name")`: a server on the folder of this name."""
    servers: list[RedisServer] = []

    def begin(name: str) -> RedisServer:
        servers.append(RedisServer(folder / name))
        servers[-1].start()
        return servers[-1]

    yield begin
    for server in servers:
        server.kill()


@pytest.fixture
def work(folder: Path) -> Any:
    """`work(url, job)`: a worker runs until this job has ended, and then stops."""
    checkpoint = save_tiny(folder / "registry")
    processes: list[Process] = []

    def serve(url: str, job_id: str) -> None:
        processes.append(Process(run, url, folder / "registry", folder / "worker.log", (), drain_s=10.0, hang_s=None))
        wait(lambda: job(url, job_id)["finished_at"], "the end of a job")
        processes[-1].signal(signal.SIGTERM)
        wait(lambda: not processes[-1].alive, "the worker's end")

    serve.checkpoint = checkpoint  # type: ignore[attr-defined]
    yield serve
    for process in processes:
        process.signal(signal.SIGKILL)


def test_a_restored_copy_serves_the_jobs_that_ended_and_runs_those_that_waited(folder: Path, start: Any, work: Any) -> None:
    before = start("before")
    ended = submit(before.url, work.checkpoint)
    work(before.url, ended)
    waits, kept = submit(before.url, work.checkpoint), picture(before.url, ended)

    # While it runs, by a replica's way; and stopped, its folder as it is.
    live = folder / "live"
    live.mkdir()
    subprocess.run(["redis-cli", "-s", str(before.socket), "--rdb", str(live / "redis.rdb")], check=True, capture_output=True)
    before.kill()
    backup, after = folder / "backup", folder / "after"
    backup.mkdir()
    after.mkdir()
    subprocess.run(words("tar -C /data -czf", data=before.folder, backup=backup), check=True)
    subprocess.run(words("tar -C /data -xzf", data=after, backup=backup), check=True)

    for restored in (from_rdb(live, start), start("after")):
        assert [job(restored.url, job_id)["status"] for job_id in (ended, waits)] == ["succeeded", "queued"]
        assert picture(restored.url, ended) == kept
    work(restored.url, waits)
    assert picture(restored.url, waits) == kept, "the same request gives the same picture"


def from_rdb(folder: Path, start: Any) -> RedisServer:
    """The page's words: a server without an append-only file reads the copy, and writes one."""
    options = re.findall(r"redis-server --dir /data (--[^\n`]*)", PAGE)[0].split()
    socket = folder / "first.sock"
    process = subprocess.Popen(["redis-server", "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), *options])
    with Redis.from_url(f"unix://{socket}", protocol=2) as redis:
        wait(redis.ping, "a server")
        redis.config_set("appendonly", "yes")
        wait(lambda: redis.info("persistence")["aof_rewrite_in_progress"] == 0 and (folder / "appendonlydir").exists(), "its file")
        redis.shutdown(nosave=True)
    process.wait()
    return start(folder.name)
