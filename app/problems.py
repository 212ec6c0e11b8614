"""Errors for clients: RFC 9457 problem documents, each with its status and a sentence that says what is allowed."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

log = logging.getLogger("dit.api")

MEDIA_TYPE = "application/problem+json"
_TITLES = {
    401: "Key needed",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    410: "Gone",
    413: "Body too large",
    422: "Invalid request",
    429: "Too many requests",
    500: "Internal error",
    503: "Not available",
}
# The last part of a problem's type, where nothing more exact is said.
_KINDS = {
    401: "key-needed",
    403: "not-allowed",
    404: "not-found",
    405: "method-not-allowed",
    409: "conflict",
    410: "expired",
    413: "body-too-large",
    422: "invalid-request",
    429: "too-many",
    500: "internal",
    503: "not-available",
}
_TYPE = "urn:dit:problem:"
_MESSAGES = {"extra_forbidden": "is not a field of this request", "missing": "lacks an item"}  # in place of pydantic's
_SHOWN_INPUT = 80  # characters of a wrong value that are repeated


class Problem(Exception):
    """Raised anywhere below a route; becomes the response."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str | None = None,
        errors: Sequence[dict[str, str]] = (),
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`kind`: what a program may tell it by, the end of its type; by default what the status says."""
        super().__init__(detail)
        self.status, self.detail, self.errors = status, detail, list(errors)
        self.retry_after_s, self.headers = retry_after_s, dict(headers or {})
        self.kind = kind or _KINDS.get(status, "error")


def field_error(field: str, got: Any, allowed: str) -> dict[str, str]:
    """One entry of `errors[]`: the field, what it was, what is allowed."""
    return {"field": field, "detail": f"{allowed}; got {shown(got)}"}


def invalid(errors: Sequence[dict[str, str]]) -> Problem:
    detail = "; ".join(f"{error['field']}: {error['detail']}" for error in errors)
    return Problem(422, detail, errors=errors)


def shown(value: Any) -> str:
    """A wrong value, short, in ASCII: it may hold anything, lone surrogates too."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # bytes, say
        text = ascii(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= _SHOWN_INPUT else text[:_SHOWN_INPUT] + "…"


def response(problem: Problem, instance: str) -> Response:
    document: dict[str, Any] = {
        "type": f"{_TYPE}{problem.kind}",
        "title": _TITLES.get(problem.status, "Error"),
        "status": problem.status,
        "detail": problem.detail,
        "instance": instance,
    }
    if problem.status == 422:
        document["errors"] = problem.errors
    retry = {} if problem.retry_after_s is None else {"Retry-After": str(problem.retry_after_s)}
    return Response(json.dumps(document), problem.status, {**problem.headers, **retry}, MEDIA_TYPE)


def key_needed(detail: str) -> Problem:
    return Problem(401, detail, headers={"WWW-Authenticate": "Bearer"})


def redis_away(error: RedisError) -> Problem:
    log.warning("Redis: %s", error)
    return Problem(503, "the queue (Redis) does not answer; try again shortly", kind="redis-away", retry_after_s=5)


def _validation(error: RequestValidationError) -> Problem:
    by_field: dict[str, list[dict[str, Any]]] = {}
    for item in error.errors():
        if item["type"] == "json_invalid":
            return invalid([{"field": "body", "detail": f"must be JSON: {item['ctx']['error']}"}])
        location = item["loc"][1:]  # after "body", "path" or "header"
        by_field.setdefault(str(location[0]) if location else "body", []).append(item)
    return invalid([entry for field, items in by_field.items() for entry in _entries(field, items)])


def _entries(field: str, items: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A union reports each of its members; told are those that came closest, in one line for each wrong value."""
    if items[0]["type"] == "missing" and len(items[0]["loc"]) == 2:
        return [{"field": field, "detail": "is required"}]
    closest = max(_closeness(item) for item in items)
    allowed: dict[str, list[str]] = {}
    for item in items:
        messages = allowed.setdefault(shown(item.get("input")), [])
        message = _MESSAGES.get(item["type"], item["msg"]).replace("Input should be ", "must be ").replace(" after validation", "")
        if _closeness(item) == closest and message not in messages:
            messages.append(message)
    return [
        {"field": field, "detail": f"{' or '.join(messages).replace(' or must be ', ' or ')}; got {got}"}
        for got, messages in allowed.items()
        if messages
    ]


def _closeness(item: dict[str, Any]) -> tuple[bool, int]:
    """A value of the right type and out of range is closer than one of the wrong type; an entry of a list is closer than the list."""
    return not item["type"].endswith("_type"), len(item["loc"])


def install(app: FastAPI) -> None:
    """Every error of the application leaves as a problem document."""

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        return response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        return response(_validation(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # a body that no JSON parser takes: too deep, digits without end
            return response(invalid([{"field": "body", "detail": "must be JSON of moderate depth and size"}]), request.url.path)
        return response(Problem(error.status_code, str(error.detail), headers=error.headers), request.url.path)

    @app.exception_handler(RedisError)
    async def redis(request: Request, error: RedisError) -> Response:
        return response(redis_away(error), request.url.path)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return response(Problem(500, "an unexpected error; the server's log has it"), request.url.path)
