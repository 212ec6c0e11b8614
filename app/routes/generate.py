"""`POST /generate`."""

import re
from typing import Annotated

from fastapi import APIRouter, Header, Response
from fastapi.responses import JSONResponse

from app.problems import Problem
from app.resolve import choose_model, resolve
from app.routes.dependencies import GenerateCaller, Store, keyed_problems
from app.schemas import GenerateRequest, JobView
from worker import protocol

router = APIRouter(tags=["generate"])

MAX_WAIT_S = 60


def preferred_wait(prefer: str | None) -> int:
    """Seconds of `Prefer: wait=N` (RFC 7240), at most 60; 0 for none, and for what is not understood, which a preference may be."""
    for part in re.split(r"[,;]", prefer or ""):
        found = re.fullmatch(r'\s*wait\s*=\s*"?(\d{1,6})"?\s*', part, re.IGNORECASE)
        if found:
            return min(int(found[1]), MAX_WAIT_S)
    return 0


@router.post(
    "/generate",
    status_code=202,
    response_model=JobView,
    responses={
        200: {"model": JobView, "content": {"image/png": {}}, "description": "Ended within `Prefer: wait`."},
        **keyed_problems(409, 413, 422, 503),
    },
)
async def generate(
    body: GenerateRequest,
    store: Store,
    caller: GenerateCaller,
    prefer: Annotated[str | None, Header()] = None,
    accept: Annotated[str | None, Header()] = None,
) -> Response:
    """Queue a job. With `Prefer: wait=N` and `Accept: image/png`, a job of one image answers with the picture itself."""
    record = choose_model(body.model, await store.models())
    request = resolve(body, record)
    job_id = await store.submit(request, record.checkpoint)
    headers = {"Location": f"/jobs/{job_id}"}
    wait_s = preferred_wait(prefer)
    ended = bool(wait_s) and await store.wait(job_id, wait_s)
    if wait_s:
        headers["Preference-Applied"] = f"wait={wait_s}"
    job = await store.get(job_id)
    if ended and "image/png" in (accept or "").lower() and request.num_images == 1:
        return await _picture(store, job_id, str(job["status"]), job["error"], headers)
    return JSONResponse(job, 200 if ended else 202, headers)


async def _picture(store: Store, job_id: str, status: str, error: str | None, headers: dict[str, str]) -> Response:
    if status != protocol.SUCCEEDED:
        raise Problem(409, f"job {job_id} {status}{f': {error}' if error else ''}")
    data, digest = await store.image(job_id, 0)
    return Response(data, 200, {**headers, "ETag": f'"{digest}"', "Content-Location": f"/jobs/{job_id}/images/0"}, "image/png")
