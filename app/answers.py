"""What the API answers, as frozen dataclasses with the names of its JSON. Fields that a newer server tells besides are left aside.

Nothing else is: a seed becomes part of a file's name, a step of a sum, and the server may be anybody's.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

Status = Literal["queued", "running", "succeeded", "failed", "canceling", "canceled"]
FINAL = ("succeeded", "failed", "canceled")
_MOST_IMAGES = 1000  # of a job; the API has a lower bound
T = TypeVar("T")


_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)


def _known(kind: type[T], values: Mapping[str, Any], **parsed: Any) -> T:
    """TypeError or AttributeError for what has not the fields that it must have, or one of another type."""
    names = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    found = kind(**{**{name: value for name, value in values.items() if name in names}, **parsed})
    for name, hint in _hints(kind).items():
        if not _fits(getattr(found, name), hint):
            raise TypeError(f"{kind.__name__}.{name} is {ascii(getattr(found, name))[:60]}")
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether JSON's value has a field's type. A status that is not known yet is a string as any."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return isinstance(value, str)
    if origin in (list, tuple):
        return isinstance(value, origin) and all(_fits(entry, inside[0]) for entry in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(entry, inside[1]) for entry in value.values())
    if inside:  # a union
        return any(_fits(value, one) for one in inside)
    return type(value) in (int, float) if hint is float else type(value) is hint


def _require_way(step: int, steps: int) -> None:
    if not step >= 0 or not steps >= 1:
        raise ValueError(f"step {step} of {steps} is none")


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


@dataclass(frozen=True)
class Image:
    """A finished picture; `sha256` is that of its PNG bytes."""

    url: str
    seed: int
    sha256: str


@dataclass(frozen=True)
class Progress:
    """Sampling steps done, averaged over the pictures of the job."""

    step: int
    steps: int

    def __post_init__(self) -> None:
        _require_way(self.step, self.steps)


@dataclass(frozen=True)
class Job:
    """`GET /jobs/{id}`. `request` has every default resolved and can be posted again: `client.generate(**job.request)`."""

    id: str
    status: Status
    queue_position: int | None  # jobs before this one; None once it has left the queue
    progress: Progress
    request: Mapping[str, Any]
    images: tuple[Image, ...]  # of a job that succeeded
    checkpoint: str
    error: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    estimated_wait_s: float | None = None  # until it starts, about; None where that is not known, and in lists

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """ValueError, KeyError, TypeError or AttributeError for what is no job."""
        job = _known(
            cls,
            data,
            progress=_known(Progress, data["progress"]),
            images=tuple(_known(Image, image) for image in data["images"]),
            **{name: _time(data[name]) for name in ("created_at", "started_at", "finished_at")},
        )
        labels = job.class_labels
        if not labels or not all(label is None or type(label) is int for label in labels):
            raise ValueError("its request has no class of each picture")
        return job

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def class_labels(self) -> tuple[int | None, ...]:
        """Class index of each picture, None for an unconditional one."""
        label = self.request["class_label"]
        if isinstance(label, list):
            return tuple(label)
        count = self.request["num_images"]
        return (label,) * (min(count, _MOST_IMAGES) if type(count) is int else 0)


@dataclass(frozen=True)
class Model:
    """One entry of `GET /models`."""

    id: str
    labels: list[list[str]]  # per class, every name it answers to
    image_size: int
    image_channels: int
    objective: str
    samplers: list[str]
    max_steps: int
    defaults: dict[str, Any]
    quality: dict[str, dict[str, Any]]
    checkpoint: str
    metrics: dict[str, Any] = field(default_factory=dict)
    spacings: list[str] = field(default_factory=list)
    default_spacings: dict[str, str] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""
    block_cache: bool = False
    max_rows: int = 0  # of one forward of a worker
    rows_per_s: float = 0.0  # as a worker measured it; 0 while it is not known

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        return _known(cls, data)


@dataclass(frozen=True)
class Event:
    """One line of a job's story, to go on from with `events(…, after=id)`. A bare Event is of a kind that this client does not know."""

    id: str


@dataclass(frozen=True)
class QueuedEvent(Event):
    retry: bool = False  # its worker gave it back or died: it starts again


@dataclass(frozen=True)
class ProgressEvent(Event):
    step: int
    steps: int

    def __post_init__(self) -> None:
        _require_way(self.step, self.steps)


@dataclass(frozen=True)
class PreviewEvent(Event):
    """What picture `index` looks like on its way; `image` is a data: URL."""

    index: int
    step: int
    steps: int
    image: str

    def __post_init__(self) -> None:
        _require_way(self.step, self.steps)


@dataclass(frozen=True)
class ImageEvent(Event):
    """Picture `index` can be fetched. After a retry the same index may come again."""

    index: int
    url: str
    seed: int
    sha256: str


@dataclass(frozen=True)
class DoneEvent(Event):
    status: Status
    error: str | None = None


_EVENTS: dict[str, type[Event]] = {
    "queued": QueuedEvent,
    "progress": ProgressEvent,
    "preview": PreviewEvent,
    "image": ImageEvent,
    "done": DoneEvent,
}


def parse_event(event_id: str, name: str, data: str) -> Event:
    """ValueError, TypeError, AttributeError or RecursionError for what is no event of a job."""
    if not re.fullmatch("[!-~]{0,64}", event_id):  # it goes back as Last-Event-ID
        raise ValueError(f"its id is {ascii(event_id)[:60]}")
    kind = _EVENTS.get(name, Event)
    return _known(kind, json.loads(data) if kind is not Event else {}, id=event_id)


class ClientError(Exception):
    """Whatever keeps the client from what it was asked for; the message is one for people."""


class Unreachable(ClientError):
    """No answer came: no such host, a refused or lost connection, a timeout."""


class DamagedPicture(ClientError):
    """The bytes that came are not those that the job names."""


@dataclass(frozen=True)
class FieldError:
    """One wrong field of a request: what it was, what is allowed."""

    field: str
    detail: str


class ApiError(ClientError):
    """An answer that is an error (RFC 9457).

    `errors` names the fields of a 422, `retry_after_s` is when to come back, if that was told, and a program may tell errors of one status
    apart by `type` ("urn:dit:problem:queue-full").
    """

    def __init__(
        self,
        status: int,
        detail: str,
        errors: tuple[FieldError, ...] = (),
        retry_after_s: float | None = None,
        type: str = "about:blank",
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors, self.retry_after_s, self.type = status, detail, errors, retry_after_s, type

    @classmethod
    def parse(cls, status: int, reason: str, body: bytes, retry_after_s: float | None) -> Self:
        """Of a problem document; of anything else, which a proxy may have answered, only the status is told."""
        try:
            document = json.loads(body)
            errors = tuple(FieldError(str(error["field"]), str(error["detail"])) for error in document.get("errors") or ())
            return cls(status, str(document["detail"]), errors, retry_after_s, str(document.get("type", "about:blank")))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls(status, f"the server answered {status} {reason}".rstrip(), (), retry_after_s)
