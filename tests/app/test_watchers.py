"""Event streams whose clients are slow, silent or gone, over real sockets: nothing of them stays, and nobody else waits."""

import os
import re
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import httpx2
import pytest
from redis import Redis
from starlette.testclient import TestClient

from app import door, watchers
from app.problems import Problem
from app.watchers import Watchers
from worker.connect import KEPT

OnPort = Callable[..., AbstractContextManager[int]]
MANY = 300
PREVIEW = {"index": 0, "step": 1, "steps": 50, "image": "data:image/png;base64," + "x" * 100_000}


@pytest.fixture
def gone_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "GONE_S", 1)


@contextmanager
def asked(port: int, path: str, *, reads: bool = True) -> Iterator[socket.socket]:
    """A connection on which this was asked for, and the head of the answer read; one that reads no more has little room."""
    with socket.socket() as connection:
        if not reads:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        assert head.startswith(b"HTTP/1.1 200"), head
        yield connection


def call(port: int, method: str, path: str, **options: Any) -> httpx2.Response:
    return httpx2.request(method, f"http://127.0.0.1:{port}{path}", timeout=60, trust_env=False, **options)


def rest(connection: socket.socket, pause_s: float = 0.0) -> bytes:
    """All that comes until the server has closed it, taken in small pieces."""
    told = b""
    while piece := connection.recv(1 << 15):
        told += piece
        time.sleep(pause_s)
    return told


def open_streams(port: int) -> int:
    return int(float(re.findall(r"^dit_event_streams (\S+)$", call(port, "GET", "/metrics").text, re.MULTILINE)[0]))


def comes_to(expected: int, look: Callable[[], int]) -> bool:
    """Whether it falls to this, sooner or later."""
    deadline = time.monotonic() + 60
    while (seen := look()) > expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return seen <= expected


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_client_that_never_reads_is_given_up(
    gone_after_a_second: None, on_port: OnPort, submit: Callable[..., str], worker: Any, client: TestClient
) -> None:
    job_id = worker.take(submit())
    with on_port() as port:
        before = files()
        with asked(port, f"/jobs/{job_id}/events", reads=False) as stalled:
            assert open_streams(port) == 1
            for _ in range(100):
                worker.tell(job_id, "preview", PREVIEW)
            assert comes_to(0, lambda: open_streams(port))
            with pytest.raises(ConnectionResetError):
                rest(stalled)
        assert comes_to(before + KEPT, files)
        assert worker.succeed(job_id)


def test_a_slow_client_that_reads_on_loses_nothing(on_port: OnPort, submit: Callable[..., str], worker: Any) -> None:
    job_id = worker.take(submit())
    for number in range(30):
        worker.tell(job_id, "preview", {**PREVIEW, "step": number})
    worker.succeed(job_id)
    with on_port() as port, asked(port, f"/jobs/{job_id}/events", reads=False) as slow:
        told = rest(slow, pause_s=0.002)
    assert [int(number) for number in re.findall(rb'"index": 0, "step": (\d+)', told)] == list(range(30)) and b"event: done" in told


def test_a_client_that_breaks_off_leaves_nothing(on_port: OnPort, submit: Callable[..., str]) -> None:
    job_id = submit()
    with on_port() as port:
        with asked(port, f"/jobs/{job_id}/events") as connection:
            assert open_streams(port) == 1
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, and no farewell
        assert comes_to(0, lambda: open_streams(port))


def test_hundreds_of_streams_are_told_all_and_leave_nothing(on_port: OnPort, submit: Callable[..., str], worker: Any, redis: Redis) -> None:
    job_id = worker.take(submit())
    with on_port() as port:
        call(port, "GET", "/models")
        clients, open_files = redis.info("clients")["connected_clients"], files()
        with ExitStack() as streams:
            opened = [streams.enter_context(asked(port, f"/jobs/{job_id}/events")) for _ in range(MANY)]
            assert open_streams(port) == MANY and call(port, "GET", f"/jobs/{job_id}").json()["status"] == "running"
            worker.succeed(job_id)
            for stream in opened[: MANY // 2]:
                assert b"event: done" in rest(stream)
        assert comes_to(0, lambda: open_streams(port))
        assert comes_to(clients + KEPT, lambda: redis.info("clients")["connected_clients"])
        assert comes_to(open_files + KEPT, files)


def test_a_connection_on_which_nothing_is_asked_is_closed(gone_after_a_second: None, on_port: OnPort) -> None:
    with on_port() as port, socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        assert connection.recv(1) == b""


# --- bounds ------------------------------------------------------------------------------------------------------------


def test_where_no_place_is_left_a_stream_is_503_a_wait_is_not_waited_and_all_else_goes_on(
    on_port: OnPort, monkeypatch: pytest.MonkeyPatch, submit: Callable[..., str]
) -> None:
    monkeypatch.setattr(watchers, "MOST", 2)
    job_id = submit()
    with on_port() as port, ExitStack() as streams:
        for _ in range(2):
            streams.enter_context(asked(port, f"/jobs/{job_id}/events"))
        refused = call(port, "GET", f"/jobs/{job_id}/events")
        assert (refused.status_code, refused.json()["type"]) == (503, "urn:dit:problem:streams-full")
        assert refused.headers["retry-after"] == "5" and refused.headers["content-type"] == "application/problem+json"
        unwaited = call(port, "POST", "/generate", headers={"Prefer": "wait=60"}, json={"class_label": 0})
        assert (unwaited.status_code, unwaited.json()["status"]) == (202, "queued") and "preference-applied" not in unwaited.headers
        assert call(port, "GET", f"/jobs/{job_id}").status_code == 200
        streams.close()
        assert comes_to(0, lambda: open_streams(port))
        with asked(port, f"/jobs/{job_id}/events"):
            assert open_streams(port) == 1


def test_no_key_takes_the_places_of_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "MOST", 8)
    crowd, seen = Watchers(), []
    with ExitStack() as places:
        for owner in ("ann", "bob", "eve"):
            while (problem := crowd.refusal(owner)) is None:
                places.enter_context(crowd.place(owner))
                seen.append(owner)
            assert problem.status == 429 and problem.retry_after_s and f"key {owner}" in problem.detail
    assert [seen.count(owner) for owner in ("ann", "bob", "eve")] == [4, 2, 1]
    assert crowd.refusal("ann") is None


def test_a_process_that_may_open_few_files_has_fewer_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    assert Watchers().most == 412


def test_a_process_may_open_as_many_files_as_the_system_lets_it() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
        door.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(65_536, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_place_is_given_back_however_the_block_ends() -> None:
    crowd = Watchers()
    with pytest.raises(Problem), crowd.place("ann"):
        raise Problem(404, "a test")
    assert crowd._by_owner.total() == 0
