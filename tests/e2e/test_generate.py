"""From a request over HTTP to the picture, by a real worker."""

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

GUIDED = {"class_label": "Sneaker", "guidance_scale": 2.0, "steps": 30, "seed": 7}
UNGUIDED = {**GUIDED, "guidance_scale": 1}
ENDLESS = {"class_label": "Cat", "steps": 1000, "num_images": 64, "seed": 1}


def test_the_curl_of_the_readme_gives_a_png(service: Any) -> None:
    answer = service.client.post("/generate", json=GUIDED, headers={"Prefer": "wait=30", "Accept": "image/png"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png"), answer.text
    picture = Image.open(io.BytesIO(answer.content))
    picture.load()
    assert (picture.format, picture.size, picture.mode) == ("PNG", (16, 16), "L")
    assert picture.getextrema()[0] < picture.getextrema()[1]
    assert answer.headers["etag"].strip('"') == hashlib.sha256(answer.content).hexdigest()


def test_a_picture_holds_its_request_and_no_id_and_no_time(service: Any) -> None:
    (model,) = service.client.get("/models").json()["models"]
    (_, second) = service.pictures(service.submit(**GUIDED, num_images=2))
    told = json.loads(Image.open(io.BytesIO(second)).text["dit"])
    assert (told["checkpoint"], told["index"], told["seed"], told["class_label"]) == (model["checkpoint"], 1, 8, 2)
    assert told["request"]["steps"] == 30 and set(told) == {"version", "checkpoint", "index", "seed", "class_label", "request"}


@pytest.mark.parametrize("request_", [GUIDED, UNGUIDED], ids=["guided", "unguided"])
def test_the_same_request_gives_the_same_bytes_and_another_seed_does_not(service: Any, request_: dict[str, Any]) -> None:
    first, again, other = (service.picture(**{**request_, "seed": seed}) for seed in (7, 7, 8))
    assert first == again != other


def test_a_picture_is_the_same_among_fifteen_others(service: Any) -> None:
    """Other steps, guidance and classes share its forward passes; one of the two asked for again has no guidance."""
    alone = [service.picture(**GUIDED), service.picture(**UNGUIDED)]
    others = [
        {"class_label": i % 4, "steps": 5 + 4 * i, "guidance_scale": (1, 1.5, 4, 20)[i % 4], "seed": 100 + i, "num_images": 1 + i % 2}
        for i in range(14)
    ]
    requests = [*others[:4], GUIDED, UNGUIDED, *others[4:]]
    with ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda request: service.submit(**request), requests))
    together = [service.pictures(job) for job in jobs]
    assert [together[4][0], together[5][0]] == alone
    assert len({png for pngs in together for png in pngs}) == sum(request.get("num_images", 1) for request in requests)


def test_picture_i_is_the_one_of_seed_plus_i(service: Any) -> None:
    three = service.pictures(service.submit(class_label=1, seed=40, num_images=3))
    assert [pixels(png) for png in three] == [pixels(service.picture(class_label=1, seed=40 + i)) for i in range(3)]


def pixels(png: bytes) -> bytes:
    """Without the text: that tells the index and the whole request."""
    return Image.open(io.BytesIO(png)).tobytes()


def test_a_list_of_labels_makes_one_picture_each(service: Any) -> None:
    labels = ["Dog", None, 3, "house cat"]
    pngs = service.pictures(service.submit(class_label=labels, seed=40))
    assert [json.loads(Image.open(io.BytesIO(png)).text["dit"])["class_label"] for png in pngs] == [1, None, 3, 0]
    assert pixels(pngs[2]) == pixels(service.picture(class_label=3, seed=42))


def test_guidance_and_its_interval_change_the_picture(service: Any) -> None:
    plain, guided, late, never = (
        pixels(service.picture(class_label=1, steps=8, seed=3, guidance_scale=scale, guidance_interval=interval))
        for scale, interval in ((1, [0, 1]), (4, [0, 1]), (4, [0, 0.5]), (4, [0, 0]))
    )
    assert len({plain, guided, late}) == 3 and never == plain


def test_the_finished_job_is_told_as_json(service: Any) -> None:
    answer = service.generate(class_label="trainer", num_images=2, seed=9)
    job = answer.json()
    assert (answer.status_code, job["status"], job["progress"]) == (200, "succeeded", {"step": 4, "steps": 4})
    assert job["request"]["class_label"] == 2 and [image["seed"] for image in job["images"]] == [9, 10]
    for image in job["images"]:
        assert hashlib.sha256(service.client.get(image["url"]).content).hexdigest() == image["sha256"]
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]


def test_the_events_of_a_job_come_in_order_and_end(service: Any) -> None:
    job_id = service.submit(class_label="Dog", num_images=3, steps=50)
    with service.client.stream("GET", f"/jobs/{job_id}/events") as stream:
        lines = [line.split(": ", 1) for line in stream.iter_lines() if line and not line.startswith(":")]
    names = [value for key, value in lines if key == "event"]
    data = [json.loads(value) for key, value in lines if key == "data"]
    steps = [datum["step"] for name, datum in zip(names, data, strict=True) if name == "progress"]
    assert (names[0], names[1], names[-1], data[-1]) == ("queued", "progress", "done", {"status": "succeeded"})
    assert steps[0] == 0 and steps == sorted(steps) and steps[-1] <= 50
    assert sorted(datum["index"] for name, datum in zip(names, data, strict=True) if name == "image") == [0, 1, 2]
    ids = [tuple(map(int, value.split("-"))) for key, value in lines if key == "id"]
    assert ids == sorted(ids) and len(set(ids)) == len(names)


def test_a_running_job_is_canceled_and_the_next_one_runs(service: Any) -> None:
    job_id = service.submit(**ENDLESS)
    service.running(job_id)
    answer = service.client.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.json()["status"]) == (202, "canceling")
    assert service.end_of(job_id)["status"] == "canceled"
    assert service.client.delete(f"/jobs/{job_id}").status_code == 409
    assert service.picture(class_label=0)


def test_a_job_that_takes_longer_than_the_wait_is_202(service: Any) -> None:
    answer = service.client.post("/generate", json=ENDLESS, headers={"Prefer": "wait=1", "Accept": "image/png"})
    job = answer.json()
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "wait=1")
    assert answer.headers["location"] == f"/jobs/{job['id']}" and job["status"] in ("queued", "running")
    service.client.delete(f"/jobs/{job['id']}")
    service.end_of(job["id"])


def test_a_small_job_overtakes_a_large_one(service: Any) -> None:
    """It gets rows as soon as a picture of the large one is done; here it waits for one of 64."""
    large = service.submit(**{**ENDLESS, "steps": 200})
    service.running(large)
    assert service.pictures(service.submit(class_label=1, steps=2))
    assert service.job(large)["status"] == "running"
    service.client.delete(f"/jobs/{large}")
    service.end_of(large)
