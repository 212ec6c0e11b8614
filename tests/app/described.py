"""Every answer that any test of this folder gets is looked up in the description of the API: what is answered is what is described."""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from jsonschema import Draft202012Validator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.events import EVENTS
from app.kinds import KINDS, TYPE
from app.openapi import HEADERS, PROBLEM_JSON

FAULTS: list[str] = []  # a server runs in a thread, where nothing that is raised fails a test; conftest.py looks here


def watch(app: FastAPI) -> FastAPI:
    """The application, watched from now on."""
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: Watched(build(), app)  # type: ignore[method-assign]
    return app


class Watched:
    """Around the whole application."""

    def __init__(self, inner: ASGIApp, app: FastAPI) -> None:
        self.inner, self.app = inner, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        start: Message = {}
        body = bytearray()

        async def tell(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
            body.extend(message.get("body", b""))
            await send(message)

        try:
            await self.inner(scope, receive, tell)
        finally:
            if start:
                headers = {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}
                found = faults(self.app.openapi(), scope["method"], scope["path"], start["status"], headers, bytes(body))
                FAULTS.extend(f"{scope['method']} {scope['path']} → {start['status']}: {fault}" for fault in found)


def faults(document: dict[str, Any], method: str, path: str, status: int, headers: dict[str, str], body: bytes) -> Iterator[str]:
    """What the description does not say of this answer."""
    operations = at(document, path)
    if operations is None or "access-control-allow-methods" in headers or (method, status) == ("OPTIONS", 400):  # CORS' own
        return
    if method.lower() not in operations:
        if status in (401, 429):  # said before it is looked at
            return
        if (status, {verb.lower() for verb in headers.get("allow", "").split(", ")}) != (405, set(operations)):
            yield f"only {', '.join(operations)} is described; Allow: {headers.get('allow')}"
        return
    response = operations[method.lower()]["responses"].get(str(status))
    if response is None:
        yield "the status is not described"
        return
    yield from _wrong_headers(response.get("headers", {}), headers)
    media_type = headers.get("content-type", "").split(";")[0]
    if media_type not in (response.get("content") or {"": {}}):
        yield f"{media_type} is not described"
    elif media_type == PROBLEM_JSON:
        yield from _wrong_problem(response["content"][media_type], headers, json.loads(body))
    if media_type.endswith("json"):
        yield from invalid(document, response["content"][media_type]["schema"], json.loads(body))
    if media_type == "text/event-stream":
        yield from _wrong_events(document, body.decode())


def at(document: dict[str, Any], path: str) -> dict[str, Any] | None:
    """The operations at a path."""
    for template, operations in document["paths"].items():
        if re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)), path):
            return dict(operations)
    return None


def _wrong_headers(described: dict[str, Any], headers: dict[str, str]) -> Iterator[str]:
    ours = {name.lower() for name in HEADERS}
    for name in sorted((ours & set(headers)) - {name.lower() for name in described}):
        yield f"the header {name} is not described"
    for name in described:
        schema = HEADERS[name]["schema"]
        if name.lower() not in headers:
            if HEADERS[name]["required"]:
                yield f"the header {name} is missing"
        elif not re.search(schema.get("pattern", ""), headers[name.lower()]):
            yield f"{name}: {headers[name.lower()]} is not as described"


def _wrong_problem(described: dict[str, Any], headers: dict[str, str], document: dict[str, Any]) -> Iterator[str]:
    kind = document["type"].removeprefix(TYPE)
    if kind not in described["examples"]:
        yield f"a problem {kind} is not described"
    if (KINDS[kind].retry_after_s is not None) != ("retry-after" in headers):
        yield f"a problem {kind} always has Retry-After, or never"


def _wrong_events(document: dict[str, Any], text: str) -> Iterator[str]:
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            yield from invalid(document, {"$ref": f"#/components/schemas/{EVENTS[fields['event']].__name__}"}, json.loads(fields["data"]))


def invalid(document: dict[str, Any], schema: dict[str, Any], value: Any) -> Iterator[str]:
    """What of a value is not as the schema says; nor may it have a field that the schema does not know."""
    closed = _closed({**schema, "components": {"schemas": document["components"]["schemas"]}})
    for error in Draft202012Validator(closed).iter_errors(value):
        yield f"{error.json_path}: {error.message}"


def _closed(schema: Any) -> Any:
    schema = copy.copy(schema)
    for key, inner in schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ():
        schema[key] = _closed(inner)
    return {"additionalProperties": False, **schema} if isinstance(schema, dict) and schema.get("type") == "object" else schema
