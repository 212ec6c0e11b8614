"""What surrounds every call: security headers, CORS, the key, the rate limit, the size of a body. Pure ASGI, so that streams stream."""

import re
from collections.abc import Mapping, Sequence
from functools import partial

from fastapi import FastAPI
from redis.exceptions import RedisError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import problems
from app.auth import OPEN, ApiKey, KeyFile
from app.problems import Problem

MAX_BODY_BYTES = 64 * 1024
_PUBLIC = {"/", "/docs", "/openapi.json", "/healthz", "/readyz"}  # and /static/

_NOWHERE_ELSE = "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
_POLICIES = {
    "/": f"default-src 'self'; img-src 'self' blob: data:; {_NOWHERE_ELSE}",
    "/docs": f"default-src 'self'; img-src 'self' data:; {_NOWHERE_ELSE}",  # Swagger UI's icons lie in its style sheet
}
_DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"  # of JSON, events and pictures, which are no pages
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}

_CORS_REQUEST = ("Accept", "Authorization", "Content-Type", "Idempotency-Key", "If-None-Match", "Last-Event-ID", "Prefer")
_CORS_ANSWER = ("Content-Location", "ETag", "Location", "Preference-Applied", "RateLimit", "RateLimit-Policy", "Retry-After")


def install(app: FastAPI, keys: KeyFile | None, cors_origins: Sequence[str]) -> None:
    """Around the whole application, its answer to an unexpected error included, which `add_middleware` leaves out."""
    app.add_middleware(BodyLimit)  # this one belongs inside: what it raises becomes a problem document there
    build = app.build_middleware_stack

    def stack() -> ASGIApp:
        guarded: ASGIApp = KeyGuard(build(), keys)
        if cors_origins:  # outside of the keys: a browser asks for leave without one, and must be able to read a 401
            methods = ("GET", "POST", "DELETE")
            guarded = CORSMiddleware(guarded, cors_origins, methods, _CORS_REQUEST, expose_headers=_CORS_ANSWER)
        return SecurityHeaders(guarded)

    app.build_middleware_stack = stack  # type: ignore[method-assign]


def _with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    """Adds them to the answer, where it does not have them already."""

    async def add(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer = MutableHeaders(scope=message)
            for name, value in headers.items():
                answer.setdefault(name, value)
        await send(message)

    return add


class SecurityHeaders:
    """On every answer. What lies under /static/ has no policy of its own: that of the page which loads it holds."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            policy = {} if path.startswith("/static/") else {"Content-Security-Policy": _POLICIES.get(path, _DATA_POLICY)}
            send = _with_headers(send, {**_HEADERS, **policy})
        await self.app(scope, receive, send)


class KeyGuard:
    """Who calls: `scope["state"]["caller"]`; and `["key_holds"]`, for what goes on for long: whether the key is one still.

    With a key file, 401 without a key and 429 for one over its rate, save on public paths.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile | None) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (self.keys is None or not is_public(scope["path"])):
            try:
                send = _with_headers(send, await self._admit(scope))
            except Problem as problem:
                await problems.response(problem, scope["path"])(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _admit(self, scope: Scope) -> Mapping[str, str]:
        """Headers for the answer; Problem for a call that ends here."""
        state = scope.setdefault("state", {})
        if self.keys is None:
            state |= {"caller": OPEN, "key_holds": lambda: True}
            return {}
        entry = _key_of(self.keys, scope)
        caller = entry.caller
        state |= {"caller": caller, "key_holds": partial(self.keys.holds, entry)}
        if caller.per_minute is None:
            return {}
        try:
            rate = await scope["app"].state.limiter.take(caller.id, caller.per_minute)
        except RedisError as error:
            raise problems.redis_away(error) from error
        if not rate.allowed:
            detail = f"key {caller.name} may make {rate.per_minute} calls a minute; the next in {rate.next_s} s"
            raise Problem(429, detail, kind="rate-limit", retry_after_s=rate.next_s, headers=rate.headers)
        return rate.headers


def is_public(path: str) -> bool:
    return path in _PUBLIC or path.startswith("/static/")


def _key_of(keys: KeyFile, scope: Scope) -> ApiKey:
    """401 says the same of a key that never was and of one that was revoked."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    if scheme.lower() != b"bearer" or not key.strip():
        raise problems.key_needed("this call needs a key: Authorization: Bearer dit_…")
    entry = keys.find(key.strip())
    if entry is None:
        raise problems.key_needed("this key is not known here, or it was revoked")
    return entry


class BodyLimit:
    """413 for a body that says it is too large, or that is: one of untold length is counted as it comes, and cut off."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH"):
            length = Headers(scope=scope).get("content-length", "0")
            if not re.fullmatch(r"[0-9]{1,10}", length) or int(length) > MAX_BODY_BYTES:
                detail = f"a body may have {MAX_BODY_BYTES} bytes, and this one's Content-Length is {length[:20]!a}"
                await problems.response(Problem(413, detail), scope["path"])(scope, receive, send)
                return
            receive = _counted(receive)
        await self.app(scope, receive, send)


def _counted(receive: Receive) -> Receive:
    size_bytes = 0

    async def count() -> Message:
        nonlocal size_bytes
        message = await receive()
        size_bytes += len(message.get("body", b""))
        if size_bytes > MAX_BODY_BYTES:  # FastAPI hands an HTTPException on, where it takes any other for a body that is no JSON
            raise HTTPException(413, f"a body may have {MAX_BODY_BYTES} bytes, and this one has more")
        return message

    return count
