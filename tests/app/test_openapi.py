"""The description of the API is complete and true. conftest.py holds every answer of the other tests to it as well."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from starlette.testclient import TestClient

from app.apidoc import page
from app.examples import ANSWERS, COMMANDS, MODEL_ID, REQUESTS
from app.kinds import KINDS
from app.openapi import PROBLEM_JSON
from app.problems import Problem
from app.resolve import resolve
from app.schemas import GenerateRequest, JobView, ModelView
from app.views import public_request
from tests.app.described import at, faults, invalid
from worker.protocol import ModelRecord

ROOT = Path(__file__).parents[2]


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (operation for verbs in document["paths"].values() for operation in verbs.values())


def parts(node: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a document."""
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from parts(inner)


# --- the document ------------------------------------------------------------------------------------------------------


def test_the_document_is_one_of_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    assert schemathesis.openapi.from_dict(document).validate() is None


def test_every_reference_resolves(document: dict[str, Any]) -> None:
    references = {part["$ref"] for part in parts(document) if isinstance(part.get("$ref"), str)}
    assert "#/components/schemas/ProblemView" in references
    for reference in references:
        node: Any = document
        for key in reference.removeprefix("#/").split("/"):
            node = node[key]


def test_every_schema_uses_words_of_json_schema(document: dict[str, Any]) -> None:
    """Pydantic writes `ge` where it knows no better, which nobody reads."""
    words = {word for part in parts(document["components"]["schemas"]) for word in part if len(word) < 3}
    assert words == {"id"}  # a field of a job and a model


def test_what_is_served_is_described_and_nothing_else(document: dict[str, Any]) -> None:
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
        ("get", "/metrics"),
        ("get", "/queues"),
        ("post", "/queues/{model}/pause"),
        ("post", "/queues/{model}/drain"),
        ("post", "/queues/{model}/resume"),
    }


def test_every_call_has_a_name_a_description_and_commands(document: dict[str, Any]) -> None:
    assert {operation["operationId"] for operation in operations(document)} == set(COMMANDS)
    for operation in operations(document):
        assert operation["description"] and operation["x-codeSamples"] and len(operation["tags"]) == 1
        assert all(parameter["description"] for parameter in operation.get("parameters", []))


# --- answers -----------------------------------------------------------------------------------------------------------


def test_every_error_is_a_problem_with_an_example_of_each_kind(document: dict[str, Any]) -> None:
    for operation in operations(document):
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                assert list(answer["content"]) == [PROBLEM_JSON], operation
                assert answer["content"][PROBLEM_JSON]["schema"] == {"$ref": "#/components/schemas/ProblemView"}
                assert {KINDS[kind].status for kind in answer["content"][PROBLEM_JSON]["examples"]} == {int(status)}
                assert ("Retry-After" in answer["headers"]) == (status in ("429", "503"))


def test_every_kind_of_problem_is_an_answer_to_some_call(document: dict[str, Any]) -> None:
    described = {
        kind
        for operation in operations(document)
        for answer in operation["responses"].values()
        for kind in answer["content"].get(PROBLEM_JSON, {}).get("examples", {})
    }
    assert set(KINDS) - described == {"method-not-allowed"}  # of a method that no call has


def test_every_answer_in_json_has_an_example(document: dict[str, Any]) -> None:
    for operation in operations(document):
        contents = [answer["content"] for answer in operation["responses"].values()]
        assert all(content[media_type]["examples"] for content in contents for media_type in content if media_type.endswith("json"))


def test_every_example_of_an_answer_is_as_its_schema_says(document: dict[str, Any]) -> None:
    checked = set()
    for operation in operations(document):
        for answer in operation["responses"].values():
            for content in answer["content"].values():
                for name in content.get("examples", {}):
                    value = document["components"]["examples"][name]["value"]
                    assert list(invalid(document, content["schema"], value)) == [], name
                    checked.add(name)
    assert checked | {"method-not-allowed"} == set(document["components"]["examples"]) == {*ANSWERS, *KINDS}


def test_every_header_that_is_described_has_an_example_as_its_schema_says(document: dict[str, Any]) -> None:
    for header in document["components"]["headers"].values():
        assert header["description"] and list(invalid(document, header["schema"], header["example"])) == []


def test_links_lead_to_calls_and_name_all_that_these_need(document: dict[str, Any]) -> None:
    by_name = {operation["operationId"]: operation for operation in operations(document)}
    for status in ("200", "202"):
        for link in by_name["generate"]["responses"][status]["links"].values():
            needed = {parameter["name"] for parameter in by_name[link["operationId"]]["parameters"] if parameter["required"]}
            assert set(link["parameters"]) == needed


