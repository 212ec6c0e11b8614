"""Whatever stands in a header, a cursor or an id: it is understood, ignored as its RFC says, or a problem document that names it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from starlette.testclient import TestClient

from app.events import is_event_id
from app.jobs import id_time, new_id
from app.routes.generate import MAX_WAIT_S, preferred_wait
from app.routes.jobs import _has
from app.transport import _retry_after_s
from tests.bent import bent_bytes

QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
RAW = st.binary(max_size=40).map(lambda data: data.translate(None, b"\r\n\0"))  # what a server lets through as a header


# --- each parser by itself ---------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    st.text(max_size=60)
    | st.integers(0, 10**8).map(lambda n: f"wait={n}")
    | bent_bytes(b'respond-async, wait="30"').map(lambda b: b.decode("latin-1"))
)
def test_any_preference_is_a_wait_of_at_most_a_minute(prefer: str) -> None:
    assert 0 <= preferred_wait(prefer) <= MAX_WAIT_S


def test_a_preference_without_an_end_is_read_in_no_time() -> None:
    for prefer in ("wait" + " " * 60_000 + "x", "," * 60_000, "wait=" * 12_000, "wait=" + "9" * 60_000, '"' * 60_000):
        assert preferred_wait(prefer) == 0


@settings(max_examples=300)
@given(st.text(max_size=60), st.binary(min_size=32, max_size=32))
def test_any_if_none_match_has_the_tag_or_not(given_text: str, digest: bytes) -> None:
    tag = f'"{digest.hex()}"'
    assert _has(given_text, tag) == ("*" in [part.strip().removeprefix("W/") for part in given_text.split(",")])
    assert all(_has(text, tag) for text in (tag, f"W/{tag}", f'"x",{tag}', "*"))


@settings(max_examples=300)
@given(
    st.text(max_size=50)
    | st.text("0123456789-", max_size=45)
    | st.tuples(st.integers(0), st.integers(0)).map(lambda ids: f"{ids[0]}-{ids[1]}")
)
def test_any_last_event_id_is_refused_or_one_that_redis_takes(id_server: Redis, text: str) -> None:
    assert not is_event_id(text) or id_server.xread({"nothing": text}) == []


@pytest.fixture(scope="module")
def id_server(server: Any) -> Iterator[Redis]:
    with Redis.from_url(server.url, protocol=2) as client:
        yield client


@settings(max_examples=300)
@given(
    st.text(max_size=50)
    | st.uuids().map(str)
    | st.builds(new_id).flatmap(lambda name: bent_bytes(name.encode())).map(lambda b: b.decode("latin-1"))
)
def test_any_cursor_is_an_id_of_ours_or_none(text: str) -> None:
    seconds = id_time(text)
    if seconds is not None:
        assert len(text) == 36 and text[14] == "7" and 0 <= seconds < 2**48 / 1000


@settings(max_examples=300)
@given(st.text(max_size=40) | st.sampled_from(["9" * 5000, "Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 GMT", "-1", "²"]))
def test_any_retry_after_is_seconds_or_none(text: str) -> None:
    seconds = _retry_after_s(text)
    assert seconds is None or seconds >= 0


# --- over HTTP ---------------------------------------------------------------------------------------------------------


@settings(QUIET, max_examples=150)
@given(
    name=st.sampled_from(["Prefer", "Idempotency-Key", "Accept", "If-None-Match", "Last-Event-ID", "X-Request-Id", "Authorization"]),
    value=RAW,
)
def test_no_header_whatever_is_an_internal_error(client: TestClient, done: str, name: str, value: bytes) -> None:
    """Of a job that has ended, so that its events end."""
    for path in (f"/jobs/{done}", f"/jobs/{done}/images/0", f"/jobs/{done}/events"):
        answer = client.get(path, headers={name: value})
        assert answer.status_code in (200, 304, 422), answer.text
        assert answer.status_code != 422 or answer.json()["errors"][0]["field"].lower() == name.lower()


@pytest.fixture
def done(submit: Callable[..., str], worker: Any) -> str:
    return str(worker.succeed(worker.take(submit())))


@settings(QUIET, max_examples=60)
@given(key=st.binary(max_size=300).map(lambda data: data.translate(None, b"\r\n\0")))
def test_any_idempotency_key_of_up_to_255_characters_makes_one_job(client: TestClient, key: bytes) -> None:
    answers = [client.post("/generate", json={"class_label": 0, "seed": 1}, headers={"Idempotency-Key": key}) for _ in range(2)]
    statuses = {answer.status_code for answer in answers}
    if len(key) > 255:
        assert statuses == {422} and all(answer.json()["errors"][0]["field"].lower() == "idempotency-key" for answer in answers)
    else:
        assert statuses == {202} and answers[0].json()["id"] == answers[1].json()["id"]


@settings(QUIET, max_examples=60)
@given(cursor=st.text(max_size=60) | st.builds(new_id))
def test_any_cursor_is_a_page_or_a_problem(client: TestClient, cursor: str) -> None:
    answer = client.get("/jobs", params={"cursor": cursor.encode(errors="surrogatepass")})
    assert answer.status_code in (200, 422)
    assert answer.status_code == 200 or answer.json()["errors"][0]["field"] == "cursor"


@settings(QUIET, max_examples=60)
@given(name=st.binary(min_size=1, max_size=30), part=st.sampled_from(["", "/events", "/images/0", "/grid"]))
def test_any_bytes_in_the_place_of_an_id_are_a_problem(client: TestClient, name: bytes, part: str) -> None:
    escaped = "".join(f"%{byte:02x}" for byte in name)
    assert client.get(f"/jobs/{escaped}{part}").status_code in (200, 404, 405, 422)
