"""A line per record, as text or as JSON, and one id from the request to the worker's last word about the job."""

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from starlette.testclient import TestClient

from app.auth import read_keys
from app.logs import REQUEST_ID, JsonFormatter, accepted_id
from worker import protocol

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What has been logged so far, by all of dit, as JSON."""
    stream, root = io.StringIO(), logging.getLogger("dit")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root.addHandler(handler)
    before = root.level
    root.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.removeHandler(handler)
    root.setLevel(before)


def formatted(**record: Any) -> dict[str, Any]:
    return dict(json.loads(JsonFormatter().format(logging.makeLogRecord({"name": "dit.test", "levelname": "INFO", **record}))))


# --- a record -----------------------------------------------------------------------------------------------------------


def test_a_record_is_one_object_on_one_line() -> None:
    told = formatted(msg="job %s\nfailed: “%s” \ud800", args=("a", "ü"), created=1_700_000_000.25)
    assert told == {"time": "2023-11-14T22:13:20.250+00:00", "level": "info", "logger": "dit.test", "message": "job a\nfailed: “ü” \ud800"}


def test_ids_are_told_where_they_are_known() -> None:
    assert formatted(msg="x", job_id="a", request_id="b").items() >= {"job_id": "a", "request_id": "b"}.items()
    assert not formatted(msg="x", job_id="", request_id="").keys() & {"job_id", "request_id"}
    token = REQUEST_ID.set("of the request")
    assert formatted(msg="x")["request_id"] == "of the request"
    REQUEST_ID.reset(token)


def test_an_exception_is_told_with_its_stack() -> None:
    try:
        raise ValueError("no luck")
    except ValueError:
        told = formatted(msg="x", exc_info=sys.exc_info())
    assert told["exception"].startswith("Traceback") and told["exception"].endswith("ValueError: no luck")


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_process_logs_as_it_was_told(format: str) -> None:
    code = f"import logging; from app.logs import log_to_stderr; log_to_stderr({format!r}); logging.getLogger('dit.x').info('hello')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    if format == "text":
        assert re.fullmatch(r"\d\d:\d\d:\d\d dit\.x: hello\n", done.stderr)
    else:
        assert json.loads(done.stderr)["message"] == "hello"


# --- a request ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "A-b_c.d:9", "x" * 128, "01890a5d-ac96-774b-bcce-b302099a8057"])
def test_a_request_id_that_comes_is_kept(client: TestClient, given: str) -> None:
    assert accepted_id(given) == given
    assert client.get("/models", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", " ", "x" * 129, "a b", 'a"b', "a\tb", "ü"])
def test_any_other_is_replaced_by_one_of_ours(client: TestClient, given: str) -> None:
    told = client.get("/models", headers={"X-Request-Id": given.encode("latin-1")}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", told)
    assert told != client.get("/models").headers["x-request-id"]


@pytest.mark.parametrize(("path", "status"), [("/healthz", 200), ("/nothing", 404), ("/jobs/x", 404), ("/static/page.js", 200)])
def test_every_answer_has_an_id(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status and answer.headers["x-request-id"]


def test_also_that_of_a_bug(client: TestClient, monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    async def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(client.app.state.jobs, "models", fail)  # type: ignore[attr-defined]
    answer = TestClient(client.app, raise_server_exceptions=False).get("/models", headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
    assert lines()[-1].items() >= {"status": 500, "request_id": "mine"}.items()


def test_a_request_leaves_a_line(client: TestClient, lines: Lines) -> None:
    client.get("/jobs/abc/images/0?token=secret", headers={"X-Request-Id": "mine"})
    [line] = lines()
    assert 0 <= line.pop("seconds") < 10 and line.pop("time")
    assert "secret" not in line.pop("message")
    assert line == {
        "level": "info",
        "logger": "dit.access",
        "request_id": "mine",
        "job_id": "abc",
        "method": "GET",
        "path": "/jobs/abc/images/0",
        "status": 404,
    }


def test_the_line_of_a_call_with_a_key_names_the_key_and_shows_nothing_of_its_secret(
    open_client: Callable[..., Any], key_file: Path, bearer: Callable[..., dict[str, str]], lines: Lines
) -> None:
    headers = bearer("alice", in_flight=4)
    (entry,) = read_keys(key_file)
    with open_client(api_keys_file=key_file) as client:
        client.post("/generate", json={"class_label": 0}, headers=headers)
        client.get("/models", headers={"Authorization": headers["Authorization"][:-1]})
        client.get("/models")
    told = [line for line in lines() if line["logger"] == "dit.access"]
    assert [line.get("key_id") for line in told] == [entry.id, None, None]
    secret = headers["Authorization"].rpartition("_")[2]
    assert secret[:-1] not in json.dumps(lines()) and entry.sha256 not in json.dumps(lines()) and entry.id in told[0]["message"]


def test_a_path_cannot_forge_a_line(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dit.access")
    client.get("/a%0Adit.access:%20forged")
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_probes_and_scrapes_leave_none(client: TestClient, live: Callable[..., None], lines: Lines) -> None:
    client.get("/healthz"), client.get("/metrics")
    live()
    client.get("/readyz")  # the API may have been in trouble in another test
    before = len(lines())
    live(ttl_s=1)  # a worker that was not heard of for long
    for _ in range(3):
        client.get("/readyz")
    live()
    for _ in range(3):
        client.get("/readyz")
    assert [line["status"] for line in lines()][before:] == [503, 200], "but a change does"
    assert before <= 1


# --- to the job ---------------------------------------------------------------------------------------------------------


def test_the_id_goes_with_the_job(client: TestClient, redis: Redis, lines: Lines) -> None:
    job = client.post("/generate", json={"class_label": 0}, headers={"X-Request-Id": "mine"}).json()["id"]
    assert redis.hget(protocol.job_key(job), "request_id") == b"mine"
    waits, access = lines()
    assert (waits["message"], waits["job_id"], waits["request_id"]) == (f"job {job} waits", job, "mine")
    assert access.items() >= {"path": "/generate", "status": 202, "request_id": "mine"}.items()
