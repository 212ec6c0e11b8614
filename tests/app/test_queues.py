"""Queues that an operator pauses, drains and resumes; and `/readyz`, which says whether a picture could be made now."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from click.testing import Result
from redis import Redis
from rq import suspension
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app.cli import app
from app.embedded import EmbeddedServer
from app.queues import look, set_state
from app.routes import queues as routes
from app.routes.dependencies import admin_only
from worker import protocol
from worker.intake import Intake

WORKER = "rq:worker:of-a-test"  # as the fixture `live` has it


def take(redis: Redis) -> str | None:
    """The next job of the tiny model, as an idle worker takes it."""
    found = Intake(redis, "worker").take(["tiny"], lambda model: True, idle=True)
    return found[1] if found else None


def queue(client: TestClient) -> dict[str, Any]:
    [only] = client.get("/queues").json()["queues"]
    return dict(only)


# --- what there is ------------------------------------------------------------------------------------------------------


def test_a_queue_tells_what_waits_runs_and_serves(
    client: TestClient, submit: Callable[..., str], redis: Redis, live: Callable[..., None]
) -> None:
    counts = {"waiting": 0, "running": 0, "workers": 0, "troubled": 0}
    assert queue(client) == {"model": "tiny", "state": "open", **counts, "served": True, "oldest_s": 0.0}
    first, *_ = [submit() for _ in range(3)]
    live()
    redis.hincrbyfloat(protocol.job_key(first), "created_at", -5)
    redis.zadd("rq:wip:dit-tiny", {"a:1": redis.time()[0] + 15, "b:1": 1})
    told = queue(client)
    assert 5 <= told.pop("oldest_s") < 30
    counts = {"waiting": 3, "running": 1, "workers": 1, "troubled": 0}
    assert told == {"model": "tiny", "state": "open", **counts, "served": True}, "a lease that ran out is none"


def test_a_model_that_is_served_no_more_keeps_its_queue(client: TestClient, redis: Redis, serve: Callable[..., Any]) -> None:
    serve(id="another")
    redis.delete(protocol.model_key("another"))
    assert [(q["model"], q["served"]) for q in client.get("/queues").json()["queues"]] == [("another", False), ("tiny", True)]


# --- the gate -----------------------------------------------------------------------------------------------------------


def test_a_paused_queue_takes_jobs_and_gives_none(client: TestClient, submit: Callable[..., str], redis: Redis) -> None:
    paused = client.post("/queues/tiny/pause")
    assert (paused.status_code, paused.json()["state"]) == (200, "paused")
    job = submit()
    assert take(redis) is None and queue(client)["waiting"] == 1
    assert client.post("/queues/tiny/resume").json()["state"] == "open"
    assert take(redis) == job


def test_a_paused_queue_does_not_hold_up_another(
    client: TestClient, submit: Callable[..., str], serve: Callable[..., Any], redis: Redis
) -> None:
    serve(id="another")
    held, other = submit(model="tiny"), submit(model="another")
    client.post("/queues/tiny/pause")
    intake = Intake(redis, "worker")
    assert intake.take(["tiny", "another"], lambda model: True, idle=True) == ("another", other)
    assert intake.take(["tiny", "another"], lambda model: True, idle=False) is None
    client.post("/queues/tiny/resume")
    assert intake.take(["tiny", "another"], lambda model: True, idle=True) == ("tiny", held)


def test_a_worker_that_waits_is_told_of_a_queue_that_opens(client: TestClient, submit: Callable[..., str], redis: Redis) -> None:
    client.post("/queues/tiny/pause")
    submit()
    assert take(redis) is None and redis.llen(protocol.bell_key("tiny")) == 0, "it answered for the ring"
    client.post("/queues/tiny/resume")
    assert redis.llen(protocol.bell_key("tiny")) == 1


def test_a_draining_queue_takes_nothing_and_gives_what_it_has(client: TestClient, submit: Callable[..., str], redis: Redis) -> None:
    job = submit()
    assert client.post("/queues/tiny/drain").json()["state"] == "draining"
    refused = client.post("/generate", json={"class_label": 0})
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:dit:problem:draining")
    assert int(refused.headers["retry-after"]) > 0
    assert redis.zcard(protocol.JOBS_KEY) == 1, "a refusal writes nothing"
    assert take(redis) == job
    client.post("/queues/tiny/resume")
    submit()


def test_a_request_that_is_repeated_while_its_queue_drains_finds_its_job(client: TestClient) -> None:
    ask: dict[str, Any] = {"json": {"class_label": 0}, "headers": {"Idempotency-Key": "once"}}
    job = client.post("/generate", **ask).json()["id"]
    client.post("/queues/tiny/drain")
    again = client.post("/generate", **ask)
    assert (again.status_code, again.json()["id"]) == (202, job)


@pytest.mark.parametrize("action", ["pause", "drain", "resume"])
def test_a_model_that_was_never_served_has_no_queue(client: TestClient, redis: Redis, action: str) -> None:
    answer = client.post(f"/queues/none/{action}")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert not redis.exists(protocol.gate_key("none"))


def test_every_route_of_queues_is_for_admins() -> None:
    assert [dependency.dependency for dependency in routes.router.dependencies] == [admin_only]


# --- readiness ----------------------------------------------------------------------------------------------------------


def test_ready_is_a_living_worker_of_a_model_whose_queue_is_open(
    bare_client: TestClient, serve: Callable[..., Any], live: Callable[..., None], redis: Redis
) -> None:
    def detail() -> str:
        answer = bare_client.get("/readyz")
        if answer.status_code == 200:
            return str(answer.json())
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:dit:problem:not-ready")
        assert int(answer.headers["retry-after"]) > 0
        return str(answer.json()["detail"])

    ready = "{'status': 'ready', 'models': ['tiny']}"
    assert detail() == "no worker serves a model at the moment"
    serve()
    assert detail() == "model tiny: its worker is gone"
    live()
    assert detail() == ready
    for state in ("paused", "draining"):
        set_state(redis, "tiny", state)
        assert detail() == f"model tiny: its queue is {state}"
    set_state(redis, "tiny", "open")
    suspension.suspend(redis)
    assert detail() == "model tiny: its queue is suspended"
    suspension.resume(redis)
    assert detail() == ready
    live(ttl_s=protocol.WORKER_TTL_S - protocol.LEASE_S - 1)
    assert detail() == "model tiny: its worker is gone", "and its record not yet"


def test_one_model_that_is_ready_is_enough(
    bare_client: TestClient, serve: Callable[..., Any], live: Callable[..., None], redis: Redis
) -> None:
    serve(), serve(id="another"), live()
    set_state(redis, "another", "paused")
    assert bare_client.get("/readyz").json() == {"status": "ready", "models": ["tiny"]}


def test_a_redis_that_is_full_is_not_ready(
    mortal_server: EmbeddedServer, open_client: Callable[..., AbstractContextManager[TestClient]]
) -> None:
    with open_client(redis_url=mortal_server.url) as client, Redis.from_url(mortal_server.url, protocol=2) as redis:
        redis.sadd(protocol.MODELS_KEY, "tiny")
        redis.set(protocol.model_key("tiny"), "{}")
        redis.sadd("rq:workers:dit-tiny", WORKER)
        redis.hset(WORKER, "pid", 1)
        redis.expire(WORKER, protocol.WORKER_TTL_S)
        assert client.get("/readyz").status_code == 200
        redis.config_set("maxmemory", 1)
        full = client.get("/readyz")
        assert (full.status_code, full.json()["type"]) == (503, "urn:dit:problem:redis-full")
        redis.config_set("maxmemory", 0)
        assert client.get("/readyz").status_code == 200


# --- the commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dit(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """`dit("pause", "tiny")`: as `dit queues pause tiny` is typed."""
    monkeypatch.setenv("DIT_REDIS_URL", server.url)
    return lambda *arguments: CliRunner().invoke(app, ["queues", *arguments])


def test_the_command_lists_queues(dit: Callable[..., Result], redis: Redis, serve: Callable[..., Any]) -> None:
    assert dit().stdout == "no model was ever served\n" and json.loads(dit("--json").stdout) == []
    serve()
    assert [entry["model"] for entry in json.loads(dit("--json").stdout)] == ["tiny"]
    header, line = dit().stdout.splitlines()
    assert header.split() == ["model", "state", "waiting", "running", "workers", "troubled", "served", "oldest_s"]
    assert line.split() == ["tiny", "open", "0", "0", "0", "0", "yes", "0.0"]


@pytest.mark.parametrize(("command", "state"), [("pause", "paused"), ("drain", "draining"), ("resume", "open")])
def test_the_commands_set_the_gate(dit: Callable[..., Result], redis: Redis, serve: Callable[..., Any], command: str, state: str) -> None:
    serve()
    assert dit(command, "tiny").stdout == f"the queue of tiny is {state}\n"
    assert [queue.state for queue in look(redis)] == [state]
    unknown = dit(command, "none")
    assert unknown.exit_code == 1 and unknown.stderr == "dit: there is no queue of a model 'none': none was ever served\n"


def test_without_redis_one_line_says_so(monkeypatch: pytest.MonkeyPatch, dit: Callable[..., Result]) -> None:
    monkeypatch.setenv("DIT_REDIS_URL", "redis://127.0.0.1:1/0")
    for command in ([], ["pause", "tiny"]):
        result = dit(*command)
        assert result.exit_code == 1 and result.stderr.startswith("dit: Redis does not answer: ") and result.stderr.count("\n") == 1
