"""`dit up` and what may happen to it: processes that die, Ctrl-C, and a world that is not as it should be."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from app.embedded import EmbeddedServer

QUICK_S = 60.0  # for what takes a second or two on an idle machine


# --- processes die -----------------------------------------------------------------------------------------------------


def test_a_job_survives_kill_9_of_its_worker(own_service: Callable[..., Any], long_job: dict[str, Any], long_pictures: list[bytes]) -> None:
    service = own_service().ready()
    job_id = service.submit(**long_job)
    service.running(job_id)
    first = service.child("app.cli worker")
    os.kill(first, signal.SIGKILL)
    assert service.pictures(job_id) == long_pictures
    assert service.child("app.cli worker") != first and "the worker ended (signal SIGKILL)" in service.stdout
    assert service.interrupt() == 0 and service.processes() == {}


def test_jobs_survive_kill_9_of_dit_up(own_service: Callable[..., Any], long_job: dict[str, Any], long_pictures: list[bytes]) -> None:
    service = own_service().ready()
    jobs = [service.submit(**long_job), *(service.submit(class_label=i, num_images=4) for i in range(3))]
    service.running(jobs[0])
    service.process.kill()
    service.process.wait()
    began = time.monotonic()
    while service.processes():
        assert time.monotonic() - began < 60, service.processes()
        time.sleep(0.1)
    service.start().ready()
    assert service.pictures(jobs[0]) == long_pictures
    assert [len(service.pictures(job)) for job in jobs[1:]] == [4, 4, 4]


def test_ctrl_c_ends_everything_in_order_and_the_job_goes_on_at_the_next_start(
    own_service: Callable[..., Any], long_job: dict[str, Any], long_pictures: list[bytes]
) -> None:
    service = own_service(DIT_DRAIN_SECONDS="0").ready()
    job_id = service.submit(**long_job)
    service.running(job_id)
    assert len(service.processes()) == 4  # dit up, its API, its worker, its server
    assert service.interrupt() == 0
    assert service.processes() == {}
    assert service.stdout.endswith("dit: stopping\n") and f"job {job_id} goes back to the queue" in service.stderr
    assert "Traceback" not in service.stderr
    assert service.start().ready().pictures(job_id) == long_pictures


def test_the_api_and_the_server_are_started_again_too(own_service: Callable[..., Any]) -> None:
    service = own_service().ready()
    before = service.picture(class_label=0, seed=1)
    for name in ("app.cli api", "valkey-server"):
        first = service.child(name)
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + QUICK_S
        while service.child(name) == first or not service.answers():
            assert time.monotonic() < deadline, service.stdout
            time.sleep(0.05)
        assert service.picture(class_label=0, seed=1) == before


# --- what it refuses, in one line --------------------------------------------------------------------------------------


def refusal(service: Any) -> str:
    """The one line it says on stderr; it must have ended by itself, soon, with an error."""
    assert service.ended(QUICK_S) not in (0, -signal.SIGKILL)
    (line,) = service.stderr.strip().splitlines()
    assert line.startswith("dit: ") and "ready:" not in service.stdout and service.processes() == {}
    return str(line)


def test_a_taken_port_is_told(own_service: Callable[..., Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refusal(own_service(DIT_PORT=str(port)))
    assert str(port) in line and "DIT_PORT" in line


def test_a_data_folder_that_cannot_be_written_is_told(own_service: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refusal(own_service(DIT_DATA=str(tmp_path / "file" / "data")))
    assert str(tmp_path / "file" / "data") in line and "DIT_DATA" in line


@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_a_missing_checkpoint_is_told(own_service: Callable[..., Any], tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "models").mkdir()
    line = refusal(own_service(DIT_CHECKPOINTS=str(tmp_path / "models")))
    assert "no checkpoint" in line and str(tmp_path / "models") in line and "DIT_CHECKPOINTS" in line


def test_a_wrong_variable_is_told(own_service: Callable[..., Any]) -> None:
    assert "DIT_MAX_ROWS=many" in refusal(own_service(DIT_MAX_ROWS="many"))


def test_keys_that_would_protect_nothing_are_refused(own_service: Callable[..., Any]) -> None:
    assert "DIT_API_KEYS_FILE" in refusal(own_service(DIT_API_KEYS_FILE="keys.json"))


def test_a_redis_that_does_not_answer_is_told(own_service: Callable[..., Any]) -> None:
    assert "DIT_REDIS_URL" in refusal(own_service(DIT_REDIS_URL="redis://127.0.0.1:9/0"))


def test_a_second_dit_up_on_the_same_data_is_refused(own_service: Callable[..., Any], service: Any) -> None:
    line = refusal(own_service(DIT_DATA=service.environment["DIT_DATA"]))
    assert "another `dit up`" in line and service.environment["DIT_DATA"] in line
    assert service.picture(class_label=0)  # the first goes on


def test_a_checkpoint_with_one_byte_changed_is_refused(own_service: Callable[..., Any], registry: Path, tmp_path: Path) -> None:
    shutil.copytree(registry, tmp_path / "models")
    damaged = tmp_path / "models" / "tiny" / "dit.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    service = own_service(DIT_CHECKPOINTS=str(tmp_path / "models"))
    assert service.ended(4 * QUICK_S) not in (0, -signal.SIGKILL)
    assert any(line.startswith("dit: ") and str(damaged) in line for line in service.stderr.splitlines()), service.stderr
    assert "Traceback" not in service.stderr and "ready:" not in service.stdout and service.processes() == {}


# --- what it adapts to -------------------------------------------------------------------------------------------------


def test_with_a_redis_of_ones_own_no_server_is_started(own_service: Callable[..., Any], tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "redis")
    server.start()
    try:
        service = own_service(DIT_REDIS_URL=server.url).ready()
        assert "using the Redis of DIT_REDIS_URL" in service.stdout
        assert len(service.processes()) == 3 and not any("valkey" in command for command in service.processes().values())
        job_id = service.submit(class_label=0)
        assert service.pictures(job_id)
        assert service.interrupt() == 0 and service.processes() == {}
        with Redis.from_url(server.url, protocol=2) as client:
            assert client.hget(f"dit:job:{job_id}", "status") == b"succeeded"
        assert not (Path(service.environment["DIT_DATA"]) / "valkey").exists()
    finally:
        server.stop()


def test_without_a_compiler_it_runs_uncompiled_and_says_so(own_service: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    service = own_service(DIT_COMPILE="true", PATH=str(tmp_path / "bin"), CXX="g++").ready()
    assert "no C++ compiler was found" in service.stderr
    assert service.picture(class_label=0)
