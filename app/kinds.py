"""The types of problems that there are: what a program may tell an error by."""

from dataclasses import dataclass
from typing import Any

TYPE = "urn:dit:problem:"  # and the name of a kind
TITLES = {
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


@dataclass(frozen=True)
class Kind:
    """One type of problem. ValueError for a status that has no title."""

    name: str
    status: int
    means: str
    detail: str  # of an example
    instance: str = "/generate"  # likewise
    field: str = ""  # that is wrong, likewise
    retry_after_s: int | None = None  # likewise; None: such an answer never says when to come back

    def __post_init__(self) -> None:
        if self.status not in TITLES:
            raise ValueError(f"the status of a kind must be one of {', '.join(map(str, TITLES))}; got {self.status}")

    @property
    def example(self) -> dict[str, Any]:
        """A document of this type, as it is sent."""
        document = {
            "type": f"{TYPE}{self.name}",
            "title": TITLES[self.status],
            "status": self.status,
            "detail": f"{self.field}: {self.detail}" if self.field else self.detail,
            "instance": self.instance,
        }
        return {**document, "errors": [{"field": self.field, "detail": self.detail}]} if self.status == 422 else document


_JOB_ID = "01a21205-192e-7f3b-a352-1d718243d4fb"
_JOB = f"/jobs/{_JOB_ID}"

KINDS = {
    kind.name: kind
    for kind in (
        Kind("key-needed", 401, "no key came along, or one that is not known here", "this call needs a key: Authorization: Bearer dit_…"),
        Kind(
            "not-allowed",
            403,
            "the key's scope is another",
            "this call needs a key of the scope admin; key alice has generate",
            "/queues/fashion-mnist/pause",
        ),
        Kind("not-found", 404, "there is no such thing, or it is another key's", f"there is no job '{_JOB_ID}'", _JOB),
        Kind("method-not-allowed", 405, "the header `Allow` has what is", "GET is not allowed here; allowed is POST"),
        Kind(
            "not-succeeded",
            409,
            "the job has not succeeded, or not yet, so there is nothing to show",
            f"job {_JOB_ID} has not succeeded: it is running",
            f"{_JOB}/grid",
        ),
        Kind("ended", 409, "the job has ended, so nothing is left to cancel", f"job {_JOB_ID} has ended already: it succeeded", _JOB),
        Kind("expired", 410, "it was there; its time is over", f"job {_JOB_ID} has expired; results are kept for 86400 s", _JOB),
        Kind(
            "body-too-large",
            413,
            "the body has more than 64 KiB",
            "a body may have 65536 bytes, and this one's Content-Length is '70000'",
        ),
        Kind(
            "invalid-request",
            422,
            "`errors` names each field that is wrong, and what is allowed there",
            'must be an index 0 … 9, null or a name: T-shirt/top, Trouser, … (did you mean Sneaker?); got "Sneeker"',
            field="class_label",
        ),
        Kind(
            "idempotency-key-reused",
            422,
            "the Idempotency-Key came with another request before",
            "this Idempotency-Key came with another body before; a key stands for one request",
            field="Idempotency-Key",
        ),
        Kind(
            "rate-limit",
            429,
            "the key has made its calls of this minute",
            "key alice may make 60 calls a minute; the next in 1 s",
            retry_after_s=1,
        ),
        Kind("queue-full", 429, "as many jobs wait as may", "1000 jobs wait already, and 1000 may; try again later", retry_after_s=10),
        Kind(
            "too-many-jobs",
            429,
            "the key has as many jobs that have not ended as it may",
            "this key has 4 jobs that have not ended, and 4 may be; try again when one has",
            retry_after_s=5,
        ),
        Kind(
            "storage-full",
            429,
            "the pictures of all jobs take as many bytes as they may",
            "pictures take 1073740000 of 1073741824 bytes, too many for 5152 more; they expire in time",
            retry_after_s=60,
        ),
        Kind(
            "too-many-streams",
            429,
            "the key has as many event streams open as are left for all others",
            "key 5f3a9c01 has 500 event streams open or requests waiting here, and 500 places are left for all",
            f"{_JOB}/events",
            retry_after_s=5,
        ),
        Kind("internal", 500, "a fault of the server", "an unexpected error; the server's log has it"),
        Kind("no-worker", 503, "no worker serves a model", "no worker serves a model at the moment; try again shortly", retry_after_s=5),
        Kind(
            "draining",
            503,
            "an operator drains the queue of the model",
            "the queue of model fashion-mnist is being drained: what waits is worked off, and nothing more is accepted for now",
            retry_after_s=60,
        ),
        Kind("redis-away", 503, "Redis does not answer", "the queue (Redis) does not answer; try again shortly", retry_after_s=5),
        Kind(
            "redis-full",
            503,
            "Redis has no memory left",
            "the queue (Redis) is out of memory; try again when results have expired",
            retry_after_s=30,
        ),
        Kind(
            "redis-disk",
            503,
            "Redis cannot write its disk",
            "the queue (Redis) cannot write its disk; try again when that is mended",
            retry_after_s=30,
        ),
        Kind(
            "redis-replicas",
            503,
            "too few replicas follow Redis",
            "the queue (Redis) takes nothing while too few replicas follow it; try again when they do",
            retry_after_s=5,
        ),
        Kind(
            "store-away",
            503,
            "pictures cannot be stored or read now",
            "the image store does not answer; try again shortly",
            f"{_JOB}/images/0",
            retry_after_s=5,
        ),
        Kind(
            "other-store",
            503,
            "the pictures are in an image store that this server does not read: a mistake of whoever runs it",
            f"the pictures of job {_JOB_ID} are in an image store that this server does not read; whoever runs it has to mend that",
            f"{_JOB}/images/0",
            retry_after_s=60,
        ),
        Kind(
            "streams-full",
            503,
            "as many event streams are open as may",
            "1000 event streams are open or requests wait here, and no more may; ask for the job itself meanwhile",
            f"{_JOB}/events",
            retry_after_s=5,
        ),
        Kind(
            "not-ready",
            503,
            "no picture could be made now",
            "model fashion-mnist: its worker is gone",
            "/readyz",
            retry_after_s=5,
        ),
    )
}
DEFAULTS = {  # by status: of a problem that says nothing more exact
    401: "key-needed",
    403: "not-allowed",
    404: "not-found",
    405: "method-not-allowed",
    410: "expired",
    413: "body-too-large",
    422: "invalid-request",
    500: "internal",
}
