"""What is read from Redis is shown as it was written, or left out and logged: one damaged record breaks nothing else."""

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis
from starlette.testclient import TestClient

from app.server_sent import read_event, server_sent
from app.views import job_view
from tests.bent import DEEP, JUNK, LONG, bent_bytes, bent_json, text_of
from worker import protocol
from worker.protocol import GenerationRequest, ModelRecord

REQUEST = GenerationRequest("tiny", (2, None, 1), 2.0, (0.1, 0.9), 25, "euler", 40)
RECORD = {
    b"status": b"succeeded",
    b"model": b"tiny",
    b"request": REQUEST.dump().encode(),
    b"checkpoint": b"c" * 64,
    b"step": b"25",
    b"images": json.dumps([{"index": i, "seed": 40 + i, "sha256": "5e" * 32, "bytes": 300} for i in range(3)]).encode(),
    b"error": b"",
    b"created_at": b"1764044316.25",
    b"started_at": b"1764044317.5",
    b"finished_at": b"1764044318",
}


# --- a job -------------------------------------------------------------------------------------------------------------


def check_view(record: dict[bytes, bytes]) -> None:
    try:
        view = job_view("a-job", record)
    except ValueError as error:
        assert str(error).startswith("the record of job a-job is damaged: ") and "\n" not in str(error) and len(str(error)) < 500
        return
    assert json.loads(json.dumps(view, allow_nan=False, ensure_ascii=False).encode()) == view


def test_a_sound_record_is_shown() -> None:
    view = job_view("a-job", RECORD)
    assert (view["status"], view["created_at"], len(view["images"])) == ("succeeded", "2025-11-25T04:18:36.250+00:00", 3)


@settings(max_examples=300)
@given(st.sampled_from(sorted(RECORD)), st.data())
def test_a_record_with_a_bent_field_is_shown_or_a_value_error(name: bytes, data: st.DataObject) -> None:
    sound = RECORD[name]
    junk = st.binary(max_size=8) | st.sampled_from([b"nan", b"1e400", b"-1e30", b"9" * 5000, b"\xff", DEEP.encode()]) | bent_bytes(sound)
    if name in (b"request", b"images"):
        junk |= bent_json(json.loads(sound)).map(lambda document: text_of(document).encode())
    bent = data.draw(st.none() | junk)
    check_view({key: value for key, value in {**RECORD, name: bent}.items() if value is not None})


@given(st.dictionaries(st.sampled_from(sorted(RECORD)) | st.binary(max_size=5), st.binary(max_size=20)))
def test_any_record_is_shown_or_a_value_error(record: dict[bytes, bytes]) -> None:
    check_view(record)


@pytest.fixture
def damaged(submit: Callable[..., str], redis: Redis) -> str:
    job_id = submit()
    redis.hset(protocol.job_key(job_id), "request", "{")
    return job_id


