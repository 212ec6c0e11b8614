"""`/jobs/{id}`: the job, its pictures, its events, its end."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse
from redis.exceptions import RedisError
from starlette.types import Receive, Scope, Send

from app import examples
from app.events import EVENT_ID, EVENTS, is_event_id, one_of
from app.jobs import JobStore, id_time
from app.openapi import PNG, Responses, example_refs, job_links, json_of, keyed_problems, told
from app.problems import Problem, field_error, invalid
from app.routes.dependencies import AllWatchers, GenerateCaller, KeyHolds, Store
from app.schemas import MAX_IMAGES, JobList, JobView
from app.server_sent import server_sent
from app.sheet import contact_sheet
from worker import protocol

log = logging.getLogger("dit.api")

router = APIRouter(prefix="/jobs", tags=["jobs"])

MAX_PAGE = 100
_ID = "^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"  # a UUIDv7
_UNKNOWN = ("not-found", "expired", "invalid-request", "redis-away")  # of a call that names a job
_UNSEEN = (*_UNKNOWN, "store-away", "other-store")  # and wants its pictures

JobId = Annotated[str, Path(max_length=100, description="Its id.", examples=[examples.JOB_ID])]
IfNoneMatch = Annotated[
    str | None,
    Header(
        alias="If-None-Match", description="The `ETag` of the picture that you have: 304 if it still is that one.", examples=[examples.ETAG]
    ),
]


@router.get(
    "", response_model=JobList, responses={200: told("A page.", json_of("jobs")), **keyed_problems("invalid-request", "redis-away")}
)
async def list_jobs(
    store: Store,
    caller: GenerateCaller,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Jobs of a page.")] = 20,
    cursor: Annotated[
        str | None, Query(description="`next` of the page before.", examples=[examples.JOB_ID], json_schema_extra={"pattern": _ID})
    ] = None,
) -> JSONResponse:
    """The caller's jobs, newest first; an admin's are everybody's."""
    if cursor is not None and id_time(cursor) is None:
        raise invalid([field_error("cursor", cursor, "must be `next` of the page before")])
    jobs, after = await store.page(caller.sees, limit, cursor)
    return JSONResponse({"jobs": jobs, "next": after})


_JOB = told("The job.", json_of("queued", "running", "succeeded", "failed"))


@router.get("/{job_id}", response_model=JobView, responses={200: {**_JOB, "links": job_links()}, **keyed_problems(*_UNKNOWN)})
async def get_job(job_id: JobId, store: Store, caller: GenerateCaller) -> JSONResponse:
    """How far it is, and what came of it."""
    return JSONResponse(await store.get(job_id, caller.sees))


@router.delete(
    "/{job_id}",
    response_model=JobView,
    responses={
        200: told("It waited, and is canceled.", json_of("canceled")),
        202: {**told("It runs, and stops at its next step.", json_of("canceling")), "model": JobView},
        **keyed_problems(*_UNKNOWN, "ended", "redis-disk", "redis-replicas"),
    },
)
async def cancel_job(job_id: JobId, store: Store, caller: GenerateCaller) -> JSONResponse:
    """Cancel it. It can still be looked at afterwards."""
    status = await store.cancel(job_id, caller.sees)
    if status in protocol.FINAL:
        how = status if status != "canceled" else "was canceled"
        raise Problem(409, f"job {job_id} has ended already: it {how}", kind="ended")
    return JSONResponse(await store.get(job_id, caller.sees), 200 if status == protocol.QUEUED else 202)


_STREAM = {
    "text/event-stream": {
        "schema": {"description": "One of the events of the stream.", "oneOf": [one_of(name) for name in EVENTS]},
        "examples": example_refs(["event"]),
    }
}


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: told("Server-sent events.", _STREAM, "Cache-Control"), **keyed_problems(*_UNKNOWN, "too-many-streams", "streams-full")},
)
async def get_events(
    job_id: JobId,
    store: Store,
    caller: GenerateCaller,
    key_holds: KeyHolds,
    watchers: AllWatchers,
    last_event_id: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            description="Go on after this event; from the beginning without it.",
            examples=[examples.EVENT_ID],
            json_schema_extra={"pattern": EVENT_ID},
        ),
    ] = None,
) -> StreamingResponse:
    """All that happens to the job, from its beginning, as it happens; the stream ends after `done`. Comments keep it open.

    Without `done` it ends when the key was revoked, within seconds, or when Redis went away: who asks again is told which.
    """
    if last_event_id is not None and not is_event_id(last_event_id):
        raise invalid([field_error("Last-Event-ID", last_event_id, "must be the id of an event of this job")])
    await store.get(job_id, caller.sees)  # 404 and 410 before the stream begins
    return EventStream(_lines(store, job_id, last_event_id or "0", key_holds), watchers.place(caller.id))


class EventStream(StreamingResponse):
    """One that has its place among those who watch until it ends, however that is; where there is none, it becomes the problem."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[str], place: AbstractContextManager[None]) -> None:
        super().__init__(lines, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.place:
            await super().__call__(scope, receive, send)


async def _lines(store: JobStore, job_id: str, after: str, key_holds: Callable[[], bool]) -> AsyncIterator[str]:
    """Ends early when Redis goes away, or the key: the client comes back with the id it has."""
    try:
        async for event in store.events(job_id, after):
            if not key_holds():
                return
            if event is None:
                yield ": still here\n\n"
            else:
                yield server_sent(*event)
    except RedisError as error:
        log.warning("events of job %s: Redis: %s", job_id, error)


_CACHED: Responses = {304: told("It still is that one.", {}, "ETag", "Cache-Control")}


@router.get(
    "/{job_id}/images/{index}",
    response_class=Response,
    responses={200: told("The picture.", PNG, "ETag", "Cache-Control"), **_CACHED, **keyed_problems(*_UNSEEN)},
)
async def get_image(
    job_id: JobId,
    index: Annotated[int, Path(ge=0, lt=MAX_IMAGES, description="Which of its pictures, from 0.", examples=[0])],
    store: Store,
    caller: GenerateCaller,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """A picture, as soon as it is done. It never changes, and holds its request, its seed and the checkpoint's hash as iTXt `dit`."""
    data, digest = await store.image(job_id, index, caller.sees)
    headers = _cached(digest)
    if _has(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type="image/png")


@router.get(
    "/{job_id}/grid",
    response_class=Response,
    responses={200: told("The sheet.", PNG, "ETag", "Cache-Control"), **_CACHED, **keyed_problems(*_UNSEEN, "not-succeeded")},
)
async def get_grid(job_id: JobId, store: Store, caller: GenerateCaller, if_none_match: IfNoneMatch = None) -> Response:
    """All pictures of a job that has succeeded as one contact sheet, row by row."""
    pictures = await store.images(job_id, caller.sees)
    headers = _cached(hashlib.sha256(b"".join(hashlib.sha256(picture).digest() for picture in pictures)).hexdigest())
    if _has(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(await asyncio.to_thread(contact_sheet, pictures), headers=headers, media_type="image/png")


def _cached(digest: str) -> dict[str, str]:
    """What is told of bytes that never change."""
    return {"ETag": f'"{digest}"', "Cache-Control": "private, max-age=31536000, immutable"}


def _has(if_none_match: str | None, tag: str) -> bool:
    tags = [given.strip().removeprefix("W/") for given in (if_none_match or "").split(",")]
    return tag in tags or "*" in tags
