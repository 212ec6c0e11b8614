"""`GET /jobs`, the place in the queue, and the contact sheet."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from redis import Redis
from starlette.testclient import TestClient

from app.sheet import GAP, contact_sheet
from app.views import work
from worker import protocol
from worker.protocol import GenerationRequest


def pages(client: TestClient, limit: int) -> list[list[str]]:
    """The ids of each page, to the last."""
    found, cursor = [], None
    while True:
        answer = client.get("/jobs", params={"limit": limit, **({"cursor": cursor} if cursor else {})})
        assert answer.status_code == 200, answer.text
        found.append([job["id"] for job in answer.json()["jobs"]])
        cursor = answer.json()["next"]
        if cursor is None:
            return found


def test_no_jobs_are_an_empty_page(client: TestClient) -> None:
    assert client.get("/jobs").json() == {"jobs": [], "next": None}


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_every_job_is_on_one_page_newest_first(client: TestClient, submit: Callable[..., str], limit: int) -> None:
    jobs = [submit() for _ in range(7)]
    found = pages(client, limit)
    assert [job for page in found for job in page] == sorted(jobs, reverse=True)
    assert [len(page) for page in found] == [limit] * (7 // limit) + ([7 % limit] if 7 % limit else [])


def test_a_job_of_the_list_is_the_job(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    done, waiting = submit(), submit(num_images=2)
    worker.succeed(worker.take(done))
    listed = {job["id"]: job for job in client.get("/jobs").json()["jobs"]}
    for job_id in (done, waiting):
        assert {**client.get(f"/jobs/{job_id}").json(), "estimated_wait_s": None} == listed[job_id]
    assert listed[waiting]["queue_position"] == 0


def test_pages_do_not_move_when_jobs_come(client: TestClient, submit: Callable[..., str]) -> None:
    old = sorted((submit() for _ in range(4)), reverse=True)
    first = client.get("/jobs", params={"limit": 2}).json()
    submit()
    second = client.get("/jobs", params={"limit": 2, "cursor": first["next"]}).json()
    assert [job["id"] for job in first["jobs"] + second["jobs"]] == old


@pytest.mark.parametrize("expired", [[0], [6], [1, 2, 3], range(7), [0, 2, 4, 6]])
def test_expired_jobs_are_left_out_and_shorten_no_page(
    client: TestClient, submit: Callable[..., str], redis: Redis, expired: list[int]
) -> None:
    jobs = sorted((submit() for _ in range(7)), reverse=True)
    for place in expired:
        redis.delete(protocol.job_key(jobs[place]))
    there = [job for place, job in enumerate(jobs) if place not in expired]
    found = pages(client, 2)
    assert [job for page in found for job in page] == there
    assert all(len(page) == 2 for page in found[:-1])


@pytest.mark.parametrize(
    ("parameters", "field"), [({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"limit": "x"}, "limit"), ({"cursor": "x"}, "cursor")]
)
def test_odd_pages_are_422(client: TestClient, parameters: dict[str, Any], field: str) -> None:
    answer = client.get("/jobs", params=parameters)
    assert answer.status_code == 422 and [error["field"] for error in answer.json()["errors"]] == [field]


# --- how long it will be -----------------------------------------------------------------------------------------------


def test_the_wait_is_the_work_before_it_over_the_workers_pace(
    client: TestClient, submit: Callable[..., str], serve: Callable[..., Any], worker: Any, redis: Redis
) -> None:
    serve(rows_per_s=50.0)
    redis.sadd("rq:workers:dit-tiny", "one", "two")
    submit(steps=100, guidance_scale=1, num_images=2)  # 200 rows
    submit(steps=100, guidance_scale=3)  # 200 rows
    last = submit()
    job = client.get(f"/jobs/{last}").json()
    assert (job["queue_position"], job["estimated_wait_s"]) == (2, 4.0)
    first = worker.take()
    redis.zadd("rq:wip:dit-tiny", {f"{first}:execution-1": 1e12})
    worker.tell(first, "progress", {}, step=50)
    job = client.get(f"/jobs/{last}").json()
    assert (job["queue_position"], job["estimated_wait_s"]) == (1, 3.0)  # half of the first is left


@pytest.mark.parametrize("running", [25, 26, 500])
def test_the_wait_behind_many_jobs_that_run_is_told_from_a_part_of_them(
    client: TestClient, submit: Callable[..., str], serve: Callable[..., Any], redis: Redis, running: int
) -> None:
    serve(rows_per_s=10.0)
    redis.sadd("rq:workers:dit-tiny", "one")
    last = submit()
    with redis.pipeline() as pipeline:
        for number in range(running):
            pipeline.hset(protocol.job_key(f"job-{number}"), mapping={"work": 40, "step": 5, "request": '{"steps": 10}'})
            pipeline.zadd("rq:wip:dit-tiny", {f"job-{number}:execution": 1e12})
        pipeline.execute()
    job = client.get(f"/jobs/{last}").json()
    assert job["estimated_wait_s"] == pytest.approx(running * 20 / 10, abs=0.2)


@pytest.mark.parametrize("waiting", [99, 100, 101, 250, 1001])
def test_the_wait_behind_a_long_queue_is_told_from_a_part_of_it(
    client: TestClient, submit: Callable[..., str], serve: Callable[..., Any], redis: Redis, waiting: int
) -> None:
    serve(rows_per_s=10.0)
    redis.sadd("rq:workers:dit-tiny", "one")
    last = submit()
    with redis.pipeline() as pipeline:
        for number in range(waiting):
            pipeline.lpush("rq:queue:dit-tiny", f"before-{number}")
            pipeline.hset(protocol.job_key(f"before-{number}"), "work", 20)
        pipeline.execute()
    job = client.get(f"/jobs/{last}").json()
    assert (job["queue_position"], job["estimated_wait_s"]) == (waiting, 2.0 * waiting)


def test_nobody_guesses_a_wait_where_no_pace_is_known(client: TestClient, submit: Callable[..., str]) -> None:
    job = client.get(f"/jobs/{submit()}").json()
    assert (job["queue_position"], job["estimated_wait_s"]) == (0, None)


@pytest.mark.parametrize(
    ("scale", "interval", "labels", "expected"),
    [
        (1.0, (0, 1), (0,), 10),
        (2.0, (0, 1), (0,), 20),
        (2.0, (0.25, 0.75), (0,), 15),
        (2.0, (0, 1), (None, 1), 30),
        (2.0, (0.5, 0.5), (0,), 10),
    ],
)
def test_work_counts_rows(scale: float, interval: tuple[float, float], labels: tuple[int | None, ...], expected: int) -> None:
    assert work(GenerationRequest("m", labels, scale, interval, 10, "euler", 0)) == expected


# --- the contact sheet -------------------------------------------------------------------------------------------------


def png(value: int, size: int = 8, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size), value if mode == "L" else (value, 0, value)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 10, 64])
def test_every_picture_has_its_place_on_the_sheet(count: int, mode: str) -> None:
    sheet = Image.open(io.BytesIO(contact_sheet([png(i, mode=mode) for i in range(count)])))
    columns = math.ceil(math.sqrt(count))
    assert sheet.mode == mode and sheet.width == GAP + columns * (8 + GAP)
    pixels = np.asarray(sheet)
    for i in range(count):
        x, y = GAP + (i % columns) * (8 + GAP), GAP + (i // columns) * (8 + GAP)
        assert (pixels[y : y + 8, x : x + 8] == np.asarray(Image.open(io.BytesIO(png(i, mode=mode))))).all()
    covered = count * 64 * (1 if mode == "L" else 3)
    assert (pixels != 255).sum() <= covered  # all else is background


def test_the_grid_of_a_job_is_all_its_pictures(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    job_id = worker.take(submit(num_images=3))
    entries = [worker.picture(job_id, i, png(10 * i)) for i in range(3)]
    assert client.get(f"/jobs/{job_id}/grid").json()["status"] == 409
    worker.results.succeed(job_id, "execution-1", entries)
    answer = client.get(f"/jobs/{job_id}/grid")
    assert answer.content == contact_sheet([png(10 * i) for i in range(3)])
    assert answer.headers["content-type"] == "image/png" and "immutable" in answer.headers["cache-control"]
    again = client.get(f"/jobs/{job_id}/grid", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("end", ["fail", "cancel"])
def test_a_job_without_pictures_has_no_grid(client: TestClient, submit: Callable[..., str], worker: Any, end: str) -> None:
    job_id = submit()
    if end == "fail":
        worker.fail(worker.take(job_id), "no luck")
    else:
        client.delete(f"/jobs/{job_id}")
    answer = client.get(f"/jobs/{job_id}/grid")
    assert answer.status_code == 409 and answer.json()["type"].endswith(":not-succeeded")
