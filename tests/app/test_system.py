"""The process, Redis, the page and the documentation; all from this host."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app import jobs
from app.embedded import EmbeddedServer

STATIC = Path(__file__).parents[2] / "app" / "static"


def test_the_process_answers_without_anything_behind_it(bare_client: TestClient) -> None:
    assert bare_client.get("/healthz").json() == {"status": "ok"}


def test_readiness_is_redis_and_a_worker_with_a_model(bare_client: TestClient, serve: Callable[..., Any]) -> None:
    absent = bare_client.get("/readyz")
    assert (absent.status_code, absent.headers["content-type"]) == (503, "application/problem+json")
    assert int(absent.headers["retry-after"]) > 0
    serve()
    assert bare_client.get("/readyz").json() == {"status": "ready", "models": ["tiny"]}


# --- without Redis -----------------------------------------------------------------------------------------------------


def test_every_call_is_503_with_a_time_to_come_back_while_redis_is_gone(
    mortal_server: EmbeddedServer, open_client: Callable[..., AbstractContextManager[TestClient]]
) -> None:
    calls = [
        ("POST", "/generate"),
        ("GET", "/models"),
        ("GET", "/models/tiny"),
        ("GET", "/readyz"),
        *((verb, f"/jobs/019a0000-0000-7000-8000-000000000000{part}") for verb, part in [("GET", ""), ("DELETE", ""), ("GET", "/events")]),
    ]
    with open_client(redis_url=mortal_server.url) as client:
        assert client.get("/models").status_code == 200
        mortal_server.stop()
        for verb, path in calls:
            answer = client.request(verb, path, **({"json": {"class_label": 0}} if verb == "POST" else {}))
            assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json"), path
            assert int(answer.headers["retry-after"]) > 0 and "Redis" in answer.json()["detail"]
        assert client.get("/healthz").status_code == 200
        mortal_server.start()
        assert client.get("/models").status_code == 200


def test_a_redis_that_hangs_is_503_after_the_sockets_timeout(
    mortal_server: EmbeddedServer, open_client: Callable[..., AbstractContextManager[TestClient]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jobs.CONNECTION["socket_timeout"] <= 5
    monkeypatch.setitem(jobs.CONNECTION, "socket_timeout", 0.5)
    assert mortal_server.process
    with open_client(redis_url=mortal_server.url) as client:
        mortal_server.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        try:
            assert client.get("/readyz").status_code == 503
        finally:
            mortal_server.process.send_signal(signal.SIGCONT)
        assert time.monotonic() - began < 5


# --- the page ----------------------------------------------------------------------------------------------------------


def addresses(text: str) -> list[str]:
    """Everything that a browser would fetch or follow: src, href, url() and imports."""
    found = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)|url\(["']?([^"')]+)|(?:from|import)\s+["']([^"']+)""", text)
    return [next(filter(None, groups)) for groups in found]


def test_the_page_and_all_it_needs_come_from_here(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "/static/page.js" in addresses(page.text) and "/static/page.css" in addresses(page.text)
    for path in addresses(page.text):
        assert path.startswith("/") and not path.startswith("//")
        assert client.get(path).status_code == 200, path


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda path: path.name)
def test_each_file_of_the_page_refers_to_local_files_only(client: TestClient, path: Path) -> None:
    text = path.read_text()
    assert client.get(f"/static/{path.name}").content == path.read_bytes()
    assert all(address.startswith(("/", "./", "data:", "#")) for address in addresses(text))
    assert not re.findall(r"(?<!xmlns=\")https?://(?!www\.w3\.org/)", text)


def test_the_documentation_comes_from_here(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200 and "/openapi.json" in page.text
    assert addresses(page.text)
    for path in addresses(page.text):
        assert path.startswith("/") and client.get(path).status_code == 200, path


# --- OpenAPI -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


def parts(node: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a document."""
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from parts(inner)


def test_every_reference_of_the_api_description_resolves(document: dict[str, Any]) -> None:
    references = {part["$ref"] for part in parts(document) if isinstance(part.get("$ref"), str)}
    assert "#/components/schemas/ProblemView" in references
    for reference in references:
        node: Any = document
        for key in reference.removeprefix("#/").split("/"):
            node = node[key]


def test_the_api_description_says_what_is_served(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    calls = {(verb, path) for path, verbs in document["paths"].items() for verb in verbs}
    assert calls == {
        ("post", "/generate"),
        ("get", "/jobs"),
        ("get", "/jobs/{job_id}"),
        ("get", "/jobs/{job_id}/grid"),
        ("delete", "/jobs/{job_id}"),
        ("get", "/jobs/{job_id}/images/{index}"),
        ("get", "/jobs/{job_id}/events"),
        ("get", "/models"),
        ("get", "/models/{model_id}"),
        ("get", "/healthz"),
        ("get", "/readyz"),
    }


def test_every_error_is_described_as_a_problem(document: dict[str, Any]) -> None:
    for verbs in document["paths"].values():
        for operation in verbs.values():
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    schema = answer["content"]["application/problem+json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ProblemView"} and len(answer["content"]) == 1, operation


def test_a_problem_that_is_answered_has_the_fields_described(client: TestClient, document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["ProblemView"]
    for answer in (client.get("/jobs/nothing"), client.post("/generate", json={})):
        assert set(schema["required"]) <= set(answer.json()) <= set(schema["properties"])


def test_the_example_of_the_description_is_a_request(client: TestClient, document: dict[str, Any], serve: Callable[..., Any]) -> None:
    serve(labels=[["Sneaker"]])
    for example in document["components"]["schemas"]["GenerateRequest"]["examples"]:
        assert client.post("/generate", json=example).status_code == 202
