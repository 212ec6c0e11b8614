"""Who may call: the key file, keys on every call, scopes."""

import hmac
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from app import auth
from app.auth import OPEN, ApiKey, Caller, KeyFile, digest, dump_keys, parse_keys, read_keys
from app.embedded import EmbeddedServer
from app.keys import create_key, revoke_key
from app.main import create_app
from app.routes.dependencies import GenerateCaller
from app.settings import Settings

Open = Callable[..., AbstractContextManager[TestClient]]
Bearer = Callable[..., dict[str, str]]

ENTRY: dict[str, Any] = {
    "id": "3f9c2a10",
    "name": "alice",
    "sha256": "5e" * 32,
    "scope": "generate",
    "created_at": "2026-11-25T04:18:36+00:00",
}
SECRET = "a secret that was put into the wrong field"


def file_of(*entries: Any) -> bytes:
    return json.dumps({"keys": entries}).encode()


def other(**changes: Any) -> dict[str, Any]:
    """A second entry that goes with ENTRY."""
    return {**ENTRY, "id": "00000001", "name": "bob", "sha256": "5f" * 32, **changes}


def refusal(data: bytes) -> str:
    with pytest.raises(ValueError) as told:
        parse_keys(data)
    return str(told.value)


# --- the file ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read() -> None:
    keys = (ApiKey(**ENTRY), ApiKey(**other(per_minute=60, in_flight=4)), ApiKey(**other(id="00000002", sha256="60" * 32, disabled=True)))
    assert parse_keys(dump_keys(keys)) == keys
    assert parse_keys(file_of()) == ()


def test_an_entry_is_a_caller() -> None:
    (key,) = parse_keys(file_of({**ENTRY, "per_minute": 60, "in_flight": 4}))
    assert key.caller == Caller("3f9c2a10", "alice", "generate", 60, 4) and not key.caller.is_admin
    assert parse_keys(file_of({**ENTRY, "scope": "admin"}))[0].caller.is_admin


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("id", "3F9C2A10", "8 hexadecimal digits"),
        ("id", 12345678, "8 hexadecimal digits"),
        ("name", "", "1 to 64"),
        ("name", "a" * 65, "1 to 64"),
        ("name", "alice\n", "1 to 64"),
        ("name", "\ud800", "1 to 64"),
        ("sha256", SECRET, "64 hexadecimal digits"),
        ("scope", "root", "generate, train, admin"),
        ("scope", ["admin"], "generate, train, admin"),
        ("created_at", "yesterday", "2026-11-25T04:18:36+00:00"),
        ("created_at", 1764044316, "2026-11-25T04:18:36+00:00"),
        ("per_minute", 0, "from 1 to 1000000"),
        ("per_minute", 1_000_001, "from 1 to 1000000"),
        ("per_minute", 1.5, "whole number"),
        ("per_minute", True, "whole number"),
        ("per_minute", "60", "whole number"),
        ("in_flight", -1, "from 1 to 1000000"),
        ("in_flight", float("nan"), "whole number"),
        ("disabled", 1, "true, false or absent"),
        ("disabled", None, "true, false or absent"),
    ],
)
def test_a_wrong_value_is_told_with_its_place_and_what_is_allowed_and_is_not_repeated(field: str, value: Any, allowed: str) -> None:
    told = refusal(file_of(other(), {**ENTRY, field: value}))
    assert told.startswith(f"key 2: {field} must be ") and allowed in told and SECRET not in told


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "must be JSON"),
        (b"\xff", "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        (b'{"keys": ' + b"9" * 5000 + b"}", "must be JSON"),
        (file_of(ENTRY)[:-2] + b"], " + b'"keys": []}', "'keys' is there twice"),
        (file_of(ENTRY).replace(b'"scope"', b'"disabled": true, "disabled": false, "scope"'), "'disabled' is there twice"),
        (b"null", 'one field, "keys"'),
        (b"[]", 'one field, "keys"'),
        (b'{"keys": {}}', 'one field, "keys"'),
        (b'{"keys": [], "version": 1}', 'one field, "keys"'),
        (file_of("dit_3f9c2a10_00"), "key 1 must be an object"),
        (file_of({name: value for name, value in ENTRY.items() if name != "scope"}), "key 1 lacks scope"),
        (file_of({**ENTRY, "per_minut": 5}), "key 1 has a field 'per_minut'; there is id, name"),
        (file_of(ENTRY, other(id=ENTRY["id"])), "two keys have the id 3f9c2a10"),
        (file_of(ENTRY, other(sha256=ENTRY["sha256"])), "keys 3f9c2a10 and 00000001 are the same"),
        (file_of(ENTRY, other(name="alice")), "the name alice belongs to key 3f9c2a10"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_what_is_no_key_file_is_refused_with_the_reason(data: bytes, told: str) -> None:
    assert told in refusal(data)


def test_a_revoked_key_leaves_its_name_to_another() -> None:
    assert len(parse_keys(file_of({**ENTRY, "disabled": True}, other(name="alice")))) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=12),  # lone surrogates too
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
ENTRIES = st.dictionaries(st.sampled_from([*ENTRY, "per_minute", "in_flight", "disabled"]), JSON).map(lambda changes: {**ENTRY, **changes})