def test_an_answer_that_is_not_as_described_is_found(document: dict[str, Any]) -> None:
    """So that the check of all the other tests' answers is one."""
    job = document["components"]["examples"]["queued"]["value"]
    problem = document["components"]["examples"]["not-found"]["value"]
    known = {"content-type": "application/json", "x-request-id": "x"}

    def found(path: str, status: int, headers: dict[str, str], body: Any) -> list[str]:
        return list(faults(document, "GET", path, status, {**known, **headers}, json.dumps(body).encode()))

    here = f"/jobs/{job['id']}"
    assert found(here, 200, {}, job) == []
    assert found(here, 418, {}, job) == ["the status is not described"]
    assert found(here, 200, {"content-type": "text/html"}, job) == ["text/html is not described"]
    assert found(here, 200, {"retry-after": "1"}, job) == ["the header retry-after is not described"]
    assert found(here, 200, {"ratelimit-policy": "1"}, job) == []
    assert found(here, 200, {}, {**job, "status": "lost"})[0].startswith("$.status: ")
    assert found(here, 200, {}, {**job, "progress": {"step": 1, "steps": 2, "eta": 3}})[0].startswith("$.progress: ")
    assert found(here, 404, {"content-type": PROBLEM_JSON}, problem) == []
    assert found(here, 404, {"content-type": PROBLEM_JSON}, {**problem, "type": "urn:dit:problem:ended"}) == [
        "a problem ended is not described"
    ]
    assert found(here, 503, {"content-type": PROBLEM_JSON}, {**problem, "type": "urn:dit:problem:redis-away"}) == [
        "the header Retry-After is missing",
        "a problem redis-away always has Retry-After, or never",
    ]
    assert found("/generate", 405, {"allow": "GET"}, {}) == ["only post is described; Allow: GET"]


def test_a_kind_that_there_is_not_is_no_problem() -> None:
    with pytest.raises(KeyError):
        Problem(404, "no", kind="novelty")
    with pytest.raises(AssertionError):
        Problem(404, "no", kind="ended")


def test_the_models_of_the_answers_have_the_fields_that_are_answered(record: ModelRecord) -> None:
    assert set(ModelView.model_fields) == set(vars(record))
    asked = GenerateRequest(class_label=[0, 1])
    fields = set(public_request(resolve(asked, record)))
    assert fields <= set(JobView.model_json_schema()["$defs"]["ResolvedRequest"]["properties"])


# --- requests ----------------------------------------------------------------------------------------------------------


def test_every_example_of_a_request_is_taken(bare_client: TestClient, serve: Callable[..., ModelRecord]) -> None:
    serve(labels=ANSWERS["model"]["value"]["labels"], quality=ANSWERS["model"]["value"]["quality"], samplers=["euler", "ab2"])
    assert len(REQUESTS) >= 5
    for example in REQUESTS.values():
        answer = bare_client.post("/generate", json=example["value"])
        assert answer.status_code == 202, answer.text


def test_the_example_of_a_model_is_the_bundled_one() -> None:
    told = json.loads((ROOT / "checkpoints" / MODEL_ID / "checkpoint.json").read_text())
    example = ANSWERS["model"]["value"]
    assert {name: example[name] for name in ("labels", "image_size", "defaults")} == {
        name: told[name] for name in ("labels", "image_size", "defaults")
    }


# --- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_is_described_as_needed_where_it_is(
    document: dict[str, Any], open_client: Callable[..., AbstractContextManager[TestClient]], key_file: Path, bearer: Callable[..., Any]
) -> None:
    bearer()
    with open_client(api_keys_file=key_file) as client:
        keyed = client.get("/openapi.json").json()
    for path, verb in [(path, verb) for path, verbs in keyed["paths"].items() for verb in verbs]:
        needed, optional = keyed["paths"][path][verb].get("security"), document["paths"][path][verb].get("security")
        assert (needed is None) == (path in ("/healthz", "/readyz")) and optional == (needed and [*needed, {}])
        scope = [] if path == "/metrics" else ["admin"] if path.startswith("/queues") else ["generate"]
        assert needed in (None, [{"key": scope}])


# --- docs/api.md -------------------------------------------------------------------------------------------------------


def test_the_page_of_the_api_is_the_one_that_the_document_gives(document: dict[str, Any]) -> None:
    assert (ROOT / "docs" / "api.md").read_text() == page(document), "run `make docs`"


def test_the_page_tells_every_call_every_kind_and_every_field(document: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    for path, verbs in document["paths"].items():
        assert at(document, path.replace("{index}", "0")) == verbs
        assert all(f"\n### {verb.upper()} {path}\n" in text for verb in verbs)
    for name in (*KINDS, *JobView.model_fields, *GenerateRequest.model_fields, *ModelView.model_fields):
        assert f"\n| `{name}` |" in text, name


def test_every_link_inside_the_page_leads_to_a_heading() -> None:
    lines = (ROOT / "docs" / "api.md").read_text().splitlines()
    headings = {
        "".join(c for c in line.lstrip("# ").lower().replace(" ", "-") if c.isalnum() or c in "-_")
        for line in lines
        if line.startswith("#")
    }
    links = {part.split(")")[0] for line in lines for part in line.split("](#")[1:]}
    assert len(links) > 20 and links <= headings
