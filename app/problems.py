"""Errors for clients: RFC 9457 problem documents, each with its status and a sentence that says what is allowed."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from redis.exceptions import OutOfMemoryError, RedisError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Mount
from starlette.types import Scope

from app.kinds import DEFAULTS, KINDS, TITLES, TYPE

log = logging.getLogger("dit.api")

MEDIA_TYPE = "application/problem+json"
_MESSAGES = {"extra_forbidden": "is not a field of this request", "missing": "lacks an item"}  # in place of pydantic's
_VERBS, _FILE_VERBS = ("DELETE", "GET", "HEAD", "POST"), ("GET", "HEAD")
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
        """`kind`: one of app/kinds.py; by default what the status says."""
        super().__init__(detail)
        self.status, self.detail, self.errors = status, detail, list(errors)
        self.retry_after_s, self.headers = retry_after_s, dict(headers or {})
        self.kind = kind or DEFAULTS[status]
        assert KINDS[self.kind].status == status


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


def response(problem: Problem, path: str) -> Response:
    document: dict[str, Any] = {
        "type": f"{TYPE}{problem.kind}",
        "title": TITLES[problem.status],
        "status": problem.status,
        "detail": problem.detail,
        "instance": quote(path, errors="replace"),
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


def refusal(error: RedisError) -> Problem | None:
    """Why a Redis that is there takes nothing."""
    if isinstance(error, OutOfMemoryError):
        detail = "the queue (Redis) is out of memory; try again when results have expired"
        return Problem(503, detail, kind="redis-full", retry_after_s=30)
    if "MISCONF" in str(error):
        detail = "the queue (Redis) cannot write its disk; try again when that is mended"
        return Problem(503, detail, kind="redis-disk", retry_after_s=30)
    if "NOREPLICAS" in str(error):
        detail = "the queue (Redis) takes nothing while too few replicas follow it; try again when they do"
        return Problem(503, detail, kind="redis-replicas", retry_after_s=5)
    return None


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


def _http(error: HTTPException, request: Request) -> Problem:
    """What the framework refuses by itself."""
    if error.status_code == 400:  # a body that no JSON parser takes: too deep, digits without end
        return invalid([{"field": "body", "detail": "must be JSON of moderate depth and size"}])
    if error.status_code == 404:
        return Problem(404, "there is nothing at this path; /docs has all there is")
    if error.status_code == 405:
        allowed = ", ".join(_methods(request))
        detail = f"{request.method[:20]} is not allowed here; allowed is {allowed}"
        return Problem(405, detail, headers={"Allow": allowed})
    return Problem(error.status_code, str(error.detail), headers=error.headers)


def _methods(request: Request) -> list[str]:
    """Of all routes at this path: the framework tells those of the first alone."""
    scope = {**request.scope, "root_path": request.scope.get("app_root_path", "")}  # a folder of files has put its own there
    told = [(route, [verb for verb in _VERBS if _takes(route, {**scope, "method": verb})]) for route in request.app.routes]
    return sorted({verb for route, verbs in told for verb in verbs if verb in _FILE_VERBS or not isinstance(route, Mount)})


def _takes(route: BaseRoute, scope: Scope) -> bool:
    return route.matches(scope)[0] is Match.FULL


def install(app: FastAPI) -> None:
    """Every error of the application leaves as a problem document."""

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        return response(error, request.scope["path"])

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        return response(_validation(error), request.scope["path"])

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return response(_http(error, request), request.scope["path"])

    @app.exception_handler(RedisError)
    async def redis(request: Request, error: RedisError) -> Response:
        return response(refusal(error) or redis_away(error), request.scope["path"])

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return response(Problem(500, "an unexpected error; the server's log has it"), request.scope["path"])
