"""What a worker says about a job tells which job it was, and which request had submitted it."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from app.logs import REQUEST_ID
from worker.protocol import GenerationRequest
from worker.rq_worker import DiTWorker

MakeRequest = Callable[..., GenerationRequest]

pytestmark = pytest.mark.usefixtures("in_this_process")


def submit(jobs: Any, request: GenerationRequest, request_id: str) -> str:
    """As the API does while it answers this request."""
    token = REQUEST_ID.set(request_id)
    try:
        return str(jobs.submit(request))
    finally:
        REQUEST_ID.reset(token)


def ids(caplog: pytest.LogCaptureFixture) -> set[tuple[str, str]]:
    """Of every line about a job."""
    about = [record for record in caplog.records if record.getMessage().startswith("job ")]
    return {(vars(record)["job_id"], vars(record)["request_id"]) for record in about}


def test_a_job_that_succeeds_and_one_that_is_refused(
    jobs: Any, worker: DiTWorker, make_request: MakeRequest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dit")
    made, refused = submit(jobs, make_request(), "one"), submit(jobs, make_request(class_labels=(9,)), "other")
    worker.work(burst=True)
    assert ids(caplog) == {(made, "one"), (refused, "other")}
    assert [record.getMessage() for record in caplog.records if vars(record).get("job_id") == made] == [
        f"job {made} runs here",
        f"job {made} has ended",
    ]


def test_a_job_that_fails_in_a_step(
    jobs: Any, worker: Any, make_request: MakeRequest, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(worker.engine.runner, "step", fail)
    job = submit(jobs, make_request(), "mine")
    worker.work(burst=True)
    assert ids(caplog) == {(job, "mine")} and f"job {job} failed in a step" in caplog.text


def test_a_job_that_no_request_submitted(jobs: Any, worker: DiTWorker, make_request: MakeRequest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dit")
    job = jobs.submit(make_request())
    assert "request_id" not in jobs.record(job)
    worker.work(burst=True)
    assert ids(caplog) == {(job, "")}
