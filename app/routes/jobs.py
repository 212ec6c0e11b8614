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

from app.events import server_sent
from app.jobs import JobStore, id_time
from app.problems import Problem, field_error, invalid
from app.routes.dependencies import AllWatchers, GenerateCaller, KeyHolds, Store, keyed_problems
from app.schemas import MAX_IMAGES, JobList, JobView
from app.sheet import contact_sheet
from worker import protocol

log = logging.getLogger("dit.api")

router = APIRouter(prefix="/jobs", tags=["jobs"])

MAX_PAGE = 100
JobId = Annotated[str, Path(max_length=100)]


@router.get("", response_model=JobList, responses=keyed_problems(422, 503))
async def list_jobs(
    store: Store,
    caller: GenerateCaller,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
    cursor: Annotated[str | None, Query(max_length=100, description="`next` of the page before.")] = None,
) -> JSONResponse:
    """The caller's jobs, newest first."""
    if cursor is not None and id_time(cursor) is None:
        raise invalid([field_error("cursor", cursor, "must be `next` of the page before")])
    jobs, after = await store.page(caller.sees, limit, cursor)
    return JSONResponse({"jobs": jobs, "next": after})


@router.get("/{job_id}", response_model=JobView, responses=keyed_problems(404, 410, 422, 503))
async def get_job(job_id: JobId, store: Store, caller: GenerateCaller) -> JSONResponse:
    return JSONResponse(await store.get(job_id, caller.sees))


@router.delete("/{job_id}", response_model=JobView, responses={202: {"model": JobView}, **keyed_problems(404, 409, 410, 422, 503)})
async def cancel_job(job_id: JobId, store: Store, caller: GenerateCaller) -> JSONResponse:
    """200 if it was queued and is canceled now, 202 if it runs and stops at its next step, 409 once it has ended."""
    status = await store.cancel(job_id, caller.sees)
    if status in protocol.FINAL:
        how = status if status != "canceled" else "was canceled"
        raise Problem(409, f"job {job_id} has ended already: it {how}", kind="ended")
    return JSONResponse(await store.get(job_id, caller.sees), 200 if status == protocol.QUEUED else 202)


@router.get(
    "/{job_id}/images/{index}",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, 304: {"description": "Not modified"}, **keyed_problems(404, 410, 422, 503)},
)
async def get_image(
    job_id: JobId,
    index: Annotated[int, Path(ge=0, lt=MAX_IMAGES)],
    store: Store,
    caller: GenerateCaller,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The PNG. Its bytes never change, so caches may keep it."""
    data, digest = await store.image(job_id, index, caller.sees)
    headers = _cached(digest)
    if _has(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type="image/png")


@router.get(
    "/{job_id}/grid",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, 304: {"description": "Not modified"}, **keyed_problems(404, 409, 410, 422, 503)},
)
async def get_grid(job_id: JobId, store: Store, caller: GenerateCaller, if_none_match: Annotated[str | None, Header()] = None) -> Response:
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


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **keyed_problems(404, 410, 422, 503)},
)
async def get_events(
    job_id: JobId,
    store: Store,
    caller: GenerateCaller,
    key_holds: KeyHolds,
    watchers: AllWatchers,
    last_event_id: Annotated[str | None, Header()] = None,
) -> StreamingResponse:
    """Server-sent events from the beginning, or after `Last-Event-ID`; closes after `done`.

    Without `done` it closes when the key was revoked, within seconds, or when Redis went away: who asks again is told which.
    """
    after = _stream_id(last_event_id)
    await store.get(job_id, caller.sees)  # 404 and 410 before the stream begins
    return EventStream(_lines(store, job_id, after, key_holds), watchers.place(caller.id))


class EventStream(StreamingResponse):
    """One that has its place among those who watch until it ends, however that is; where there is none, it becomes the problem."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[str], place: AbstractContextManager[None]) -> None:
        super().__init__(lines, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.place:
            await super().__call__(scope, receive, send)


def _stream_id(given: str | None) -> str:
    parts = (given or "0").split("-")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) <= 19 for part in parts):
        raise invalid([field_error("Last-Event-ID", given, "must be the id of an event of this job")])
    return given or "0"


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
