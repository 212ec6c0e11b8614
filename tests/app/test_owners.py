"""A job belongs to the key that made it: others do not learn that it is there; an admin sees all."""

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from redis import Redis
from starlette.testclient import TestClient

Headers = dict[str, str]
PNG = io.BytesIO()
Image.new("L", (8, 8)).save(PNG, "PNG")
PARTS = [("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("GET", "/grid"), ("DELETE", "")]


@pytest.fixture
def keyed(
    open_client: Callable[..., AbstractContextManager[TestClient]], key_file: Path, bearer: Callable[..., Headers]
) -> Iterator[tuple[TestClient, Headers, Headers, Headers]]:
    """The API, and what alice, bob and an admin show."""
    callers = bearer("alice", in_flight=2), bearer("bob"), bearer("root", scope="admin")
    with open_client(api_keys_file=key_file) as client:
        yield client, *callers


def post(client: TestClient, headers: Headers, **extra: str) -> Any:
    return client.post("/generate", json={"class_label": 0}, headers={**headers, **extra})


def listed(client: TestClient, headers: Headers) -> list[str]:
    return [job["id"] for job in client.get("/jobs", headers=headers).json()["jobs"]]


@pytest.mark.parametrize(("verb", "part"), PARTS)
def test_a_job_of_another_key_is_as_one_that_never_was(keyed: tuple[Any, ...], worker: Any, verb: str, part: str) -> None:
    client, alice, bob, root = keyed
    job_id = worker.take(post(client, alice).json()["id"])
    worker.results.succeed(job_id, "execution-1", [worker.picture(job_id, 0, PNG.getvalue())])
    foreign, unknown = (client.request(verb, f"/jobs/{other}{part}", headers=bob) for other in (job_id, "nothing"))
    assert (foreign.status_code, unknown.status_code) == (404, 404)
    assert foreign.json()["detail"].replace(job_id, "nothing") == unknown.json()["detail"]
    for owner in (alice, root):
        assert client.request(verb, f"/jobs/{job_id}{part}", headers=owner).status_code == (409 if verb == "DELETE" else 200)


def test_each_lists_its_own_jobs_and_an_admin_all(keyed: tuple[Any, ...]) -> None:
    client, alice, bob, root = keyed
    jobs = {name: post(client, headers).json()["id"] for name, headers in (("alice", alice), ("bob", bob), ("root", root))}
    assert listed(client, alice) == [jobs["alice"]] and listed(client, bob) == [jobs["bob"]]
    assert sorted(listed(client, root)) == sorted(jobs.values())


def test_jobs_in_flight_are_bounded_for_each_key(keyed: tuple[Any, ...], worker: Any) -> None:
    client, alice, bob, _ = keyed
    first, *_ = [post(client, alice).json()["id"] for _ in range(2)]
    refused = post(client, alice)
    assert refused.status_code == 429 and refused.json()["type"].endswith(":too-many-jobs") and refused.headers["retry-after"]
    assert post(client, bob).status_code == 202
    worker.succeed(worker.take(first))
    assert post(client, alice).status_code == 202


def test_the_same_idempotency_key_of_two_keys_is_two_jobs(keyed: tuple[Any, ...], redis: Redis) -> None:
    client, alice, bob, _ = keyed
    ids = [post(client, headers, **{"Idempotency-Key": "k"}).json()["id"] for headers in (alice, bob, alice)]
    assert ids[0] == ids[2] != ids[1] and redis.llen("rq:queue:dit-tiny") == 2


@pytest.mark.parametrize("path", ["/queues", "/queues/tiny/pause"])
def test_a_queue_is_for_admins(keyed: tuple[Any, ...], path: str) -> None:
    client, alice, _, root = keyed
    verb = "GET" if path == "/queues" else "POST"
    refused = client.request(verb, path, headers=alice)
    assert refused.status_code == 403 and "scope admin;" in refused.json()["detail"]
    assert client.request(verb, path, headers=root).status_code == 200
