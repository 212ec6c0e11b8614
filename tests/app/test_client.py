"""The typed client against the API over sockets."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, StreamingResponse
from redis import Redis
from starlette.responses import RedirectResponse, Response

from app import jobs as api_jobs
from app.client import (
    ApiError,
    Client,
    DamagedPicture,
    DoneEvent,
    Event,
    ImageEvent,
    Job,
    Model,
    Options,
    PreviewEvent,
    ProgressEvent,
    QueuedEvent,
    Unreachable,
)
from app.embedded import EmbeddedServer
from app.schemas import GenerateRequest, JobView, ModelView
from worker import protocol

Listen = Callable[..., AbstractContextManager[str]]
Paint = Callable[..., dict[str, Any]]


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture
def wired(wire: Any) -> Iterator[Client]:
    """A client whose connections the test can cut."""
    with Client(wire.url) as client:
        yield client


@pytest.fixture
def at_each_pause(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[float]]:
    """`at_each_pause(act)`: pauses take no time, and each does this; the seconds that they would have taken."""

    def use(act: Callable[[], object]) -> list[float]:
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            act()

        monkeypatch.setattr("app.transport.sleep", pause)
        return pauses

    return use


def finish(worker: Any, paint: Paint, job_id: str, count: int = 1, seed: int = 7) -> None:
    """What a worker does from the first step to the last picture."""
    worker.tell(job_id, "progress", {"step": 2, "steps": 4}, step=2)
    assert worker.results.succeed(job_id, "execution-1", [paint(job_id, i, seed + i) for i in range(count)])


# --- the contract ------------------------------------------------------------------------------------------------------


def test_the_client_knows_every_field_of_the_api() -> None:
    assert {"class_label", *Options.__annotations__} == set(GenerateRequest.model_fields)
    assert {field.name for field in fields(Job)} <= set(JobView.model_fields)
    assert {field.name for field in fields(Model)} <= set(ModelView.model_fields)


def test_the_client_needs_nothing_else_of_the_project() -> None:
    code = (
        "import sys, app.client; print([m for m in sys.modules if m.split('.')[0] in ('worker', 'redis', 'fastapi', 'pydantic', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


# --- jobs --------------------------------------------------------------------------------------------------------------


def test_a_job_is_queued_waited_for_and_its_pictures_fetched(client: Client, worker: Any, paint: Paint) -> None:
    queued = client.generate("house  CAT", num_images=2, seed=40, guidance_interval=(0.1, 0.9))
    with worker.meanwhile(lambda worker, job_id: finish(worker, paint, job_id, count=2, seed=40)):
        job = client.wait(queued.id)
    assert (queued.status, queued.is_final, queued.queue_position, queued.images) == ("queued", False, 0, ())
    assert (job.status, job.is_final, job.error, job.progress.step, job.progress.steps) == ("succeeded", True, None, 4, 4)
    assert job.class_labels == (0, 0) and job.request["guidance_interval"] == [0.1, 0.9]
    assert job.created_at <= job.started_at <= job.finished_at and job.created_at.tzinfo is not None
    assert [image.seed for image in job.images] == [40, 41]
    assert [client.image(job.id, i) for i in range(2)] == [b"\x89PNG\r\n\x1a\n of seed %d" % seed for seed in (40, 41)]


def test_what_a_job_tells_of_its_request_can_be_asked_for_again(client: Client) -> None:
    first = client.generate(["dog", None, 3], steps=7, guidance_scale=1.5, sampler="euler")
    again = client.generate(**first.request)
    assert first.class_labels == again.class_labels == (1, None, 3)
    assert first.request == again.request and first.id != again.id


def test_none_is_the_unconditional_picture(client: Client) -> None:
    assert client.generate(None, num_images=2).class_labels == (None, None)


def test_a_queued_job_is_canceled_at_once_and_may_be_canceled_again(client: Client) -> None:
    job = client.generate(0)
    assert client.cancel(job.id).status == client.cancel(job.id).status == "canceled"


def test_a_running_job_is_canceling_and_one_that_succeeded_is_a_conflict(client: Client, worker: Any, paint: Paint) -> None:
    job_id = worker.take(client.generate(0).id)
    assert client.cancel(job_id).status == "canceling"
    finish(worker, paint, other := worker.take(client.generate(0).id))
    with pytest.raises(ApiError, match="it succeeded") as raised:
        client.cancel(other)
    assert raised.value.status == 409


def test_a_failed_job_is_waited_for_too(client: Client, worker: Any) -> None:
    job = client.wait(worker.fail(worker.take(client.generate(0).id), "no luck"))
    assert (job.status, job.error) == ("failed", "no luck")


def test_a_job_that_takes_too_long_is_a_timeout(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    job = client.generate(0)
    for ping_s in (2.0, 0.05):  # longer than the wait, and so short that the connection is never silent
        monkeypatch.setattr(api_jobs, "_BLOCK_S", ping_s)
        with pytest.raises(TimeoutError, match=rf"{job.id} has not ended within 0\.3 s"):
            client.wait(job.id, timeout_s=0.3)


def test_jobs_are_listed_newest_first_page_by_page_as_they_are_needed(wired: Client, wire: Any) -> None:
    made = [wired.generate(i).id for i in (0, 1, 2)][::-1]
    for page_size in (None, 1, 2, 3):
        assert [job.id for job in wired.jobs(page_size=page_size)] == made
    wire.said.clear()
    assert next(wired.jobs(page_size=1)).id == made[0]
    assert [said.split(b"\r\n")[0] for said in wire.said] == [b"GET /jobs?limit=1 HTTP/1.1"]


def test_models_tell_what_is_served(client: Client) -> None:
    (model,) = client.models()
    assert (model.id, model.labels[0], model.defaults["steps"], model.samplers) == ("tiny", ["cat", "house cat"], 4, ["euler"])


# --- pictures ----------------------------------------------------------------------------------------------------------


def test_a_picture_whose_bytes_are_not_those_of_the_job_is_refused(client: Client, worker: Any) -> None:
    job_id = worker.succeed(worker.take(client.generate(0).id))  # with a sha256 of noughts
    with pytest.raises(DamagedPicture, match=f"picture 0 of job {job_id} .* the job names 0000"):
        client.image(job_id, 0)


def test_a_picture_of_a_running_job_is_checked_against_what_its_event_told(client: Client, worker: Any, paint: Paint) -> None:
    job_id = worker.take(client.generate(0, num_images=2).id)
    told = paint(job_id)
    assert hashlib.sha256(client.image(job_id, 0, sha256=told["sha256"])).hexdigest() == told["sha256"]
    with pytest.raises(DamagedPicture):
        client.image(job_id, 0, sha256="f" * 64)
    with pytest.raises(ValueError, match="is running and lists no picture 0 yet"):
        client.image(job_id, 0)
    with pytest.raises(ApiError, match="has no picture 1") as raised:
        client.image(job_id, 1, sha256=told["sha256"])
    assert raised.value.status == 404


# --- events ------------------------------------------------------------------------------------------------------------


def test_events_are_typed_and_end_with_done(client: Client, worker: Any, paint: Paint) -> None:
    with worker.meanwhile(lambda worker, job_id: finish(worker, paint, job_id)):
        told = list(client.events(client.generate(0).id))
    assert [type(event) for event in told] == [QueuedEvent, ProgressEvent, ProgressEvent, ImageEvent, DoneEvent]
    assert [(event.step, event.steps) for event in told if isinstance(event, ProgressEvent)] == [(0, 4), (2, 4)]
    image, done = told[-2:]
    assert isinstance(image, ImageEvent) and (image.index, image.seed) == (0, 7) and image.url.endswith("/images/0")
    assert isinstance(done, DoneEvent) and (done.status, done.error) == ("succeeded", None)


def test_previews_are_told_where_they_were_asked_for(client: Client, worker: Any, redis: Redis) -> None:
    plain, shown = client.generate(0), client.generate(0, previews=True)
    assert [redis.hget(protocol.job_key(job.id), "previews") for job in (plain, shown)] == [b"0", b"1"]
    worker.tell(worker.take(shown.id), "preview", {"index": 0, "step": 1, "steps": 4, "image": "data:image/png;base64,AA=="})
    client.cancel(shown.id)
    assert worker.results.cancel(shown.id, "execution-1")
    (preview,) = (event for event in client.events(shown.id) if isinstance(event, PreviewEvent))
    assert (preview.index, preview.step, preview.steps, preview.image) == (0, 1, 4, "data:image/png;base64,AA==")


def test_events_go_on_after_the_one_that_is_known(client: Client, worker: Any, paint: Paint) -> None:
    finish(worker, paint, job_id := worker.take(client.generate(0).id))
    told = list(client.events(job_id))
    for known in range(len(told)):  # after the last there is nothing, which is told at once
        assert list(client.events(job_id, after=told[known].id)) == told[known + 1 :]


def test_events_go_on_after_a_lost_connection_and_nothing_is_told_twice(wired: Client, wire: Any, worker: Any, paint: Paint) -> None:
    job_id = worker.take(wired.generate(0).id)
    events = wired.events(job_id)
    first = [next(events) for _ in range(2)]
    for _ in range(2):
        wire.cut()
        worker.tell(job_id, "progress", {"step": 1, "steps": 4}, step=1)
        first.append(next(events))
        assert f"last-event-id: {first[-2].id}".encode() in b"".join(wire.said).lower()
    wire.cut()
    finish(worker, paint, job_id)
    rest = list(events)
    ids = [event.id for event in [*first, *rest]]
    assert len(set(ids)) == len(ids) and list(wired.events(job_id)) == [*first, *rest]


def test_events_go_on_when_redis_comes_back(mortal_server: EmbeddedServer, listen: Listen, record: Any, at_each_pause: Any) -> None:
    with Redis.from_url(mortal_server.url, protocol=2) as redis:
        redis.set(protocol.model_key(record.id), record.dump())
        redis.sadd(protocol.MODELS_KEY, record.id)
    with listen(redis_url=mortal_server.url) as url, Client(url) as client, Client(url) as other:
        job = client.generate(0)
        events = client.events(job.id)
        assert isinstance(next(events), QueuedEvent)

        def recover() -> None:
            if len(pauses) == 1:
                mortal_server.start()
                other.cancel(job.id)

        pauses = at_each_pause(recover)
        mortal_server.stop()
        (done,) = events
    assert isinstance(done, DoneEvent) and done.status == "canceled" and pauses


def test_an_event_of_a_kind_that_is_not_known_is_told_by_its_id(client: Client, listen: Listen) -> None:
    app = FastAPI()

    @app.get("/jobs/{job_id}/events")
    def events(job_id: str) -> StreamingResponse:
        lines = ["id: 1-0\nevent: novelty\ndata: of a newer server\n\n", 'id: 2-0\nevent: done\ndata: {"status": "failed", "new": 1}\n\n']
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    with listen(app) as url, Client(url) as other:
        assert list(other.events("any")) == [Event("1-0"), DoneEvent("2-0", "failed")]


# --- patience ----------------------------------------------------------------------------------------------------------


def test_a_server_without_a_worker_is_asked_again_when_it_says(bare_url: str, serve: Any, at_each_pause: Any) -> None:
    reasons: list[str] = []
    pauses = at_each_pause(serve)
    with Client(bare_url, on_pause=lambda reason, pause_s: reasons.append(f"{reason}: {pause_s}")) as client:
        assert client.generate(0).status == "queued"
    assert pauses == [5] and reasons == ["no worker serves a model at the moment; try again shortly: 5.0"]


def test_a_full_queue_is_tried_again_when_it_says(record: Any, listen: Listen, worker: Any, at_each_pause: Any) -> None:
    with listen(queue_limit=1) as url, Client(url) as client:
        client.generate(0)
        pauses = at_each_pause(worker.take)
        assert client.generate(1).queue_position == 0 and pauses == [10]


def test_a_server_that_wants_more_time_than_there_is_patience_is_not_waited_for(bare_url: str, at_each_pause: Any) -> None:
    pauses = at_each_pause(lambda: None)
    for patience_s in (0, 4.9):
        with Client(bare_url, patience_s=patience_s) as client, pytest.raises(ApiError, match="no worker serves") as raised:
            client.generate(0)
        assert (raised.value.status, raised.value.retry_after_s, raised.value.type) == (503, 5, "urn:dit:problem:no-worker")
    assert pauses == []


def test_patience_is_a_time_and_pauses_grow(wire: Any) -> None:
    wire.close()
    pauses: list[float] = []
    began = time.monotonic()
    with Client(wire.url, patience_s=1.5, on_pause=lambda reason, s: pauses.append(s)) as client, pytest.raises(Unreachable):
        client.models()
    assert pauses in ([0.25, 0.5], [0.25]) and time.monotonic() - began < 20  # a third, of 1 s, would end too late


def test_a_server_that_is_not_there_yet_is_waited_for(url: str, listen: Listen, wire: Any, at_each_pause: Any) -> None:
    wire.close()  # so that its port is free, and was just now
    port = int(wire.url.rsplit(":", 1)[1])
    with ExitStack() as stack, Client(wire.url) as client:
        pauses = at_each_pause(lambda: stack.enter_context(listen(port=port)))
        assert [model.id for model in client.models()] == ["tiny"]
    assert len(pauses) == 1


def test_a_server_that_is_not_there_is_unreachable(wire: Any, at_each_pause: Any) -> None:
    wire.close()
    pauses = at_each_pause(lambda: None)
    for call in (lambda c: c.models(), lambda c: c.generate(0), lambda c: c.job("x"), lambda c: c.cancel("x"), lambda c: c.wait("x")):
        with Client(wire.url, patience_s=0) as client, pytest.raises(Unreachable, match=f"{wire.url} does not answer: .*refused"):
            call(client)
    assert pauses == []


def test_a_lost_answer_is_asked_for_again_under_the_same_key(wired: Client, wire: Any) -> None:
    wire.answers_to_lose = 1
    job = wired.generate("cat", seed=5)
    posts = [said for said in wire.said if said.startswith(b"POST")]
    keys = [line for said in wire.said for line in said.lower().split(b"\r\n") if line.startswith(b"idempotency-key: ")]
    assert len(posts) == len(keys) == 2 and keys[0] == keys[1] and len(keys[0]) == len("idempotency-key: ") + 36
    assert [other.id for other in wired.jobs()] == [job.id]
    again = wired.generate("cat", seed=5)  # which is another request, with another key
    assert keys[0] not in wire.said[-1].lower() and [other.id for other in wired.jobs()] == [again.id, job.id]


# --- errors ------------------------------------------------------------------------------------------------------------


def test_every_wrong_field_is_told(client: Client) -> None:
    with pytest.raises(ApiError) as raised:
        client.generate("truk", sampler="ddim", num_images=2)
    assert [error.field for error in raised.value.errors] == ["class_label", "sampler"]
    assert "did you mean truck?" in raised.value.errors[0].detail


def test_a_job_that_there_is_not_is_404(client: Client) -> None:
    for call in (client.job, client.cancel, client.wait, lambda job_id: client.image(job_id, 0)):
        with pytest.raises(ApiError, match="there is no job") as raised:
            call("nothing?like=this#")
        assert raised.value.status == 404


def test_a_number_that_is_none_is_refused_before_it_is_sent(client: Client) -> None:
    with pytest.raises(ValueError, match="JSON"):
        client.generate(0, guidance_scale=float("nan"))


@pytest.mark.parametrize("status", [200, 404, 502])
def test_what_is_no_dit_server_is_told_as_that(listen: Listen, status: int) -> None:
    app = FastAPI()
    app.add_route("/{path:path}", lambda request: HTMLResponse("<p>Hello", status), methods=["GET", "POST", "DELETE"])
    with listen(app) as url, Client(url) as client:
        for call in (client.models, lambda: client.generate(0), lambda: client.job("x"), lambda: next(client.jobs())):
            with pytest.raises(ApiError, match="is it a dit server" if status == 200 else f"the server answered {status}") as raised:
                call()
            assert raised.value.status == status


@pytest.mark.parametrize("given", ["7", "date", "soon", "-1", "²", None])
def test_retry_after_is_seconds_or_a_date(listen: Listen, given: str | None) -> None:
    value = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True) if given == "date" else given
    headers = {} if value is None else {"Retry-After": value.encode().decode("latin-1")}
    app = FastAPI()
    app.add_route("/models", lambda request: Response(json.dumps({"detail": "later"}), 429, headers))
    with listen(app) as url, Client(url, patience_s=0) as client, pytest.raises(ApiError, match=r"^later$") as raised:
        client.models()
    told = raised.value.retry_after_s
    assert told == 7 if given == "7" else 55 <= (told or 0) <= 60 if given == "date" else told is None


# --- keys and addresses ------------------------------------------------------------------------------------------------


def test_the_key_goes_as_a_bearer_token_and_not_without_one(wire: Any) -> None:
    for key in (None, "dit_secret-1"):
        with Client(f"{wire.url}/", key) as client:
            client.models()
    assert b"uthorization" not in wire.said[0] and b"uthorization: Bearer dit_secret-1\r\n" in wire.said[1]


def test_a_server_elsewhere_is_not_shown_the_key(wire: Any, listen: Listen) -> None:
    app = FastAPI()
    app.add_route("/{path:path}", lambda request: RedirectResponse(f"{wire.url}{request.url.path}", 307), methods=["GET", "POST"])
    with listen(app) as url, Client(url, "dit_secret-1") as client:
        for call in (client.models, lambda: client.generate(0), lambda: client.image("x", 0)):
            with pytest.raises(ApiError, match="answered 307"):
                call()
    assert wire.said == []


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        Client("http://127.0.0.1:1", key)


@pytest.mark.parametrize("address", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://[::1", "http://host:port", "/jobs"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="address of a server"):
        Client(address)


def test_a_server_below_a_path_is_reached_there(url: str, listen: Listen) -> None:
    outer = FastAPI()

    @outer.get("/pictures/models")
    def models() -> dict[str, Any]:
        return {"models": []}

    with listen(outer) as address, Client(f"{address}/pictures/") as client:
        assert client.models() == ()


def test_a_proxy_of_the_environment_is_used_but_not_for_this_host(wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # where nothing listens
    with Client(wire.url) as direct, Client(wire.url.replace("127.0.0.1", "localhost")) as named:
        assert direct.models() == named.models() != ()
    monkeypatch.setenv("HTTP_PROXY", wire.url)
    with Client("http://pictures.invalid", patience_s=0) as client, pytest.raises(ApiError):
        client.models()
    assert wire.said[-1].startswith(b"GET http://pictures.invalid/models ")
