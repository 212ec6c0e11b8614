"""The process, Redis, the page and the documentation; all from this host."""

import re
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from redis import Redis
from starlette.testclient import TestClient

from app import jobs
from app.embedded import EmbeddedServer

STATIC = Path(__file__).parents[2] / "app" / "static"


def test_the_process_answers_without_anything_behind_it(bare_client: TestClient) -> None:
    assert bare_client.get("/healthz").json() == {"status": "ok"}


# --- without Redis -----------------------------------------------------------------------------------------------------


def test_every_call_is_503_with_a_time_to_come_back_while_redis_is_gone(
    mortal_server: EmbeddedServer, open_client: Callable[..., AbstractContextManager[TestClient]]
) -> None:
    calls = [
        ("POST", "/generate"),
        ("GET", "/models"),
        ("GET", "/models/tiny"),
        ("GET", "/readyz"),
        ("GET", "/queues"),
        ("POST", "/queues/tiny/pause"),
        *((verb, f"/jobs/019a0000-0000-7000-8000-000000000000{part}") for verb, part in [("GET", ""), ("DELETE", ""), ("GET", "/events")]),
    ]
    with open_client(redis_url=mortal_server.url) as client:
        assert client.get("/models").status_code == 200
        mortal_server.stop()
        for verb, path in calls:
            answer = client.request(verb, path, **({"json": {"class_label": 0}} if verb == "POST" else {}))
            assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json"), path
            assert int(answer.headers["retry-after"]) > 0 and "Redis" in answer.json()["detail"]
        assert client.get("/healthz").status_code == 200
        mortal_server.start()
        assert client.get("/models").status_code == 200


def test_a_scrape_with_a_key_that_has_a_rate_is_503_while_redis_is_gone_and_with_another_it_is_not(
    mortal_server: EmbeddedServer,
    open_client: Callable[..., AbstractContextManager[TestClient]],
    key_file: Path,
    bearer: Callable[..., dict[str, str]],
) -> None:
    limited, unlimited = bearer(per_minute=60), bearer("prometheus")
    with open_client(redis_url=mortal_server.url, api_keys_file=key_file) as client:
        mortal_server.stop()
        answer = client.get("/metrics", headers=limited)
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:dit:problem:redis-away")
        assert client.get("/metrics", headers=unlimited).status_code == 200


def test_every_call_that_writes_is_503_while_too_few_replicas_follow_redis(
    client: TestClient, submit: Callable[..., str], redis: Redis
) -> None:
    job_id = submit()
    redis.config_set("min-replicas-to-write", 1)
    try:
        answers = [
            client.post("/generate", json={"class_label": 0}),
            client.delete(f"/jobs/{job_id}"),
            *(client.post(f"/queues/tiny/{action}") for action in ("pause", "drain", "resume")),
            client.get("/readyz"),
        ]
    finally:
        redis.config_set("min-replicas-to-write", 0)
    for answer in answers:
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:dit:problem:redis-replicas"), answer.request.url
    assert client.delete(f"/jobs/{job_id}").status_code == 200


def test_a_redis_that_hangs_is_503_after_the_sockets_timeout(
    mortal_server: EmbeddedServer, open_client: Callable[..., AbstractContextManager[TestClient]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jobs.CONNECTION["socket_timeout"] <= 5
    monkeypatch.setitem(jobs.CONNECTION, "socket_timeout", 0.5)
    assert mortal_server.process
    with open_client(redis_url=mortal_server.url) as client:
        mortal_server.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        try:
            assert client.get("/readyz").status_code == 503
        finally:
            mortal_server.process.send_signal(signal.SIGCONT)
        assert time.monotonic() - began < 5


# --- the page ----------------------------------------------------------------------------------------------------------


def addresses(text: str) -> list[str]:
    """Everything that a browser would fetch or follow: src, href, url() and imports."""
    found = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)|url\(["']?([^"')]+)|(?:from|import)\s+["']([^"']+)""", text)
    return [next(filter(None, groups)) for groups in found]


def test_the_page_and_all_it_needs_come_from_here(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "/static/page.js" in addresses(page.text) and "/static/page.css" in addresses(page.text)
    for path in addresses(page.text):
        assert path.startswith("/") and not path.startswith("//")
        assert client.get(path).status_code == 200, path


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda path: path.name)
def test_each_file_of_the_page_refers_to_local_files_only(client: TestClient, path: Path) -> None:
    text = path.read_text()
    assert client.get(f"/static/{path.name}").content == path.read_bytes()
    assert all(address.startswith(("/", "./", "data:", "#")) for address in addresses(text))
    assert not re.findall(r"(?<!xmlns=\")https?://(?!www\.w3\.org/)", text)


def test_the_documentation_comes_from_here(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200 and "/openapi.json" in page.text
    assert addresses(page.text)
    for path in addresses(page.text):
        assert path.startswith("/") and client.get(path).status_code == 200, path
