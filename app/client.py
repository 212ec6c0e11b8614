"""A typed client of the HTTP API.

    with Client("http://127.0.0.1:8000") as client:
        job = client.wait(client.generate("Sneaker", num_images=4).id)
        pngs = [client.image(job.id, index) for index in range(len(job.images))]

It needs a server and nothing else of this project: no torch, no Redis.
"""

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack
from urllib.parse import quote

import httpx2

from app.answers import (
    ApiError,
    ClientError,
    DamagedPicture,
    DoneEvent,
    Event,
    FieldError,
    Image,
    ImageEvent,
    Job,
    Model,
    PreviewEvent,
    Progress,
    ProgressEvent,
    QueuedEvent,
    Unreachable,
    parse_event,
)
from app.transport import NEVER, Notice, Transport, said

__all__ = [
    "PATIENCE_S",
    "ApiError",
    "ClassLabel",
    "Client",
    "ClientError",
    "DamagedPicture",
    "DoneEvent",
    "Event",
    "FieldError",
    "Image",
    "ImageEvent",
    "Job",
    "Model",
    "Notice",
    "Options",
    "PreviewEvent",
    "Progress",
    "ProgressEvent",
    "QueuedEvent",
    "Unreachable",
]

PATIENCE_S = 60.0
ClassLabel = int | str | None  # an index, a name, or None for the unconditional picture


class Options(TypedDict, total=False):
    """`POST /generate` besides the class; what is absent or None has a default of the model's."""

    guidance_scale: float | None  # 1 … 20; 1 is none
    guidance_interval: Sequence[float] | None  # two of t/T between which to guide; 0 is clean
    guidance_channels: Literal["all", "first-three"] | None
    guidance_rescale: float | None  # 0 … 1
    steps: int | None
    quality: Literal["draft", "standard", "best"] | None  # in place of steps
    sampler: str | None
    spacing: str | None  # of a diffusion model's times
    eta: float | None  # of the sampler ddim, 0 … 1
    shift: float | None  # of a flow model's times
    block_cache: int | None
    seed: int | None  # picture i has seed + i; drawn when absent
    num_images: int | None  # 1 … 64 of one class; 1 when absent
    model: str | None  # needed when several are served


