"""What the tests of stores do with one, and with the API over it."""

import hashlib
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from PIL import Image
from redis import Redis
from starlette.testclient import TestClient

from worker import protocol
from worker.protocol import GenerationRequest
from worker.rq_worker import DiTWorker
from worker.stores import ImageStore, job_folder, open_store, open_to_write, read_mark
from worker.sweep import Sweeper

MakeRequest = Callable[..., GenerationRequest]
MakeWorker = Callable[..., DiTWorker]
Open = Callable[..., AbstractContextManager[TestClient]]

BODY = {"class_label": [0, "dog", None], "steps": 3, "seed": 7, "guidance_scale": 2.0}


def work(worker: DiTWorker) -> None:
    """Until the queue is empty."""
    worker.work(burst=True)


def submit(client: TestClient, **changes: Any) -> str:
    answer = client.post("/generate", json={**BODY, **changes})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def opened(address: str) -> ImageStore:
    store = open_store(address)
    assert store
    return store


def begin(address: str) -> str:
    """What a worker does first of all; the mark."""
    return open_to_write(opened(address))


def mark_of(address: str) -> str:
    return str(read_mark(opened(address)))


def sweep(address: str, redis: Redis, ttl_s: int = 600) -> None:
    """What is left after all that is due was deleted, whoever's turn it is."""
    mark = mark_of(address)
    redis.delete(protocol.sweep_key(mark, "expired"), protocol.sweep_key(mark, "strays"))
    Sweeper(opened(address), lambda: mark, redis, "of a test", ttl_s).sweep()


def look_now(address: str, redis: Redis) -> None:
    """What the clock does: the time has come at which a job may have expired."""
    key = protocol.kept_key(mark_of(address))
    redis.zadd(key, dict.fromkeys(redis.zrange(key, 0, -1), 1))


def executions(address: str, job: str) -> set[str]:
    """Of which there are pictures of a job."""
    path = Path(address) / job_folder(job)
    return {file.name.rpartition("-")[0] for file in path.iterdir()} if path.exists() else set()


def assert_served(client: TestClient, job: str, expected: list[bytes]) -> None:
    """By every call that gives pictures."""
    view = client.get(f"/jobs/{job}").json()
    assert view["status"] == "succeeded", view
    digests = [hashlib.sha256(png).hexdigest() for png in expected]
    assert [image["sha256"] for image in view["images"]] == digests
    for image, png, digest in zip(view["images"], expected, digests, strict=True):
        answer = client.get(image["url"])
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (200, png, f'"{digest}"')
        assert client.get(image["url"], headers={"If-None-Match": f'"{digest}"'}).status_code == 304
    grid = client.get(f"/jobs/{job}/grid")
    assert grid.status_code == 200 and Image.open(io.BytesIO(grid.content)).size[0] > 16
    beyond = client.get(f"/jobs/{job}/images/{len(expected)}")
    assert beyond.status_code == 404 and "numbered from 0" in beyond.json()["detail"]


def in_the_way(folder: Path) -> Callable[[], None]:
    """A file where the folder was: whatever is tried there fails, also for root. Returns what brings the folder back."""
    away = folder.with_name("away")
    folder.rename(away)
    folder.write_text("in its place")

    def mend() -> None:
        folder.unlink()
        away.rename(folder)

    return mend
