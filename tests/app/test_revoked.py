"""After a key is revoked: what it had open ends, what it owned stays its own."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from starlette.testclient import TestClient

from app import jobs as api_jobs
from app.auth import KeyFile, dump_keys, read_keys
from app.client import ApiError, Client, ProgressEvent
from app.keys import revoke_key
from worker import protocol

Bearer = Callable[..., dict[str, str]]
Listen = Callable[..., AbstractContextManager[int]]
PATIENCE_S = 50  # of a socket: what is to end by itself does so long before


@pytest.fixture(autouse=True)
def quick_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_jobs, "_BLOCK_S", 0.05)


@pytest.fixture
def port(on_port: Listen, key_file: Path, bearer: Bearer) -> Iterator[int]:
    bearer("root", scope="admin")
    with on_port(api_keys_file=key_file) as port:
        yield port


def revoke(key_file: Path, name: str) -> None:
    (entry,) = [key for key in read_keys(key_file) if key.name == name and not key.disabled]
    revoke_key(key_file, entry.id)


@contextmanager
def ask(port: int, verb: str, path: str, headers: dict[str, str], body: str | None = None) -> Iterator[http.client.HTTPResponse]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.request(verb, path, body, {"Content-Type": "application/json", **headers})
        with connection.getresponse() as answer:
            yield answer


def submit(port: int, headers: dict[str, str]) -> str:
    with ask(port, "POST", "/generate", headers, '{"class_label": 0}') as answer:
        assert answer.status == 202
        return answer.headers["location"].removeprefix("/jobs/")


# --- what it had open --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True], ids=["silent", "busy"])
def test_an_open_stream_of_events_ends_without_done(port: int, key_file: Path, bearer: Bearer, worker: Any, busy: bool) -> None:
    """Whether the job says nothing and there are pings, or so much that there are none."""
    alice = bearer("alice")
    job_id = worker.take(submit(port, alice))
    with ask(port, "GET", f"/jobs/{job_id}/events", alice) as stream:
        assert stream.status == 200 and stream.readline().startswith(b"id: ")
        over = threading.Event()

        def chatter() -> None:
            while busy and not over.wait(0.01):
                worker.tell(job_id, "progress", {"step": 1, "steps": 4}, step=1)

        talking = threading.Thread(target=chatter)
        talking.start()
        try:
            revoke(key_file, "alice")
            rest = stream.read()  # to its end, which is here although the job goes on
        finally:
            over.set()
            talking.join()
    assert b"event: done" not in rest
    with ask(port, "GET", f"/jobs/{job_id}/events", alice) as again:
        assert again.status == 401


def test_a_request_that_waits_for_its_picture_is_401(port: int, key_file: Path, bearer: Bearer, redis: Redis) -> None:
    answers: list[tuple[int, str | None, bytes]] = []

    def wait(headers: dict[str, str]) -> None:
        with ask(port, "POST", "/generate", {**headers, "Prefer": "wait=60"}, '{"class_label": 0}') as answer:
            answers.append((answer.status, answer.headers["www-authenticate"], answer.read()))

    waiting = threading.Thread(target=wait, args=[bearer("alice")])
    waiting.start()
    redis.blmove("rq:queue:dit-tiny", "rq:queue:dit-tiny", PATIENCE_S)  # it is there
    revoke(key_file, "alice")
    waiting.join()
    ((status, challenge, body),) = answers
    assert (status, challenge) == (401, "Bearer") and b"revoked" in body


@pytest.mark.parametrize("change", ["removed", "other scope", "other secret"])
def test_whatever_makes_a_key_another_ends_it(port: int, key_file: Path, bearer: Bearer, worker: Any, change: str) -> None:
    alice = bearer("alice", scope="admin")
    job_id = worker.take(submit(port, alice))
    with ask(port, "GET", f"/jobs/{job_id}/events", alice) as stream:
        stream.readline()
        root, entry = read_keys(key_file)
        if change == "removed":
            key_file.write_bytes(dump_keys([root]))
        else:
            changes = {"scope": "generate"} if change == "other scope" else {"sha256": "0" * 64}
            key_file.write_bytes(dump_keys([root, replace(entry, **changes)]))
        assert b"event: done" not in stream.read()


def test_other_keys_and_other_limits_of_the_same_key_end_nothing(port: int, key_file: Path, bearer: Bearer, worker: Any) -> None:
    alice = bearer("alice", per_minute=1000)
    bearer("bob")
    job_id = worker.take(submit(port, alice))
    with ask(port, "GET", f"/jobs/{job_id}/events", alice) as stream:
        stream.readline()
        key_file.write_text(key_file.read_text().replace('"per_minute": 1000', '"per_minute": 900'))
        revoke(key_file, "bob")
        while not stream.readline().startswith(b": "):  # a ping since
            pass
        worker.succeed(job_id)
        assert b"event: done" in stream.read()


def test_the_client_is_told_that_its_key_is_gone(port: int, key_file: Path, bearer: Bearer, worker: Any) -> None:
    key = bearer("alice")["Authorization"].removeprefix("Bearer ")
    with Client(f"http://127.0.0.1:{port}", key) as client:
        job_id = worker.take(client.generate(0).id)
        told = client.events(job_id)
        while not isinstance(next(told), ProgressEvent):
            pass
        revoke(key_file, "alice")
        with pytest.raises(ApiError, match="revoked") as raised:
            list(told)
    assert raised.value.status == 401


def test_a_key_holds_as_long_as_its_file_says(key_file: Path, bearer: Bearer) -> None:
    bearer("alice"), bearer("bob")
    keys = KeyFile(key_file)
    alice, bob = read_keys(key_file)
    assert keys.holds(alice) and keys.holds(bob)
    revoke_key(key_file, alice.id)
    assert not keys.holds(alice) and keys.holds(bob)


# --- what it owned -----------------------------------------------------------------------------------------------------


@pytest.fixture
def successor(
    open_client: Callable[..., AbstractContextManager[TestClient]], key_file: Path, bearer: Bearer
) -> Iterator[tuple[TestClient, dict[str, str], dict[str, str], dict[str, Any]]]:
    """The API; what a second alice and an admin show; and a job of the first alice, whose key was revoked since."""
    first = bearer("alice", in_flight=1)
    with open_client(api_keys_file=key_file) as client:
        job = client.post("/generate", json={"class_label": 0}, headers={**first, "Idempotency-Key": "k"}).json()
        revoke(key_file, "alice")
        yield client, bearer("alice", in_flight=1), bearer("root", scope="admin"), job


def test_a_name_given_again_takes_over_no_job(successor: tuple[TestClient, Any, Any, dict[str, Any]]) -> None:
    client, alice, root, job = successor
    for verb, part in (("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("GET", "/grid"), ("DELETE", "")):
        assert client.request(verb, f"/jobs/{job['id']}{part}", headers=alice).status_code == 404
    assert client.get("/jobs", headers=alice).json()["jobs"] == []
    assert [found["id"] for found in client.get("/jobs", headers=root).json()["jobs"]] == [job["id"]]
    assert client.delete(f"/jobs/{job['id']}", headers=root).status_code == 200


def test_a_name_given_again_takes_over_no_idempotency_key_and_no_job_in_flight(
    successor: tuple[TestClient, Any, Any, dict[str, Any]], redis: Redis
) -> None:
    client, alice, _, job = successor
    made = client.post("/generate", json={"class_label": 0}, headers={**alice, "Idempotency-Key": "k"})
    assert made.status_code == 202 and made.json()["id"] != job["id"]
    owners = {redis.hget(protocol.job_key(job_id), "owner") for job_id in (job["id"], made.json()["id"])}
    assert len(owners) == 2 and all(redis.smembers(protocol.active_key(owner.decode())) for owner in owners)


def test_a_name_given_again_has_a_rate_of_its_own(
    open_client: Callable[..., AbstractContextManager[TestClient]], key_file: Path, bearer: Bearer
) -> None:
    first = bearer("alice", per_minute=1)
    with open_client(api_keys_file=key_file) as client:
        assert [client.get("/models", headers=first).status_code for _ in range(2)] == [200, 429]
        revoke(key_file, "alice")
        assert client.get("/models", headers=bearer("alice", per_minute=1)).status_code == 200
