"""Whatever is sent, the answer is a problem document (RFC 9457) that names the field, what it was and what is allowed."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from app.problems import shown
from app.schemas import MAX_SEED, GenerateRequest
from worker.protocol import ModelRecord

CLIENT_ERROR = "application/problem+json"


def problem_of(answer: Any, status: int) -> dict[str, Any]:
    """The document of an answer, checked for what each has."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == CLIENT_ERROR
    document = answer.json()
    assert document["status"] == status and document["type"] and document["title"] and document["detail"]
    assert document["instance"] == answer.request.url.path
    return dict(document)


def refused(client: TestClient, body: dict[str, Any]) -> dict[str, str]:
    """Field → detail of the 422 that this body gets, one line a field."""
    document = problem_of(client.post("/generate", content=json.dumps(body), headers={"Content-Type": "application/json"}), 422)
    details = {error["field"]: error["detail"] for error in document["errors"]}
    assert len(details) == len(document["errors"])
    return details


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("guidance_scale", 0.99, "greater than or equal to 1"),
        ("guidance_scale", 20.5, "less than or equal to 20"),
        ("guidance_scale", "2.0", "number"),
        ("guidance_scale", True, "number"),
        ("guidance_scale", float("nan"), "greater than or equal to 1"),
        ("guidance_scale", float("inf"), "less than or equal to 20"),
        ("guidance_scale", [2], "number"),
        ("guidance_interval", [0.2, 1.1], "less than or equal to 1"),
        ("guidance_interval", [-0.1, 1], "greater than or equal to 0"),
        ("guidance_interval", [0.8, 0.2], "low ≤ high"),
        ("guidance_interval", [0.5], "lacks an item"),
        ("guidance_interval", [0, 0.5, 1], "at most 2 items"),
        ("guidance_interval", 0.5, "tuple"),
        ("guidance_interval", [False, 1], "number"),
        ("guidance_interval", [0, float("nan")], "greater than or equal to 0"),
        ("steps", 0, "greater than or equal to 1"),
        ("steps", 1001, "less than or equal to 1000"),
        ("steps", 10**400, "less than or equal to 1000"),
        ("steps", 2.0, "integer"),
        ("steps", "30", "integer"),
        ("steps", True, "integer"),
        ("quality", "perfect", "'draft', 'standard' or 'best'"),
        ("quality", "standard", "best, draft"),
        ("quality", 1, "'draft', 'standard' or 'best'"),
        ("sampler", "ddim", "euler"),
        ("sampler", 1, "string"),
        ("spacing", "paper", "(flow) has: none; shift moves its times"),
        ("spacing", "", "(flow) has: none; shift moves its times"),
        ("spacing", 1, "string"),
        ("spacing", "p" * 51, "50"),
        ("eta", 0.5, "goes with the sampler ddim, not with euler"),
        ("eta", -0.1, "greater than or equal to 0"),
        ("eta", 1.1, "less than or equal to 1"),
        ("eta", "0.5", "number"),
        ("eta", True, "number"),
        ("eta", float("nan"), "greater than or equal to 0"),
        ("shift", 0, "greater than 0"),
        ("shift", -1.5, "greater than 0"),
        ("shift", 100.5, "less than or equal to 100"),
        ("shift", "3", "number"),
        ("shift", True, "number"),
        ("shift", float("nan"), "greater than 0"),
        ("shift", float("inf"), "less than or equal to 100"),
        ("guidance_channels", "first-two", "'all' or 'first-three'"),
        ("guidance_channels", 3, "'all' or 'first-three'"),
        ("guidance_rescale", 1.5, "less than or equal to 1"),
        ("guidance_rescale", -1, "greater than or equal to 0"),
        ("guidance_rescale", "1", "number"),
        ("guidance_rescale", False, "number"),
        ("guidance_rescale", float("nan"), "greater than or equal to 0"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", MAX_SEED + 1, "less than or equal to 9007199254740991"),
        ("seed", "7", "integer"),
        ("seed", 7.5, "integer"),
        ("seed", False, "integer"),
        ("num_images", 0, "greater than or equal to 1"),
        ("num_images", 65, "less than or equal to 64"),
        ("num_images", True, "integer"),
        ("model", "birds", "must be one of: tiny"),
        ("model", 1, "string"),
        ("class_label", 4, "0 … 3"),
        ("class_label", -1, "0 … 3"),
        ("class_label", 10**400, "0 … 3"),
        ("class_label", 1.0, "integer"),
        ("class_label", True, "integer"),
        ("class_label", {"name": "cat"}, "string"),
        ("class_label", [], "at least 1 item"),
        ("class_label", [0] * 65, "at most 64 items"),
        ("class_label", [0, True], "integer"),
        ("class_label", [0, [1]], "string"),
        ("class_label", "zebra", "cat, dog, ship, truck"),
        ("class_label", ["cat", "zebra"], "cat, dog, ship, truck"),
        ("class_label", "c" * 201, "200"),
        ("size", 32, "not a field of this request"),
        ("body", 1, "not a field of this request"),
        ("path", 1, "not a field of this request"),
        ("", 1, "not a field of this request"),
    ],
)
def test_a_wrong_value_is_told_with_its_field_and_what_is_allowed(client: TestClient, field: str, value: Any, allowed: str) -> None:
    errors = refused(client, {"class_label": 0, field: value})
    assert list(errors) == [field]
    assert allowed in errors[field] and "got " in errors[field]


