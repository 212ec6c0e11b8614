"""Around the whole application: every request gets an id, is counted and timed, and leaves a line in the log."""

import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.auth import OPEN
from app.logs import REQUEST_ID, accepted_id
from app.metrics import Metrics

log = logging.getLogger("dit.access")

HEADER = "X-Request-Id"
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}  # any other counts as OTHER: clients make up words
_QUIET = {"/healthz", "/readyz", "/metrics"}  # asked every few seconds; told only where the answer is another than before


class Seen:
    """Outside of what turns exceptions into answers, so that it sees those too. Plain ASGI: a stream passes as it comes."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self._last: dict[str, int] = {}  # of the quiet routes: the status that was told last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = accepted_id(Headers(scope=scope).get(HEADER, ""))
        token, began = REQUEST_ID.set(request_id), time.monotonic()
        status, streams = 500, False

        async def tell(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[HEADER] = request_id
                streams = headers.get("content-type", "").startswith("text/event-stream")
                self._count(scope, status, time.monotonic() - began)
                self.metrics.streams.inc(streams)
            await send(message)

        try:
            await self.app(scope, receive, tell)
        finally:
            self.metrics.streams.dec(streams)
            _log(scope, status, time.monotonic() - began, logging.INFO if self._is_news(scope, status) else logging.DEBUG)
            REQUEST_ID.reset(token)

    def _is_news(self, scope: Scope, status: int) -> bool:
        route = _route(scope)
        if route not in _QUIET:
            return True
        before, self._last[route] = self._last.get(route, 200), status
        return status != before

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        route = _route(scope)
        self.metrics.requests.labels(route, method, str(status)).inc()
        self.metrics.seconds.labels(route, method).observe(seconds)


def _route(scope: Scope) -> str:
    """The template, such as /jobs/{job_id}, or the folder of files; what no route takes is one label, whatever was asked for."""
    folder = scope.get("root_path", "").removeprefix(scope.get("app_root_path", ""))
    return str(getattr(scope.get("route"), "path", "") or folder or "(none)")


def _log(scope: Scope, status: int, seconds: float, level: int) -> None:
    """The path as it was sent, whose odd bytes are escaped, without the query."""
    path = scope.get("raw_path", scope["path"].encode()).split(b"?")[0].decode("ascii", "backslashreplace")[:200]
    known = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4)}
    caller = scope.get("state", {}).get("caller", OPEN)  # of a call that was refused before, nobody's
    about = {**known, "request_id": REQUEST_ID.get(), "key_id": caller.id, "job_id": scope.get("path_params", {}).get("job_id", "")}
    said = f", key {caller.id}" if caller.id else ""
    log.log(level, "%s %s %d in %.1f ms, request %s%s", scope["method"], path, status, 1000 * seconds, REQUEST_ID.get(), said, extra=about)
