"""The API and every worker have one store, and see where they do not."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from app import local
from tests.worker.stores.served import BODY, MakeWorker, Open, assert_served, begin, mark_of, submit, work

pytestmark = [pytest.mark.usefixtures("in_this_process", "quick"), pytest.mark.timeout(180)]


def test_before_any_worker_has_opened_the_store_the_api_takes_no_job_and_says_why(
    open_api: Open, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the API sees another folder than the workers."""
    folder.mkdir()
    with open_api(image_store=str(folder)) as client:
        for answer in (client.post("/generate", json=BODY), client.get("/readyz")):
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:dit:problem:store-away")
            assert "no worker has opened the image store that this server reads" in answer.json()["detail"]
        assert str(folder) in caplog.text, "for whoever runs it"
        begin(str(folder))
        submit(client)


@pytest.mark.parametrize("has", ["another folder", "redis"])
def test_a_job_for_another_store_fails_and_says_so(
    open_api: Open, make_worker: MakeWorker, jobs: Any, folder: Path, tmp_path: Path, has: str
) -> None:
    begin(str(folder))
    other = make_worker(image_store=str(tmp_path / "other") if has != "redis" else "redis")
    with open_api(image_store=str(folder)) as client:
        job = submit(client)
        work(other)
        error = client.get(f"/jobs/{job}").json()["error"]
    assert mark_of(str(folder)) in error and "DIT_IMAGE_STORE must be the same for all" in error
    assert (other.writer.mark or "keeps pictures in Redis") in error and jobs.leftovers() == []


@pytest.mark.parametrize("reads", ["another folder", "redis"])
def test_an_api_with_another_store_does_not_say_that_there_is_no_picture(
    open_api: Open, make_worker: MakeWorker, folder: Path, tmp_path: Path, reads: str, expected: list[bytes]
) -> None:
    worker = make_worker(image_store=str(folder))
    begin(str(tmp_path / "other"))
    with open_api(image_store=str(folder)) as client:
        job = submit(client)
        work(worker)
    with open_api(image_store=str(tmp_path / "other") if reads != "redis" else "redis") as client:
        for what in ("images/0", "grid"):
            answer = client.get(f"/jobs/{job}/{what}")
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:dit:problem:other-store")
            assert int(answer.headers["retry-after"]) > 0
    with open_api(image_store=str(folder)) as client:
        assert_served(client, job, expected)


def test_a_store_that_is_exchanged_under_a_running_worker_is_not_written(
    make_worker: MakeWorker, open_api: Open, jobs: Any, folder: Path, tmp_path: Path
) -> None:
    """A disk that is mounted again, and is another one."""
    worker = make_worker(image_store=str(folder))
    begin(str(tmp_path / "other"))
    worker.writer.trouble = "something"
    shutil.rmtree(folder)
    (tmp_path / "other").rename(folder)
    worker.writer.look()
    assert worker.writer._look
    worker.writer._look.result(60)
    assert worker.writer.trouble.endswith("this is another store than when the worker began")
    with open_api(image_store=str(folder)) as client:
        job = submit(client)
        work(worker)
        assert jobs.status(job) == "queued"


def test_a_store_that_refuses_ends_whoever_begins_and_says_why(make_worker: MakeWorker, open_api: Open, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    address = str(tmp_path / "file" / "pictures")
    with pytest.raises(ValueError, match=f"pictures cannot be kept in {address}: Not a directory"):
        make_worker(image_store=address)
    with pytest.raises(ValueError, match=f"pictures cannot be read from {address}: Not a directory"), open_api(image_store=address):
        pass
    with pytest.raises(local.StartError, match=f"pictures cannot be kept in {address}: Not a directory; DIT_IMAGE_STORE"):
        local._check_store(address)


def test_a_store_that_is_away_when_a_worker_begins_is_waited_for(
    bucket: str, s3_server: Any, make_worker: MakeWorker, open_api: Open, jobs: Any, expected: list[bytes]
) -> None:
    address = f"s3://{bucket}"
    begin(address)
    with open_api(image_store=address) as client:
        job = submit(client)
        s3_server.leave()
        worker = make_worker(image_store=address)
        assert worker.writer.trouble and worker.writer.mark == ""
        working = threading.Thread(target=worker.work)
        working.start()
        assert jobs.status(job) == "queued"
        s3_server.come_back()
        deadline = time.monotonic() + 60
        while jobs.status(job) != "succeeded" and time.monotonic() < deadline:
            time.sleep(0.02)
        worker._stop_requested = True
        jobs.redis.lpush(jobs.bell, "1")
        working.join(60)
        assert_served(client, job, expected)
