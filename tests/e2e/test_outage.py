"""Redis is killed under a running service and comes back after some seconds: what is told meanwhile, and that all goes on by itself."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.embedded import EmbeddedServer

AWAY_S = 4.0
TIMEOUT_S = 240.0
JOB = "019a0000-0000-7000-8000-000000000000"
WITHOUT_REDIS = {("get", "/healthz"), ("get", "/metrics")}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


def kill(server: EmbeddedServer) -> None:
    assert server.process
    server.process.kill()
    server.process.wait()


def refused(answer: httpx2.Response) -> bool:
    """Whether it says what is the matter, and when to come back."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert int(answer.headers["retry-after"]) > 0 and answer.json()["type"] == "urn:dit:problem:redis-away"
    return answer.status_code == 503


def routes(service: Any) -> list[tuple[str, str]]:
    """Method and path of all that the API describes, for a job that could be."""
    paths = service.client.get("/openapi.json").json()["paths"]
    names = {"job_id": JOB, "index": "0", "model": "tiny", "model_id": "tiny"}
    return [(method, path.format(**names)) for path, methods in paths.items() for method in methods if (method, path) not in WITHOUT_REDIS]


def follow(service: Any, job_id: str, listens: threading.Event | None = None) -> tuple[list[tuple[str, str]], list[int]]:
    """Id and name of every event to the last, as a client hears of them that comes back with the id it has; and each stream's status."""
    events: list[tuple[str, str]] = []
    answers: list[int] = []
    deadline = time.monotonic() + TIMEOUT_S
    while not (events and events[-1][1] == "done"):
        assert time.monotonic() < deadline, events[-1:]
        headers = {"Last-Event-ID": events[-1][0]} if events else {}
        with service.client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as stream:
            answers.append(stream.status_code)
            if listens:
                listens.set()
            lines = [line.split(": ", 1) for line in stream.iter_lines() if line and not line.startswith(":")]
        told = [value for name, value in lines if name in ("id", "event")]
        events += zip(told[::2], told[1::2], strict=True)
        time.sleep(0.2)
    return events, answers


def test_redis_away_is_told_everywhere_and_then_every_job_ends_once(
    own_service: Callable[..., Any], server: EmbeddedServer, long_job: dict[str, Any], long_pictures: list[bytes]
) -> None:
    service = own_service(DIT_REDIS_URL=server.url).ready()
    jobs = [service.submit(**long_job), *(service.submit(class_label=i, num_images=2, seed=i) for i in range(4))]
    with ThreadPoolExecutor(1) as listener:
        service.running(jobs[0])
        following = listener.submit(follow, service, jobs[0], listens := threading.Event())
        assert listens.wait(TIMEOUT_S)
        kill(server)
        for method, path in (asked := routes(service)):
            body = {"json": {"class_label": 0}} if path == "/generate" else {}
            assert refused(service.client.request(method.upper(), path, **body)), path
        assert len(asked) > 10
        assert service.client.get("/healthz").status_code == 200
        assert "dit_redis_up 0.0" in service.client.get("/metrics").text
        time.sleep(AWAY_S)
        server.start()
        events, answers = following.result()
    assert service.pictures(jobs[0]) == long_pictures
    assert [len(service.pictures(job)) for job in jobs[1:]] == [2] * 4
    assert set(answers) <= {200, 503} and answers[0] == answers[-1] == 200 and len(answers) > 1
    ids = [tuple(map(int, event_id.split("-"))) for event_id, _ in events]
    assert ids == sorted(set(ids)) and [name for _, name in events].count("done") == 1
    assert events == follow(service, jobs[0])[0]
    ended = re.findall(r'^dit_jobs_ended_total\{.*status="(\w+)".*\} (\S+)$', service.client.get("/metrics").text, re.MULTILINE)
    assert {status: float(count) for status, count in ended if float(count)} == {"succeeded": float(len(jobs))}
