"""One HTTP exchange of the client: what is tried again, for how long, and what the errors become."""

import email.utils
import ipaddress
import logging
from collections.abc import Callable, Generator, Iterator
from time import monotonic, sleep, time
from typing import Any, TypeVar

import httpx2

from app.answers import ApiError, ClientError, Unreachable

log = logging.getLogger("dit.client")

T = TypeVar("T")
Notice = Callable[[str, float], None]  # why there is a pause, and its seconds
NEVER = float("inf")  # a deadline, as time.monotonic() counts
_LATER = (429, 503)  # answers that say: not now
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0  # between two attempts, where the server does not say


class Transport:
    """See app.client.Client, which passes its arguments on. ValueError for a url or a key that cannot be one."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float, patience_s: float, on_pause: Notice | None) -> None:
        self.url, self.timeout_s, self.patience_s = url.rstrip("/"), timeout_s, patience_s
        self._tell = on_pause or (lambda reason, pause_s: log.info("%s; trying again in %.3g s", reason, pause_s))
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ValueError("an API key is made of printable ASCII characters, without spaces")
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"Accept": "application/json", **({} if api_key is None else {"Authorization": f"Bearer {api_key}"})},
            timeout=timeout_s,
            trust_env=not _is_loopback(_host(self.url)),  # the loopback of a proxy is another machine's
        )

    def close(self) -> None:
        self._http.close()

    def patience(self, deadline: float = NEVER) -> "Patience":
        return Patience(min(monotonic() + self.patience_s, deadline), self._tell)

    def answer(self, parse: Callable[[Any], T], method: str, path: str, *, deadline: float = NEVER, **request: Any) -> T:
        """What `parse` makes of the JSON that is answered."""
        response = self.send(method, path, deadline=deadline, **request)
        return _understood(lambda answer: parse(answer.json()), response, response)

    def send(self, method: str, path: str, *, deadline: float = NEVER, stream: bool = False, **content: Any) -> httpx2.Response:
        """The first answer that is no error. A request may arrive twice: POST has a key for that, and for the rest it does not matter."""
        request, patience = self._http.build_request(method, path, **content), self.patience(deadline)
        while True:
            failure: ClientError
            try:
                response = self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                failure = _api_error(response)
            except httpx2.RequestError as error:
                failure = Unreachable(f"{self.url} does not answer: {said(error)}")
            if isinstance(failure, ApiError) and failure.status not in _LATER:
                raise failure
            if not patience.pause(str(failure), failure.retry_after_s if isinstance(failure, ApiError) else None):
                raise failure

    def stream(
        self, parse: Callable[[httpx2.ServerSentEvent], T], path: str, headers: dict[str, str], deadline: float
    ) -> Generator[T, None, None]:
        """What `parse` makes of each server-sent event until the stream ends; httpx2.RequestError if it breaks or outlasts the deadline."""
        silence_s = max(min(self.timeout_s, deadline - monotonic()), 0.01)
        headers = {"Accept": "text/event-stream", **headers}
        response = self.send("GET", path, deadline=deadline, stream=True, headers=headers, timeout=silence_s)
        try:
            response.stream = _Bounded(response.stream, deadline)
            for message in httpx2.EventSource(response):
                yield _understood(parse, message, response)
        finally:
            response.close()


class Patience:
    """How long to go on trying."""

    def __init__(self, deadline: float, tell: Notice) -> None:
        self.deadline, self.tell, self.pause_s = deadline, tell, _FIRST_PAUSE_S

    def pause(self, reason: str, wanted_s: float | None = None) -> bool:
        """Sleep, for as long as the server wants or twice as long as the last time. False, at once, if that would take too long."""
        pause_s = self.pause_s if wanted_s is None else max(wanted_s, _FIRST_PAUSE_S)
        if monotonic() + pause_s >= self.deadline:
            return False
        self.pause_s = min(2 * self.pause_s, _LONGEST_PAUSE_S)
        self.tell(reason, pause_s)
        sleep(pause_s)
        return True


class _Bounded(httpx2.SyncByteStream):
    """A stream that no ping keeps open beyond the deadline."""

    def __init__(self, stream: Any, deadline: float) -> None:
        self.stream, self.deadline = stream, deadline

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.stream:
            yield chunk
            if monotonic() >= self.deadline:
                raise httpx2.ReadTimeout("the time is up")

    def close(self) -> None:
        self.stream.close()


def said(error: httpx2.RequestError) -> str:
    return str(error) or type(error).__name__


def _understood(parse: Callable[[Any], T], answer: Any, response: httpx2.Response) -> T:
    """ApiError for an answer that no server of ours would give."""
    try:
        return parse(answer)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = f"{response.request.url} answered what this client does not understand; is it a dit server? ({error!r})"
        raise ApiError(response.status_code, detail) from error


def _host(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"{url!r} is no address of a server: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"the address of a server begins with http:// or https:// and names a host; got {url!r}")
    return parsed.host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


def _api_error(response: httpx2.Response) -> ApiError:
    body = response.read()
    response.close()
    return ApiError.parse(response.status_code, response.reason_phrase, body, _retry_after_s(response.headers.get("Retry-After")))


def _retry_after_s(given: str | None) -> float | None:
    """Seconds, or a date (RFC 9110, §10.2.3); None for anything else."""
    if given is None:
        return None
    if given.isascii() and given.isdigit() and len(given) < 10:
        return float(given)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time())
    except (ValueError, OverflowError):
        return None
