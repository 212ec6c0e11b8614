"""`/jobs/{id}`: the job, its pictures, its events, its end."""

import logging
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import JSONResponse, StreamingResponse
from redis.exceptions import RedisError

from app.jobs import JobStore
from app.problems import Problem, field_error, invalid
from app.routes.dependencies import GenerateCaller, Store, keyed_problems
from app.schemas import MAX_IMAGES, JobView
from worker import protocol

log = logging.getLogger("dit.api")

router = APIRouter(prefix="/jobs", tags=["jobs"])

JobId = Annotated[str, Path(max_length=100)]


@router.get("/{job_id}", response_model=JobView, responses=keyed_problems(404, 410, 422, 503))
async def get_job(job_id: JobId, store: Store, caller: GenerateCaller) -> JSONResponse:
    return JSONResponse(await store.get(job_id))


@router.delete("/{job_id}", response_model=JobView, responses={202: {"model": JobView}, **keyed_problems(404, 409, 410, 422, 503)})
async def cancel_job(job_id: JobId, store: Store, caller: GenerateCaller) -> JSONResponse:
    """200 if it was queued and is canceled now, 202 if it runs and stops at its next step, 409 once it has ended."""
    status = await store.cancel(job_id)
    if status in protocol.FINAL:
        raise Problem(409, f"job {job_id} has ended already: it {status if status != 'canceled' else 'was canceled'}")
    return JSONResponse(await store.get(job_id), 200 if status == protocol.QUEUED else 202)


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
    data, digest = await store.image(job_id, index)
    headers = {"ETag": f'"{digest}"', "Cache-Control": "private, max-age=31536000, immutable"}
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    if headers["ETag"] in tags or "*" in tags:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type="image/png")


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **keyed_problems(404, 410, 422, 503)},
)
async def get_events(
    job_id: JobId, store: Store, caller: GenerateCaller, last_event_id: Annotated[str | None, Header()] = None
) -> StreamingResponse:
    """Server-sent events from the beginning, or after `Last-Event-ID`; closes after `done`."""
    after = _stream_id(last_event_id)
    await store.get(job_id)  # 404 and 410 before the stream begins
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_lines(store, job_id, after), headers=headers, media_type="text/event-stream")


def _stream_id(given: str | None) -> str:
    parts = (given or "0").split("-")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) <= 19 for part in parts):
        raise invalid([field_error("Last-Event-ID", given, "must be the id of an event of this job")])
    return given or "0"


async def _lines(store: JobStore, job_id: str, after: str) -> AsyncIterator[str]:
    """Ends early when Redis goes away: the client comes back with the id it has."""
    try:
        async for event in store.events(job_id, after):
            if event is None:
                yield ": still here\n\n"
            else:
                stream_id, name, data = event
                yield f"id: {stream_id}\nevent: {name}\ndata: {data}\n\n"
    except RedisError as error:
        log.warning("events of job %s: Redis: %s", job_id, error)