class Client:
    """One server. Safe to use from several threads; close it, or use it in a `with`.

    `timeout_s` bounds the silence of the server within one exchange. A call that gets no answer, or one that says "not now" (429, 503), is
    made again until `patience_s` seconds have passed, after the server's own Retry-After where it gives one; 0 never tries twice.
    `on_pause(reason, seconds)` is told before each pause, in place of the log `dit.client`.

    Every call raises ApiError for an answer that is an error, and Unreachable when no answer came. ValueError for a url or a key that can
    be none, and for a request that JSON cannot say (a NaN).
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        patience_s: float = PATIENCE_S,
        on_pause: Notice | None = None,
    ) -> None:
        self._transport = Transport(url, api_key, timeout_s, patience_s, on_pause)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    def generate(self, class_label: ClassLabel | Sequence[ClassLabel], *, previews: bool = False, **options: Unpack[Options]) -> Job:
        """Queue a job of one class, or of a list with one picture each. `previews`: its events show the pictures on their way.

        The request has an Idempotency-Key of its own: when its answer is lost it is sent again, and there is still one job.
        """
        given = class_label if class_label is None or isinstance(class_label, int | str) else list(class_label)
        body = {"class_label": given, **{name: value for name, value in options.items() if value is not None}}
        headers, params = {"Idempotency-Key": str(uuid.uuid4())}, {"previews": "true"} if previews else {}
        return self._transport.answer(Job.parse, "POST", "/generate", json=body, headers=headers, params=params)

    def job(self, job_id: str) -> Job:
        return self._job(job_id, NEVER)

    def _job(self, job_id: str, deadline: float) -> Job:
        return self._transport.answer(Job.parse, "GET", _path(job_id), deadline=deadline)

    def jobs(self, *, page_size: int | None = None) -> Iterator[Job]:
        """The caller's jobs, newest first. They are asked for as they are needed, `page_size` at a time (the server's choice if None)."""
        wanted: dict[str, Any] = {} if page_size is None else {"limit": page_size}
        while True:
            page, cursor = self._transport.answer(_page, "GET", "/jobs", params=wanted)
            yield from page
            if cursor is None:
                return
            wanted["cursor"] = cursor

    def models(self) -> tuple[Model, ...]:
        """What is served at the moment."""
        return self._transport.answer(lambda data: tuple(Model.parse(entry) for entry in data["models"]), "GET", "/models")

    def cancel(self, job_id: str) -> Job:
        """The job: canceled if it waited, else canceling, until its next step. ApiError 409 if it has ended in another way."""
        try:
            return self._transport.answer(Job.parse, "DELETE", _path(job_id))
        except ApiError as error:
            job = self.job(job_id) if error.status == 409 else None
            if job is None or job.status != "canceled":
                raise
            return job  # canceled before: by this very call, if its first answer was lost

    def image(self, job_id: str, index: int, *, sha256: str | None = None) -> bytes:
        """The PNG of one picture. DamagedPicture unless its sha256 is the given one (an ImageEvent tells it), by default the job's.

        A job lists the sha256 of its pictures once it has succeeded: until then, ValueError without one.
        """
        png = self._transport.send("GET", f"{_path(job_id)}/images/{index}", headers={"Accept": "image/png"}).content
        expected = sha256 or self._listed_sha256(job_id, index)
        found = hashlib.sha256(png).hexdigest()
        if found != expected:
            raise DamagedPicture(f"picture {index} of job {job_id} came damaged: its sha256 is {found}, and the job names {expected}")
        return png

    def _listed_sha256(self, job_id: str, index: int) -> str:
        job = self.job(job_id)
        if index >= len(job.images):
            raise ValueError(f"job {job_id} is {job.status} and lists no picture {index} yet; give the sha256 that its event told")
        return job.images[index].sha256

    def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job once it has ended, however that was. TimeoutError as `events` raises it."""
        for _ in self.events(job_id, timeout_s=timeout_s):
            pass
        return self.job(job_id)

    def events(self, job_id: str, after: str | None = None, *, timeout_s: float | None = None) -> Iterator[Event]:
        """What happens to a job, from its beginning or after the event of that id, as it happens; ends after a DoneEvent.

        A lost connection is made again, and nothing is told twice. TimeoutError when `timeout_s` have passed and the job has not ended, at
        the latest with the next ping, which the server sends every few seconds.
        """
        deadline = NEVER if timeout_s is None else monotonic() + timeout_s
        too_late = f"job {job_id} has not ended within {timeout_s or 0:g} s"
        patience = self._transport.patience(deadline)
        ended = after is not None and self._job(job_id, deadline).is_final
        while True:
            known, reason = after, f"the events of job {job_id} broke off"
            try:
                with closing(self._transport.stream(_event, f"{_path(job_id)}/events", _last(after), deadline)) as events:
                    for event in events:
                        after = event.id or after
                        yield event
                        if isinstance(event, DoneEvent):
                            return
                if ended and after == known:  # it had ended before they were asked for, so there are no more
                    return
            except httpx2.RequestError as error:
                reason = f"{reason}: {said(error)}"
            if after != known:
                patience = self._transport.patience(deadline)
            if monotonic() >= deadline:
                raise TimeoutError(too_late)
            if not patience.pause(reason):
                raise TimeoutError(too_late) if patience.deadline == deadline else Unreachable(reason)
            ended = self._job(job_id, deadline).is_final


def _path(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"


def _page(data: Any) -> tuple[list[Job], str | None]:
    if not isinstance(data["next"], str | None):
        raise TypeError("its cursor is no text")
    return [Job.parse(entry) for entry in data["jobs"]], data["next"]


def _last(event_id: str | None) -> dict[str, str]:
    return {} if event_id is None else {"Last-Event-ID": event_id}


def _event(message: httpx2.ServerSentEvent) -> Event:
    return parse_event(message.id, message.event, message.data)