@pytest.mark.parametrize(("verb", "part"), [("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("GET", "/grid"), ("DELETE", "")])
def test_a_damaged_job_is_told_as_that(client: TestClient, damaged: str, caplog: pytest.LogCaptureFixture, verb: str, part: str) -> None:
    answer = client.request(verb, f"/jobs/{damaged}{part}")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert f"the record of job {damaged} is damaged" in answer.json()["detail"]
    assert [line for line in caplog.messages if "not a generation request" in line]


def test_a_damaged_job_is_left_out_of_the_list(client: TestClient, damaged: str, submit: Callable[..., str]) -> None:
    other = submit()
    assert [job["id"] for job in client.get("/jobs").json()["jobs"]] == [other]
    assert client.get("/jobs", params={"limit": 1}).json()["jobs"][0]["id"] == other


# --- its events --------------------------------------------------------------------------------------------------------


def heard(text: str) -> list[tuple[str, str, str]]:
    """(id, event, data) as a parser of server-sent events that is not ours hears them."""
    response = httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=text, request=httpx2.Request("GET", "http://a"))
    return [(message.id, message.event, message.data) for message in httpx2.EventSource(response)]


def check_event(entry: dict[bytes, bytes]) -> None:
    """An entry that is read is exactly one event, whatever is in it."""
    try:
        name, data = read_event(entry)
    except ValueError as error:
        assert str(error).startswith("not an event of a job: ") and "\n" not in str(error)
        return
    ((told_id, told_name, told_data),) = heard(server_sent("1-0", name, data))
    assert (told_id, told_name) == ("1-0", name)
    assert text_of(json.loads(told_data)) == text_of(json.loads(entry[b"data"]))


@settings(max_examples=200)
@given(st.sampled_from(["queued", "progress", "done"]), st.dictionaries(st.text(max_size=5), JUNK, max_size=3), st.sampled_from([None, 2]))
def test_whatever_an_event_says_is_heard_as_one_event(name: str, document: dict[str, Any], indent: int | None) -> None:
    check_event({b"event": name.encode(), b"data": json.dumps(document, indent=indent).encode()})


@settings(max_examples=200)
@given(
    st.dictionaries(st.sampled_from([b"event", b"data"]), st.binary(max_size=20) | st.sampled_from([b"done", b"{}", b"{\r\n}", b"a\nb"]))
)
def test_any_entry_is_one_event_or_a_value_error(entry: dict[bytes, bytes]) -> None:
    check_event(entry)


@pytest.mark.parametrize(
    "data", ["{}\n\nevent: done\ndata: {}", "[1]", "7", DEEP, f'{{"a": {LONG}}}', "\ufeff{}", ""], ids=lambda text: text[:12]
)
def test_data_that_is_no_object_is_no_event(data: str) -> None:
    with pytest.raises(ValueError):
        read_event({b"event": b"progress", b"data": data.encode()})


def test_line_separators_of_other_alphabets_stay_inside_the_data() -> None:
    for separator in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"):
        entry = {b"event": b"progress", b"data": json.dumps({"a": f"x{separator}y"}, ensure_ascii=False).encode()}
        if separator >= "\x20":  # JSON takes no other raw
            check_event(entry)
            assert read_event(entry)


def test_a_damaged_entry_is_left_out_of_the_stream_and_the_others_are_told(
    client: TestClient, submit: Callable[..., str], worker: Any, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = worker.take(submit())
    key = protocol.events_key(job_id)
    for entry in ({"event": "progress"}, {"data": "{}"}, {"event": "a b", "data": "{}"}, {"event": b"\xff", "data": b"\xff"}):
        redis.xadd(key, entry)
    redis.xadd(key, {"event": "progress", "data": '{"step": 1,\n"steps": 4}'})
    worker.succeed(job_id)
    told = heard(client.get(f"/jobs/{job_id}/events").text)
    assert [name for _, name, _ in told] == ["queued", "progress", "progress", "image", "done"]
    assert json.loads(told[2][2]) == {"step": 1, "steps": 4}
    assert len([line for line in caplog.messages if f"an event of job {job_id} is left out" in line]) == 4


# --- a model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{", "null", '{"id": "broken"}', DEEP], ids=lambda text: text[:12])
def test_a_damaged_record_of_a_model_hides_no_other(
    client: TestClient,
    redis: Redis,
    serve: Callable[..., ModelRecord],
    submit: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    text: str,
) -> None:
    serve(id="broken")
    waiting = client.post("/generate", json={"class_label": 0, "model": "broken"}).json()["id"]
    redis.set(protocol.model_key("broken"), text)
    with caplog.at_level(logging.ERROR, "dit.api"):
        assert [model["id"] for model in client.get("/models").json()["models"]] == ["tiny"]
    assert "the record of a model cannot be read" in caplog.text
    assert client.get(f"/jobs/{submit()}").status_code == 200
    assert client.get(f"/jobs/{waiting}").json()["estimated_wait_s"] is None
    assert client.post("/generate", json={"class_label": 0, "model": "broken"}).status_code == 422
