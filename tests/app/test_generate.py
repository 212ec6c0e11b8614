"""`POST /generate`: the job, or with Prefer and Accept its end and its picture."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from redis import Redis
from starlette.testclient import TestClient

from app import jobs
from app.routes.generate import preferred_wait
from worker import protocol

PNG = b"\x89PNG\r\n\x1a\n of a test"
BODY = {"class_label": "dog", "steps": 3, "seed": 7}
PICTURE = {"Accept": "image/png"}


def test_a_job_is_queued_and_told(client: TestClient) -> None:
    answer = client.post("/generate", json=BODY)
    job = answer.json()
    assert answer.status_code == 202 and answer.headers["location"] == f"/jobs/{job['id']}"
    assert "preference-applied" not in answer.headers
    assert (job["status"], job["queue_position"], job["progress"]) == ("queued", 0, {"step": 0, "steps": 3})
    assert (job["images"], job["error"], job["started_at"], job["finished_at"]) == ([], None, None, None)
    here = f"/jobs/{job['id']}"
    assert job["links"] == {"self": here, "events": f"{here}/events", "grid": f"{here}/grid"}
    assert client.get(answer.headers["location"]).json() == job


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("wait=30", 30),
        ("WAIT = 30", 30),
        ('wait="30"', 30),
        ("respond-async, wait=10", 10),
        ("wait=10; foo=bar", 10),
        ('return=minimal; x="a", wait=2', 2),
        ("wait=61", 60),
        ("wait=999999", 60),
        ("wait=0", 0),
        ("wait", 0),
        ("wait=", 0),
        ("wait=-1", 0),
        ("wait=1.5", 0),
        ("wait=ten", 0),
        ("await=10", 0),
        ("respond-async", 0),
    ],
)
def test_prefer_is_read_as_rfc_7240_says_and_else_ignored(prefer: str | None, seconds: int) -> None:
    assert preferred_wait(prefer) == seconds


def test_a_job_that_ends_in_time_is_200(client: TestClient, worker: Any) -> None:
    with worker.meanwhile(lambda w, job_id: w.succeed(job_id)):
        answer = client.post("/generate", json=BODY, headers={"Prefer": "wait=30"})
    job = answer.json()
    assert (answer.status_code, answer.headers["preference-applied"]) == (200, "wait=30")
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert job["status"] == "succeeded" and len(job["images"]) == 1 and job["finished_at"] >= job["started_at"] >= job["created_at"]


def test_a_job_that_does_not_end_in_time_is_202(client: TestClient) -> None:
    began = time.monotonic()
    answer = client.post("/generate", json=BODY, headers={"Prefer": "wait=1", **PICTURE})
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "wait=1")
    assert answer.json()["status"] == "queued" and 1 <= time.monotonic() - began < 10


def test_a_wait_longer_than_one_blocking_read_holds(client: TestClient, worker: Any) -> None:
    """A read that is as long as the socket's timeout would end as a lost connection."""
    assert jobs.CONNECTION["socket_timeout"] >= 2 * jobs._BLOCK_S
    with worker.meanwhile(lambda w, job_id: (time.sleep(jobs._BLOCK_S + 0.5), w.succeed(job_id))):
        answer = client.post("/generate", json=BODY, headers={"Prefer": "wait=30"})
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")


def test_the_picture_itself_is_answered_where_it_is_asked_for(client: TestClient, worker: Any) -> None:
    with worker.meanwhile(lambda w, job_id: w.succeed(job_id)):
        answer = client.post("/generate", json=BODY, headers={"Prefer": "wait=30", **PICTURE})
    assert (answer.status_code, answer.headers["content-type"], answer.content) == (200, "image/png", PNG)
    where = answer.headers["content-location"]
    assert where == f"{answer.headers['location']}/images/0"
    assert client.get(where).headers["etag"] == answer.headers["etag"]


def test_several_pictures_are_answered_as_json(client: TestClient, worker: Any) -> None:
    with worker.meanwhile(lambda w, job_id: w.succeed(job_id, count=2)):
        answer = client.post("/generate", json={**BODY, "num_images": 2}, headers={"Prefer": "wait=30", **PICTURE})
    assert answer.status_code == 200 and [image["seed"] for image in answer.json()["images"]] == [7, 8]


def test_a_failed_job_instead_of_a_picture_is_409(client: TestClient, worker: Any) -> None:
    with worker.meanwhile(lambda w, job_id: w.fail(job_id, "picture 0 left the finite numbers")):
        answer = client.post("/generate", json=BODY, headers={"Prefer": "wait=30", **PICTURE})
    assert (answer.status_code, answer.headers["content-type"]) == (409, "application/problem+json")
    assert "picture 0 left the finite numbers" in answer.json()["detail"]


@pytest.mark.parametrize("body", [BODY, {**BODY, "num_images": 2}])
def test_a_failed_job_is_told_as_json_where_json_is_asked_for(client: TestClient, worker: Any, body: dict[str, Any]) -> None:
    accept = {} if body is BODY else PICTURE  # of several pictures the answer is JSON whatever is accepted
    with worker.meanwhile(lambda w, job_id: w.fail(job_id, "no luck")):
        answer = client.post("/generate", json=body, headers={"Prefer": "wait=30", **accept})
    assert answer.status_code == 200
    assert (answer.json()["status"], answer.json()["error"], answer.json()["images"]) == ("failed", "no luck", [])


def test_a_full_queue_is_429_with_a_time_to_come_back(open_client: Callable[..., AbstractContextManager[TestClient]], redis: Redis) -> None:
    with open_client(queue_limit=2) as client:
        assert [client.post("/generate", json=BODY).status_code for _ in range(2)] == [202, 202]
        answer = client.post("/generate", json=BODY)
        assert (answer.status_code, answer.headers["content-type"]) == (429, "application/problem+json")
        assert int(answer.headers["retry-after"]) > 0 and "2" in answer.json()["detail"]
        redis.lpop("rq:queue:dit-tiny")
        assert client.post("/generate", json=BODY).status_code == 202


def test_the_place_in_the_queue_counts_the_jobs_before(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    first, second, third = submit(), submit(), submit()

    def positions() -> list[int | None]:
        return [client.get(f"/jobs/{job_id}").json()["queue_position"] for job_id in (first, second, third)]

    assert positions() == [0, 1, 2]
    worker.take(first)
    assert positions() == [None, 0, 1]
    assert client.delete(f"/jobs/{second}").status_code == 200
    assert positions() == [None, None, 0]


def test_each_job_has_a_record_an_event_and_a_place_in_one_step(client: TestClient, submit: Callable[..., str], redis: Redis) -> None:
    job_id = submit()
    assert redis.exists(protocol.job_key(job_id), protocol.events_key(job_id), f"rq:job:{job_id}") == 3