@pytest.mark.parametrize("field", ["class_label", "steps", "block_cache", "seed", "num_images"])
def test_a_whole_number_with_a_point_is_refused_and_the_description_says_so(client: TestClient, field: str) -> None:
    """An integer in JSON Schema, which has no word against it: Schemathesis sent num_images 24.0 as a valid request."""
    detail = refused(client, {"class_label": 0, field: 2.0})[field]
    assert detail.startswith("must be a valid integer") and detail.endswith("; got 2.0")
    assert "7.0 in place of 7" in client.get("/openapi.json").json()["info"]["description"]


def test_the_members_of_a_union_are_told_in_one_line(client: TestClient) -> None:
    assert (
        refused(client, {"class_label": 0, "guidance_scale": "2"})["guidance_scale"] == 'must be a valid number or a valid integer; got "2"'
    )
    assert refused(client, {"class_label": [0, True]})["class_label"] == "must be a valid integer or a valid string; got true"
    assert refused(client, {"class_label": []})["class_label"] == "List should have at least 1 item, not 0; got []"


def test_the_wrong_value_itself_is_told(client: TestClient) -> None:
    assert refused(client, {"class_label": 0, "steps": 5000})["steps"].endswith("got 5000")
    assert refused(client, {"class_label": "zebra"})["class_label"].endswith('got "zebra"')
    assert refused(client, {"class_label": 0, "guidance_interval": [0.8, 0.2]})["guidance_interval"].endswith("got [0.8, 0.2]")


def test_a_class_is_required(client: TestClient) -> None:
    assert refused(client, {"steps": 4}) == {"class_label": "is required"}


def test_a_near_miss_is_suggested(client: TestClient) -> None:
    assert "did you mean house cat?" in refused(client, {"class_label": "hose cat"})["class_label"]
    assert "did you mean" not in refused(client, {"class_label": "zebra"})["class_label"]


def test_of_many_classes_some_are_named_and_the_rest_are_linked(bare_client: TestClient, serve: Callable[..., ModelRecord]) -> None:
    serve(labels=[[f"class {i}"] for i in range(1000)])
    detail = refused(bare_client, {"class_label": 1000})["class_label"]
    assert "class 19" in detail and "class 20" not in detail and "1000 in all, see /models/tiny" in detail and len(detail) < 400


def test_every_wrong_field_is_told_at_once(client: TestClient) -> None:
    assert set(refused(client, {"class_label": 0, "steps": 0, "seed": -1, "num_images": 65})) == {"steps", "seed", "num_images"}
    assert set(refused(client, {"class_label": "zebra", "sampler": "ddpm", "guidance_interval": [1, 0]})) == {
        "class_label",
        "sampler",
        "guidance_interval",
    }


