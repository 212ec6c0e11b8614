"""`/jobs/{id}`: the job, its pictures, its events, its end."""

import hashlib
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis
from starlette.testclient import TestClient

from app.jobs import new_id
from worker import protocol

PNG = b"\x89PNG\r\n\x1a\n of a test"


def id_of_age(seconds: float) -> str:
    """An id as it was made this long ago."""
    fresh = uuid.UUID(new_id()).int
    return str(uuid.UUID(int=(fresh & (1 << 80) - 1) | int((time.time() - seconds) * 1000) << 80))


def events(text: str) -> list[tuple[str, str, Any]]:
    """(id, event, data) of a stream of server-sent events; comments are left out."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            found.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return found


# --- the job -----------------------------------------------------------------------------------------------------------


def test_a_running_job_tells_its_progress(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    job_id = worker.take(submit(steps=10))
    worker.tell(job_id, "progress", {"step": 4, "steps": 10}, step=4)
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["progress"], job["queue_position"]) == ("running", {"step": 4, "steps": 10}, None)
    assert job["started_at"] >= job["created_at"] and job["finished_at"] is None


def test_a_job_that_succeeded_tells_its_pictures(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    job_id = worker.succeed(worker.take(submit(num_images=2, steps=10)), count=2)
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["progress"], job["error"]) == ("succeeded", {"step": 10, "steps": 10}, None)
    assert [image["url"] for image in job["images"]] == [f"/jobs/{job_id}/images/{i}" for i in range(2)]
    assert all(set(image) == {"url", "seed", "sha256"} for image in job["images"])


def test_a_failed_job_tells_why(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    job = client.get(f"/jobs/{worker.fail(worker.take(submit()), 'no luck')}").json()
    assert (job["status"], job["error"], job["images"]) == ("failed", "no luck", [])


@pytest.mark.parametrize("part", ["", "/images/0", "/events"])
@pytest.mark.parametrize("name", ["nothing", "0", "%00", "é", "{}", str(uuid.uuid4()), "A" * 100, "*"])
def test_an_unknown_job_is_404(client: TestClient, name: str, part: str) -> None:
    answer = client.get(f"/jobs/{name}{part}")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_a_young_unknown_id_is_404_and_one_older_than_results_live_is_410(client: TestClient) -> None:
    for verb, part in (("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("DELETE", "")):
        assert client.request(verb, f"/jobs/{id_of_age(500)}{part}").status_code == 404
        gone = client.request(verb, f"/jobs/{id_of_age(700)}{part}")
        assert (gone.status_code, gone.headers["content-type"]) == (410, "application/problem+json")
        assert "600 s" in gone.json()["detail"]


def test_an_old_job_that_still_waits_is_not_gone(client: TestClient, submit: Callable[..., str], redis: Redis) -> None:
    old = id_of_age(7000)
    redis.rename(protocol.job_key(submit()), protocol.job_key(old))
    assert client.get(f"/jobs/{old}").json()["status"] == "queued"


def test_an_overlong_id_is_422(client: TestClient) -> None:
    assert client.get(f"/jobs/{'a' * 101}").status_code == 422


def test_a_job_that_waits_does_not_expire_and_one_that_ended_does(submit: Callable[..., str], worker: Any, redis: Redis) -> None:
    job_id = submit()
    keys = protocol.job_key(job_id), protocol.events_key(job_id)
    assert [redis.ttl(key) for key in keys] == [-1, -1]
    worker.succeed(worker.take(job_id))
    assert all(590 <= redis.ttl(key) <= 600 for key in keys)


# --- its end -----------------------------------------------------------------------------------------------------------


def test_a_queued_job_is_canceled_at_once(client: TestClient, submit: Callable[..., str], redis: Redis) -> None:
    job_id, other = submit(), submit()
    answer = client.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.json()["status"]) == (200, "canceled") and answer.json()["finished_at"]
    assert redis.lrange("rq:queue:dit-tiny", 0, -1) == [other.encode()] and not redis.exists(f"rq:job:{job_id}")
    assert [name for _, name, _ in events(client.get(f"/jobs/{job_id}/events").text)] == ["queued", "done"]


def test_a_running_job_is_canceling_until_its_worker_stops_it(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    job_id = worker.take(submit())
    for _ in range(2):
        answer = client.delete(f"/jobs/{job_id}")
        assert (answer.status_code, answer.json()["status"]) == (202, "canceling")
    assert worker.tell(job_id, "progress", {}) == "cancel"
    assert worker.results.cancel(job_id, "execution-1")
    assert client.get(f"/jobs/{job_id}").json()["status"] == "canceled"


@pytest.mark.parametrize("end", ["succeeded", "failed", "canceled"])
def test_a_job_that_ended_is_not_canceled_again(client: TestClient, submit: Callable[..., str], worker: Any, end: str) -> None:
    job_id = submit()
    if end == "canceled":
        client.delete(f"/jobs/{job_id}")
    else:
        worker.succeed(worker.take(job_id)) if end == "succeeded" else worker.fail(worker.take(job_id), "no luck")
    answer = client.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.headers["content-type"]) == (409, "application/problem+json")
    assert end in answer.json()["detail"] and client.get(f"/jobs/{job_id}").json()["status"] == end


# --- its pictures ------------------------------------------------------------------------------------------------------


def test_a_picture_is_a_png_for_ever(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    url = f"/jobs/{worker.succeed(worker.take(submit()))}/images/0"
    answer = client.get(url)
    assert (answer.content, answer.headers["content-type"]) == (PNG, "image/png")
    assert answer.headers["etag"] == f'"{hashlib.sha256(PNG).hexdigest()}"' and "immutable" in answer.headers["cache-control"]


def test_a_picture_that_is_known_is_304(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    url = f"/jobs/{worker.succeed(worker.take(submit()))}/images/0"
    tag = client.get(url).headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        answer = client.get(url, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert client.get(url, headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_first_picture_of_a_running_job_is_served(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    job_id = worker.take(submit(num_images=2))
    worker.picture(job_id, 0)
    assert client.get(f"/jobs/{job_id}/images/0").content == PNG
    answer = client.get(f"/jobs/{job_id}/images/1")
    assert answer.status_code == 404 and "it is running and was asked for 2" in answer.json()["detail"]


@pytest.mark.parametrize(("index", "status"), [("1", 404), ("63", 404), ("64", 422), ("-1", 422), ("first", 422), ("0.5", 422)])
def test_a_picture_that_is_not_there_is_told(client: TestClient, submit: Callable[..., str], worker: Any, index: str, status: int) -> None:
    answer = client.get(f"/jobs/{worker.succeed(worker.take(submit()))}/images/{index}")
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")


def test_a_queued_job_has_no_picture_yet(client: TestClient, submit: Callable[..., str]) -> None:
    answer = client.get(f"/jobs/{submit()}/images/0")
    assert answer.status_code == 404 and "it is queued" in answer.json()["detail"]


# --- its events --------------------------------------------------------------------------------------------------------


def finished_job(submit: Callable[..., str], worker: Any) -> str:
    job_id = worker.take(submit(steps=2))
    for step in (1, 2):  # 0 was told at the start
        worker.tell(job_id, "progress", {"step": step, "steps": 2}, step=step)
    return str(worker.succeed(job_id))


def test_events_come_from_the_beginning_and_close_after_done(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    job_id = finished_job(submit, worker)
    answer = client.get(f"/jobs/{job_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["cache-control"] == "no-store"
    told = events(answer.text)
    assert [name for _, name, _ in told] == ["queued", "progress", "progress", "progress", "image", "done"]
    assert [data["step"] for _, name, data in told if name == "progress"] == [0, 1, 2]
    assert told[-2][2]["url"] == f"/jobs/{job_id}/images/0" and told[-1][2] == {"status": "succeeded"}
    assert len({stream_id for stream_id, _, _ in told}) == len(told)


def test_events_come_after_the_last_that_is_known(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    path = f"/jobs/{finished_job(submit, worker)}/events"
    told = events(client.get(path).text)
    for known in range(len(told)):
        assert events(client.get(path, headers={"Last-Event-ID": told[known][0]}).text) == told[known + 1 :]


def test_a_client_that_has_seen_all_is_not_kept(
    client: TestClient, submit: Callable[..., str], worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EventSource comes back by itself with the id of `done`, after which nothing comes any more."""
    job_id = finished_job(submit, worker)
    monkeypatch.setattr("app.jobs._BLOCK_S", 4.5)
    began = time.monotonic()
    assert client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "9999999999999999999"}).text == ""
    assert time.monotonic() - began < 4


def test_a_failed_job_tells_why_in_its_last_event(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    job_id = worker.fail(worker.take(submit()), "no luck")
    assert events(client.get(f"/jobs/{job_id}/events").text)[-1][1:] == ("done", {"status": "failed", "error": "no luck"})


@pytest.mark.parametrize("given", ["x", "1-2-3", "-1", "1-", "$", "1 2", "9" * 20, "²", "0x1"])
def test_an_event_id_that_is_none_is_422(client: TestClient, submit: Callable[..., str], given: str) -> None:
    answer = client.get(f"/jobs/{submit()}/events", headers={"Last-Event-ID": given.encode("latin-1")})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "Last-Event-ID")
