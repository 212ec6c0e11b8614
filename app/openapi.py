"""The OpenAPI document: every answer with its schema, its headers and an example. FastAPI makes the rest of it from the routes."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.description import DESCRIPTION
from app.events import EVENTS
from app.examples import ANSWERS, COMMANDS, ETAG, JOB_ID
from app.kinds import KINDS
from app.schemas import ProblemView

Document = dict[str, Any]
Responses = dict[int | str, Document]

PROBLEM_JSON = "application/problem+json"
TAGS = [
    {"name": "generate", "description": "Pictures are asked for here."},
    {"name": "jobs", "description": "What became of it: a job, its events, its pictures."},
    {"name": "models", "description": "What can be asked for."},
    {"name": "queues", "description": "What waits for each model, and an operator's gate before it. With keys, an admin's."},
    {"name": "system", "description": "For those who run it."},
]


def _header(description: str, example: str, *, required: bool = True, **schema: Any) -> Document:
    """`required`: an answer that refers to it always has it."""
    return {"description": description, "required": required, "schema": {"type": "string", **schema}, "example": example}


HEADERS = {
    "Allow": _header("The methods that are.", "DELETE, GET"),
    "Cache-Control": _header("Pictures never change; the answer to one key is not for another.", "private, max-age=31536000, immutable"),
    "Content-Location": _header(
        "Where the picture is to be found again.", f"/jobs/{JOB_ID}/images/0", format="uri-reference", required=False
    ),
    "ETag": _header("The sha256 of the PNG.", ETAG, required=False, pattern='^"[0-9a-f]{64}"$'),
    "Location": _header("The job.", f"/jobs/{JOB_ID}", format="uri-reference"),
    "Preference-Applied": _header("The wait that was granted, of at most 60 s.", "wait=30", pattern="^wait=[0-9]{1,2}$", required=False),
    "RateLimit": _header(
        "Calls that are left, and the seconds until one more is; of a key with a rate.", '"default";r=59;t=1', required=False
    ),
    "RateLimit-Policy": _header("The rate: calls in a window of seconds.", '"default";q=60;w=60', required=False),
    "Retry-After": _header("Seconds to wait before the next try.", "5", pattern="^[0-9]+$"),
    "WWW-Authenticate": _header("The way to show a key.", "Bearer"),
    "X-Request-Id": _header(
        "Yours, if you sent one of up to 128 of A-Z a-z 0-9 . _ : -; it is in the log.", "4dfa15594c0e4342b2516662b7e97217"
    ),
}
_RATE = ("RateLimit", "RateLimit-Policy")


def headers(*names: str) -> dict[str, Document]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def told(description: str, content: Document, *names: str) -> Document:
    """An answer: what it means, what it holds by media type, and its headers."""
    return {"description": description, "content": content, "headers": headers(*names)}


def example_refs(names: Iterable[str]) -> dict[str, Document]:
    return {name: {"$ref": f"#/components/examples/{name}"} for name in names}


def json_of(*names: str, media_type: str = "application/json") -> Document:
    """With these examples, besides the schema, which FastAPI makes of `response_model` and `model`."""
    return {media_type: {"examples": example_refs(names)}}


PNG: Document = {"image/png": {"schema": {"type": "string", "contentMediaType": "image/png"}}}


def problems(*kinds: str) -> Responses:
    """The problem documents that a route may answer with."""
    by_status: dict[int, list[str]] = {}
    for name in (*kinds, "internal"):
        by_status.setdefault(KINDS[name].status, []).append(name)
    return {status: _problem(names) for status, names in sorted(by_status.items())}


def keyed_problems(*kinds: str) -> Responses:
    """Of a route that needs a key: these too."""
    return problems("key-needed", "not-allowed", "rate-limit", *kinds)


def _problem(names: Sequence[str]) -> Document:
    content = {
        "schema": {"$ref": f"#/components/schemas/{ProblemView.__name__}"},
        "examples": example_refs(names),
    }
    later = ["Retry-After"] if any(KINDS[name].retry_after_s is not None for name in names) else []
    challenge = ["WWW-Authenticate"] if "key-needed" in names else []
    return told("; ".join(f"`{name}`: {KINDS[name].means}" for name in names), {PROBLEM_JSON: content}, *later, *challenge)


def job_links() -> dict[str, Document]:
    """What can be done with the job that is answered."""
    operations = {"job": "get_job", "events": "get_events", "grid": "get_grid", "cancel": "cancel_job", "picture": "get_image"}
    links: dict[str, Document] = {}
    for name, operation in operations.items():
        index = {"index": "0"} if name == "picture" else {}
        links[name] = {"operationId": operation, "parameters": {"job_id": "$response.body#/id", **index}}
    return links


def install(app: FastAPI, keyed: bool) -> None:
    """`keyed`: whether this server asks for keys."""
    make: Callable[[], Document] = app.openapi

    @cache
    def document() -> Document:
        return _completed(make(), keyed)

    app.openapi = document  # type: ignore[method-assign]


def _completed(document: Document, keyed: bool) -> Document:
    document["info"]["description"] = DESCRIPTION
    models: list[type[BaseModel]] = [ProblemView, *EVENTS.values()]
    _, schemas = models_json_schema([(model, "serialization") for model in models], ref_template="#/components/schemas/{model}")
    parts = document["components"]
    parts["schemas"] = {**parts["schemas"], **schemas["$defs"]}
    parts["headers"] = HEADERS
    # Not where they are used: there FastAPI would leave out every null.
    parts["examples"] = {**ANSWERS, **{name: {"summary": kind.means, "value": kind.example} for name, kind in KINDS.items()}}
    for operation in _operations(document):
        _complete(operation, keyed)
    return document


def _operations(document: Document) -> Iterable[Document]:
    return (operation for path in document["paths"].values() for operation in path.values())


def _complete(operation: Document, keyed: bool) -> None:
    for parameter in operation.get("parameters", []):
        parameter["schema"] = _on_the_wire(parameter["schema"])
    for status, response in operation["responses"].items():
        rate = _RATE if "security" in operation and status != "401" else ()
        response["headers"] = {**response.get("headers", {}), **headers(*rate, "X-Request-Id")}
    if "security" in operation and not keyed:
        operation["security"].append({})  # none is needed
    samples = COMMANDS.get(operation["operationId"], [])
    operation["x-codeSamples"] = [{"lang": "sh", "label": label, "source": source} for label, source in samples]


def _on_the_wire(schema: Document) -> Document:
    """A parameter that is left out is not there: there is no null on the way."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    return {**{name: value for name, value in schema.items() if name != "anyOf"}, **kinds[0]} if len(kinds) == 1 else schema