def check_parser(data: bytes) -> None:
    """Keys, or a ValueError that says something."""
    try:
        assert all(isinstance(key, ApiKey) for key in parse_keys(data))
    except ValueError as error:
        assert type(error) is ValueError and str(error)


@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_any_bytes_are_keys_or_a_value_error(data: bytes) -> None:
    check_parser(data)


@given(document=JSON | st.fixed_dictionaries({"keys": st.lists(ENTRIES | JSON, max_size=3)}))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_any_json_is_keys_or_a_value_error(document: Any) -> None:
    check_parser(json.dumps(document).encode())


@given(at=st.integers(0, 250), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_a_key_file_with_any_byte_changed_is_keys_or_a_value_error(at: int, byte: int) -> None:
    data = bytearray(file_of(ENTRY, other()))
    data[at % len(data)] = byte
    check_parser(bytes(data))


# --- the keys in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 2, None], ids=["first", "last", "none"])
def test_every_entry_is_compared_in_constant_time_wherever_the_key_is(
    key_file: Path, monkeypatch: pytest.MonkeyPatch, place: int | None
) -> None:
    keys = [create_key(key_file, name, "generate") for name in ("alice", "bob", "carol")]
    compared: list[tuple[str, str]] = []

    def compare(stored: str, wanted: str) -> bool:
        compared.append((stored, wanted))
        return hmac.compare_digest(stored, wanted)

    monkeypatch.setattr(auth, "hmac", type("Module", (), {"compare_digest": staticmethod(compare)}))
    presented = b"dit_00000000_0" if place is None else keys[place][1].encode()
    found = KeyFile(key_file).find(presented)
    assert compared == [(entry.sha256, digest(presented)) for entry, _ in keys]
    assert found == (None if place is None else keys[place][0])


def test_a_part_of_a_key_is_no_key(key_file: Path) -> None:
    entry, key = create_key(key_file, "alice", "generate")
    keys = KeyFile(key_file)
    for wrong in (key[:-1], key + "0", key.upper(), key.removeprefix("dit_"), key.split("_")[2], entry.id, entry.sha256, ""):
        assert keys.find(wrong.encode()) is None
    assert keys.find(key.encode()) == entry


def test_a_changed_file_is_read_at_the_next_call(key_file: Path) -> None:
    _, first = create_key(key_file, "alice", "generate")
    keys = KeyFile(key_file)
    entry, second = create_key(key_file, "bob", "admin")
    assert keys.find(second.encode()) == entry and keys.find(first.encode())
    revoke_key(key_file, entry.id)
    assert keys.find(second.encode()) is None and keys.find(first.encode())


@pytest.mark.parametrize("damage", ["broken", "gone", "a folder"])
def test_a_file_that_breaks_is_told_once_and_the_keys_from_before_stay(
    key_file: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    _, key = create_key(key_file, "alice", "generate")
    keys, sound = KeyFile(key_file), key_file.read_bytes()
    if damage == "broken":
        key_file.write_bytes(sound[:-10])
    else:
        key_file.unlink()
        if damage == "a folder":
            key_file.mkdir()
    with caplog.at_level(logging.INFO, "dit.api"):
        assert keys.find(key.encode()) and keys.find(key.encode())
    (line,) = caplog.messages
    assert "refused" in line and str(key_file) in line
    if damage == "a folder":
        key_file.rmdir()
    key_file.write_bytes(file_of())
    assert keys.find(key.encode()) is None  # it is whole again, and has no keys


def test_without_a_sound_key_file_there_is_no_api(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    make = lambda: create_app(Settings(_env_file=None, redis_url="redis://127.0.0.1:1", api_keys_file=path))  # noqa: E731
    with pytest.raises(ValueError, match="No such file"):
        make()
    path.write_text("{}")
    with pytest.raises(ValueError, match='must be an object with one field, "keys"'):
        make()


# --- over HTTP ---------------------------------------------------------------------------------------------------------

PUBLIC = ["/", "/docs", "/openapi.json", "/healthz", "/readyz", "/static/page.js", "/static/swagger/swagger-ui.css"]
JOB = "/jobs/019a0000-0000-7000-8000-000000000000"
GUARDED = [
    ("POST", "/generate"),
    ("GET", "/jobs"),
    ("GET", f"{JOB}/grid"),
    ("GET", JOB),
    ("DELETE", JOB),
    ("GET", f"{JOB}/images/0"),
    ("GET", f"{JOB}/events"),
    ("GET", "/models"),
    ("GET", "/models/tiny"),
]


def refused(answer: Any, status: int) -> str:
    """The detail of a problem document."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    document = answer.json()
    assert (document["status"], document["instance"]) == (status, answer.request.url.path) and document["title"]
    return str(document["detail"])


def test_every_call_but_the_public_ones_needs_a_key(open_client: Open, key_file: Path, bearer: Bearer) -> None:
    bearer()
    with open_client(api_keys_file=key_file) as client:
        described = {(verb.upper(), path) for path, verbs in client.get("/openapi.json").json()["paths"].items() for verb in verbs}
        calls = [(verb, path.format(job_id="1", index=0, model_id="tiny", model="tiny")) for verb, path in described if path not in PUBLIC]
        assert len(calls) == len(GUARDED) + len(["metrics", "queues", "pause", "drain", "resume"])
        for verb, path in [*calls, ("GET", "/nothing"), ("GET", "/static"), ("GET", "/healthz/"), ("OPTIONS", "/models")]:
            answer = client.request(verb, path)
            assert "Authorization: Bearer" in refused(answer, 401), path
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", PUBLIC)
def test_the_public_paths_stay_open_whatever_key_is_shown(
    open_client: Open, key_file: Path, bearer: Bearer, live: Callable[..., None], path: str
) -> None:
    bearer()
    live()
    with open_client(api_keys_file=key_file) as client:
        for headers in ({}, {"Authorization": "Bearer nothing"}):
            assert client.get(path, headers=headers).status_code == 200


def test_no_way_leads_through_the_static_files(open_client: Open, key_file: Path, bearer: Bearer) -> None:
    bearer()
    with open_client(api_keys_file=key_file) as client:
        for path in ("/static/%2e%2e/models", "/static/..%2fmodels", "/static//models", "/static/%2e%2e/%2e%2e/app/auth.py"):
            assert client.get(path).status_code == 404
        for path in ("/%2e/models", "/models%2f", "/MODELS", "/docs/models"):
            assert client.get(path).status_code == 401


def test_what_is_no_key_of_the_file_is_401(open_client: Open, key_file: Path, bearer: Bearer) -> None:
    good = bearer()["Authorization"].removeprefix("Bearer ")
    with open_client(api_keys_file=key_file) as client:
        for wrong in (good[:-1], good.upper(), "nothing", good.split("_")[2], "\xff", "a" * 4000):
            answer = client.get("/models", headers={"Authorization": f"Bearer {wrong}".encode("latin-1")})
            assert "not known" in refused(answer, 401) and answer.headers["www-authenticate"] == "Bearer"
        for wrong in ("", "Bearer", "Bearer ", good, f"Basic {good}", f"Bearer{good}"):
            assert "needs a key" in refused(client.get("/models", headers={"Authorization": wrong}), 401)
        twice = [("Authorization", f"Bearer {good}"), ("Authorization", "Bearer nothing")]
        assert "needs a key" in refused(client.get("/models", headers=twice), 401)
        for right in (f"Bearer {good}", f"bearer {good}", f"BEARER   {good} "):
            assert client.get("/models", headers={"Authorization": right}).status_code == 200


@pytest.mark.parametrize("scope", ["generate", "admin"])
def test_a_key_of_the_scope_makes_pictures_and_so_does_an_admin(
    open_client: Open, key_file: Path, bearer: Bearer, worker: Any, scope: str
) -> None:
    headers = bearer(scope=scope)
    with open_client(api_keys_file=key_file) as client:
        job_id = client.post("/generate", json={"class_label": 0}, headers=headers).json()["id"]
        worker.succeed(worker.take(job_id))
        for part in ("", "/images/0", "/events"):
            assert client.get(f"/jobs/{job_id}{part}", headers=headers).status_code == 200
        assert client.delete(f"/jobs/{job_id}", headers=headers).status_code == 409
        assert client.get("/models/tiny", headers=headers).status_code == 200


@pytest.mark.parametrize(("verb", "path"), GUARDED)
def test_a_key_of_another_scope_is_403_and_is_told_which_it_takes(
    open_client: Open, key_file: Path, bearer: Bearer, verb: str, path: str
) -> None:
    headers = bearer("trainer", scope="train")
    with open_client(api_keys_file=key_file) as client:
        detail = refused(client.request(verb, path, headers=headers), 403)
        assert "the scope generate or admin" in detail and "key trainer has train" in detail


def test_keys_come_and_go_while_the_api_runs(open_client: Open, key_file: Path, bearer: Bearer) -> None:
    bearer()
    with open_client(api_keys_file=key_file) as client:
        late = bearer("bob")
        assert client.get("/models", headers=late).status_code == 200
        (entry,) = [key for key in read_keys(key_file) if key.name == "bob"]
        revoke_key(key_file, entry.id)
        assert "revoked" in refused(client.get("/models", headers=late), 401)


def who_asks(open_client: Open, headers: dict[str, str], **settings: Any) -> dict[str, Any]:
    """What a route is given as the caller."""
    with open_client(**settings) as client:

        @client.app.get("/whoami")  # type: ignore[attr-defined]
        async def whoami(caller: GenerateCaller) -> dict[str, Any]:
            return asdict(caller)

        return dict(client.get("/whoami", headers=headers).json())


def test_a_route_is_given_the_caller(open_client: Open, key_file: Path, bearer: Bearer) -> None:
    headers = bearer("bob", scope="admin", per_minute=60, in_flight=4)
    (entry,) = read_keys(key_file)
    assert who_asks(open_client, headers, api_keys_file=key_file) == asdict(Caller(entry.id, "bob", "admin", 60, 4))


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer nothing"}, {"Authorization": "Basic bm90aGluZw=="}], ids=str)
def test_without_a_key_file_everybody_is_the_open_caller(open_client: Open, headers: dict[str, str]) -> None:
    assert who_asks(open_client, headers) == asdict(OPEN)
    assert Caller("", "", "admin", None, None) == OPEN and OPEN.is_admin


def test_while_redis_is_gone_keys_are_still_asked_for(
    mortal_server: EmbeddedServer, open_client: Open, key_file: Path, bearer: Bearer
) -> None:
    limited, unlimited = bearer("alice", per_minute=100), bearer("bob")
    with open_client(redis_url=mortal_server.url, api_keys_file=key_file) as client:
        mortal_server.stop()
        refused(client.get("/models"), 401)
        for headers in (limited, unlimited):
            answer = client.get("/models", headers=headers)
            assert "Redis" in refused(answer, 503) and int(answer.headers["retry-after"]) > 0
        mortal_server.start()
        assert client.get("/models", headers=limited).status_code == 200