def test_an_error_that_many_entries_of_a_list_have_is_told_once(client: TestClient) -> None:
    document = problem_of(client.post("/generate", json={"class_label": ["zebra"] * 64}), 422)
    assert len(document["errors"]) == 1


def test_a_list_of_classes_goes_without_num_images(client: TestClient) -> None:
    assert "a list makes one picture each" in refused(client, {"class_label": [0, 1], "num_images": 2})["num_images"]


def test_quality_goes_without_steps(client: TestClient) -> None:
    assert "one of the two" in refused(client, {"class_label": 0, "quality": "draft", "steps": 3})["quality"]


def test_the_seeds_of_all_pictures_stay_in_range(client: TestClient) -> None:
    assert str(MAX_SEED - 3) in refused(client, {"class_label": 0, "seed": MAX_SEED - 2, "num_images": 4})["seed"]
    assert str(MAX_SEED - 1) in refused(client, {"class_label": [0, 1], "seed": MAX_SEED})["seed"]
    assert client.post("/generate", json={"class_label": 0, "seed": MAX_SEED - 3, "num_images": 4}).status_code == 202


def test_what_a_models_objective_cannot_do_is_told_with_what_it_can(bare_client: TestClient, serve: Callable[..., ModelRecord]) -> None:
    serve(
        objective="diffusion",
        samplers=["ddim", "ddpm"],
        spacings=["paper", "trailing"],
        max_steps=250,
        defaults={"steps": 25, "guidance_scale": 1, "sampler": "ddim"},
    )
    errors = refused(bare_client, {"class_label": 0, "sampler": "euler", "steps": 251, "spacing": "karras", "shift": 2})
    assert "(diffusion) can do: ddim, ddpm" in errors["sampler"] and "1 … 250" in errors["steps"]
    assert "(diffusion) has: paper, trailing" in errors["spacing"]
    assert "is for flow models; model tiny has spacing: paper, trailing" in errors["shift"]
    assert "goes with the sampler ddim, not with ddpm" in refused(bare_client, {"class_label": 0, "sampler": "ddpm", "eta": 0.5})["eta"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"class_label=0",
        b'{"class_label": 0',
        b"{'class_label': 0}",
        b"[]",
        b'"cat"',
        b"null",
        b"7",
        b'{"class_label": "\xff"}',
        b"\xff\xfe{\x00}\x00",
        b'{"seed": ' + b"9" * 5000 + b', "class_label": 0}',
        b'{"seed": 1e999, "class_label": 0}',
        b'{"class_label": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"class_label": ' + b'{"a":' * 10_000 + b"0" + b"}" * 10_000 + b"}",
        b"[" * 60_000,
        b'{"class_label": "\\ud800"}',
        b'{"class_label": ["\\udfff"]}',
        b'{"class_label": 0, "sampler": "\\ud800"}',
        b'{"class_label": 0, "\\ud800": 1}',
        b'{"class_label": 0, "\\u0000": "\\u0000"}',
        b'{"class_label": "\\u0000"}',
        b'{"class_label": 0, "class_label": 0}',
        b'{"class_label": 0, "seed": 1, "s\\u0065ed": 2}',
        b'{"class_label": {"a": 1, "a": 1}}',
    ],
    ids=lambda body: repr(body[:32]),
)
def test_a_body_that_is_no_request_is_422(client: TestClient, body: bytes) -> None:
    document = problem_of(client.post("/generate", content=body, headers={"Content-Type": "application/json"}), 422)
    assert document["errors"] and all(error["detail"] for error in document["errors"]) and len(document["detail"]) < 2000


def test_a_name_that_is_there_twice_is_named(client: TestClient) -> None:
    answer = client.post("/generate", content=b'{"class_label": 0, "seed": 1, "seed": 2}', headers={"Content-Type": "application/json"})
    assert problem_of(answer, 422)["errors"] == [{"field": "body", "detail": 'must be JSON: an object has "seed" twice'}]


@pytest.mark.parametrize("depth", range(20, 1020, 20))
def test_nesting_of_any_depth_is_422(client: TestClient, depth: int) -> None:
    """Near the interpreter's limit a value can be read and yet be too deep to be shown."""
    body = b'{"class_label": ' + b"[" * depth + b"]" * depth + b"}"
    problem_of(client.post("/generate", content=body, headers={"Content-Type": "application/json"}), 422)


