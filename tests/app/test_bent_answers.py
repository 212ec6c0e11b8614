"""Whatever a server answers, the client gives what it is typed to give, or a ClientError: no other error, and nothing without an end."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

from app.answers import ApiError, Event, FieldError, Job, Model, parse_event
from app.cli import app as commands
from app.client import Client, ClientError
from tests.bent import DEEP, JUNK, LONG, bent_bytes, bent_json, text_of

JOB: dict[str, Any] = {
    "id": "019a0000-0000-7000-8000-000000000000",
    "status": "succeeded",
    "queue_position": None,
    "estimated_wait_s": None,
    "progress": {"step": 4, "steps": 4},
    "request": {"class_label": 2, "num_images": 2, "steps": 4, "seed": 7, "model": "tiny"},
    "images": [{"url": f"/jobs/x/images/{i}", "seed": 7 + i, "sha256": "5e" * 32} for i in range(2)],
    "checkpoint": "c" * 64,
    "error": None,
    "created_at": "2026-11-25T04:18:36.250+00:00",
    "started_at": "2026-11-25T04:18:37+00:00",
    "finished_at": None,
}
MODEL: dict[str, Any] = {
    "id": "tiny",
    "labels": [["cat", "house cat"], ["dog"], ["ship"]],
    "image_size": 16,
    "image_channels": 1,
    "objective": "flow",
    "samplers": ["euler"],
    "max_steps": 1000,
    "defaults": {"steps": 4},
    "quality": {},
    "checkpoint": "c" * 64,
    "metrics": {"fid": 1.5},
    "rows_per_s": 2,
}
EVENTS: dict[str, dict[str, Any]] = {
    "queued": {"retry": True},
    "progress": {"step": 2, "steps": 4},
    "preview": {"index": 0, "step": 2, "steps": 4, "image": "data:image/png;base64,"},
    "image": {"index": 1, "url": "/jobs/x/images/1", "seed": 8, "sha256": "5e" * 32},
    "done": {"status": "failed", "error": "no luck"},
}
STREAM = "".join(f"id: {i}-0\nevent: {name}\ndata: {json.dumps(data)}\n\n" for i, (name, data) in enumerate(EVENTS.items(), 1)).encode()
REFUSED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what becomes an ApiError, in app/transport.py


# --- each answer by itself ---------------------------------------------------------------------------------------------


def test_sound_answers_are_read() -> None:
    job = Job.parse(JOB)
    assert (job.class_labels, job.images[1].seed, job.progress.steps) == ((2, 2), 8, 4)
    assert Model.parse(MODEL).labels[0] == ["cat", "house cat"] and Model.parse(MODEL).rows_per_s == 2
    assert [type(parse_event("1-0", name, json.dumps(data))).__name__.lower() for name, data in EVENTS.items()] == [
        f"{n}event" for n in EVENTS
    ]
    assert Job.parse({**JOB, "status": "of a newer server", "more": 1}).status == "of a newer server"


@settings(max_examples=400)
@given(bent_json(JOB))
def test_a_bent_job_is_a_job_or_refused(document: Any) -> None:
    with suppress(*REFUSED):
        job = Job.parse(document)
        assert isinstance(job.id, str) and isinstance(job.status, str) and 1 <= len(job.class_labels) <= 1000
        assert job.progress.step >= 0 and job.progress.steps >= 1 and all(label is None or type(label) is int for label in job.class_labels)
        assert all(type(image.seed) is int and isinstance(image.sha256, str) for image in job.images)
        assert asdict(job)["created_at"] == job.created_at


@settings(max_examples=200)
@given(bent_json(MODEL))
def test_a_bent_model_is_a_model_or_refused(document: Any) -> None:
    with suppress(*REFUSED):
        model = Model.parse(document)
        assert all(isinstance(name, str) for names in model.labels for name in names) and type(model.image_size) is int
        assert {field.name for field in fields(model)} > {"labels"}


@settings(max_examples=400)
@given(st.sampled_from(sorted(EVENTS)), st.data())
def test_a_bent_event_is_an_event_or_refused(name: str, data: st.DataObject) -> None:
    text = data.draw(bent_json(EVENTS[name]).map(text_of) | st.text(max_size=20) | st.sampled_from([DEEP, LONG]))
    event_id = data.draw(st.sampled_from(["1-0", ""]) | st.text(max_size=5))
    with suppress(*REFUSED):
        event = parse_event(event_id, name, text)
        assert event.id == event_id and event.id.isascii() and event.id.isprintable()
        for part, kind in {"step": int, "steps": int, "index": int, "seed": int, "status": str, "sha256": str, "retry": bool}.items():
            assert type(getattr(event, part, kind())) is kind


@settings(max_examples=200)
@given(
    st.binary(max_size=40)
    | JUNK.map(lambda junk: text_of(junk).encode())
    | bent_json({"detail": "d", "errors": [{"field": "f", "detail": "e"}]}).map(lambda document: text_of(document).encode())
)
def test_any_body_of_an_error_is_an_api_error(body: bytes) -> None:
    error = ApiError.parse(502, "Bad Gateway", body, None)
    assert isinstance(error.detail, str) and isinstance(error.type, str) and all(isinstance(one, FieldError) for one in error.errors)


# --- over a socket -----------------------------------------------------------------------------------------------------


class Anybody:
    """A server that answers what it is told to."""

    def __init__(self) -> None:
        self.job: bytes = b""
        self.stream: Iterator[bytes] = iter(())
        self.app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "POST", "DELETE"])])

    async def _answer(self, request: Request) -> Response:
        if request.url.path.endswith("/events"):
            return StreamingResponse(self.stream, media_type="text/event-stream")
        if request.url.path == "/models":
            return Response(json.dumps({"models": [MODEL]}), media_type="application/json")
        if "/images/" in request.url.path:
            return Response(b"\x89PNG", media_type="image/png")
        return Response(self.job, media_type="application/json")


@pytest.fixture(scope="module")
def anybody() -> Anybody:
    return Anybody()


@pytest.fixture(scope="module")
def url(listen: Callable[..., AbstractContextManager[str]], anybody: Anybody) -> Iterator[str]:
    with listen(anybody.app) as url:
        yield url


QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(QUIET, max_examples=150)
@given(stream=bent_bytes(STREAM) | st.binary(max_size=60), job=bent_json(JOB).map(text_of) | st.just(text_of(JOB)))
def test_any_stream_of_events_is_events_or_a_client_error(url: str, anybody: Anybody, stream: bytes, job: str) -> None:
    anybody.stream, anybody.job = iter([stream[:7], stream[7:]]), job.encode()
    with Client(url, patience_s=0) as client, suppress(ClientError):
        assert all(isinstance(event, Event) for event in client.events("any"))


@settings(QUIET, max_examples=60)
@given(job=bent_bytes(text_of(JOB).encode()) | st.binary(max_size=30))
def test_any_answer_is_what_was_asked_for_or_a_client_error(url: str, anybody: Anybody, job: bytes) -> None:
    anybody.job = job
    with Client(url, patience_s=0) as client:
        for ask in (lambda: client.job("any"), lambda: client.generate(0), lambda: next(client.jobs()), lambda: client.cancel("any")):
            with suppress(ClientError):
                assert isinstance(ask(), Job)


@pytest.mark.parametrize(
    "piece", [b"data: " + b"x" * 65_536, b"data: x\n" * 8192, b": " * 32_768, b"id: 1\n" * 8192], ids=["line", "data", "comment", "ids"]
)
def test_an_event_without_an_end_is_not_kept(url: str, anybody: Anybody, piece: bytes) -> None:
    def pieces() -> Iterator[bytes]:
        while True:
            yield piece
            sent.append(len(piece))

    sent: list[int] = []
    anybody.stream = pieces()
    with Client(url, patience_s=0, timeout_s=30) as client, pytest.raises(ClientError, match="broke off"):
        list(client.events("any"))
    assert sum(sent) < 64 << 20


@settings(QUIET, max_examples=60)
@given(stream=bent_bytes(STREAM), job=bent_json(JOB) | st.just(JOB))
def test_the_command_writes_inside_its_folder_and_ends_in_one_line(
    url: str, anybody: Anybody, tmp_path_factory: pytest.TempPathFactory, stream: bytes, job: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "drawn"
    outside = folder / "outside"
    (out := folder / "inside" / "out").mkdir(parents=True, exist_ok=True)
    outside.mkdir(exist_ok=True)
    anybody.stream, anybody.job = iter([stream]), text_of(job).encode()
    done = CliRunner().invoke(commands, ["generate", "dog", "--url", url, "--out", str(out), "--timeout", "5"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output and {path.name for path in folder.iterdir()} == {"inside", "outside"}
    assert [path.name for path in (folder / "inside").iterdir()] == ["out"]


@pytest.mark.parametrize("seed", ["../../../etc/passwd", "/../../x", 7.5, None, True])
def test_a_seed_that_is_no_number_names_no_file(url: str, anybody: Anybody, tmp_path: Path, seed: Any) -> None:
    told = {**EVENTS["image"], "seed": seed}
    anybody.stream = iter([f"id: 1-0\nevent: image\ndata: {json.dumps(told)}\n\n".encode()])
    anybody.job = text_of(JOB).encode()
    done = CliRunner().invoke(commands, ["generate", "dog", "--url", url, "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "is it a dit server?" in done.stderr and not list((tmp_path / "out").iterdir())