def test_a_value_too_deep_to_show_is_told_by_its_type() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert shown(value) == "a deeply nested list"


@pytest.mark.parametrize("media_type", ["application/x-www-form-urlencoded", "text/plain"])
def test_a_body_of_another_media_type_is_422(client: TestClient, media_type: str) -> None:
    """What curl -d sends without a Content-Type."""
    problem_of(client.post("/generate", content=b'{"class_label": 0}', headers={"Content-Type": media_type}), 422)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=12),  # lone surrogates too
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(body=JSON | st.dictionaries(st.sampled_from([*GenerateRequest.model_fields, "other"]), JSON, max_size=4))
@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_json_whatever_is_an_internal_error(client: TestClient, body: Any) -> None:
    answer = client.post("/generate", content=json.dumps(body), headers={"Content-Type": "application/json"})
    if answer.status_code != 202:
        problem_of(answer, 422)


def test_a_body_over_64_kib_is_413(client: TestClient) -> None:
    assert "65536" in problem_of(client.post("/generate", json={"class_label": "c" * 70_000}), 413)["detail"]


@pytest.mark.parametrize("length", ["", "-1", "1e3", "²", "9" * 30, "9" * 5000, "999999"], ids=lambda length: length[:8])
def test_a_length_that_is_none_is_413(client: TestClient, length: str) -> None:
    problem_of(client.post("/generate", content=b"{}", headers={"Content-Length": length.encode("latin-1")}), 413)


def test_a_body_of_untold_length_is_taken(client: TestClient) -> None:
    answer = client.post("/generate", content=iter([b'{"class', b'_label": 0}']), headers={"Content-Type": "application/json"})
    assert answer.request.headers["transfer-encoding"] == "chunked" and answer.status_code == 202


def test_a_body_of_untold_length_is_413_when_it_is_too_large(client: TestClient) -> None:
    """tests/app/test_headers.py sends one without an end."""
    answer = client.post("/generate", content=iter([b" " * 1024] * 65), headers={"Content-Type": "application/json"})
    assert "65536" in problem_of(answer, 413)["detail"]


def test_a_body_of_the_largest_size_is_read(client: TestClient) -> None:
    body = b'{"class_label": 0}'.ljust(64 * 1024)
    for content in (body, iter([body[:40_000], body[40_000:]])):
        assert client.post("/generate", content=content, headers={"Content-Type": "application/json"}).status_code == 202


def test_an_unknown_path_is_404(client: TestClient) -> None:
    problem_of(client.get("/nothing/here"), 404)
    problem_of(client.get("/static/nothing.js"), 404)


def test_a_wrong_method_is_405_and_names_the_right_one(client: TestClient) -> None:
    answer = client.get("/generate")
    assert problem_of(answer, 405)["detail"] == "GET is not allowed here; allowed is POST"
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("OPTIONS", "/jobs/nothing", "DELETE, GET"),  # two routes, of which the framework tells the first
        ("TRACE", "/jobs", "GET"),
        ("QUERY", "/queues/tiny/pause", "POST"),
        ("PUT", "/openapi.json", "GET, HEAD"),
        ("POST", "/static/page.js", "GET, HEAD"),
        ("DELETE", "/static/generate", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_all_that_there_are(client: TestClient, method: str, path: str, allowed: str) -> None:
    answer = client.request(method, path)
    problem_of(answer, 405)
    assert answer.headers["allow"] == allowed


def test_a_path_of_odd_characters_is_told_as_it_was_sent(client: TestClient) -> None:
    assert client.get("/x%00%0a/%C3%BC%3F").json()["instance"] == "/x%00%0A/%C3%BC%3F"


def test_without_a_worker_a_request_is_503_with_a_time_to_come_back(bare_client: TestClient) -> None:
    answer = bare_client.post("/generate", json={"class_label": 0})
    assert "no worker" in problem_of(answer, 503)["detail"]
    assert int(answer.headers["retry-after"]) > 0
