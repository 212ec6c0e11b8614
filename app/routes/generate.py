"""`POST /generate`."""

import hashlib
import json
import re
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Response
from fastapi.responses import JSONResponse

from app import examples
from app.admission import picture_bytes
from app.jobs import Key
from app.openapi import PNG, Responses, job_links, json_of, keyed_problems, told
from app.problems import Problem, key_needed
from app.resolve import choose_model, resolve
from app.routes.dependencies import AllWatchers, GenerateCaller, KeyHolds, Store
from app.routes.strict import StrictRoute
from app.schemas import GenerateRequest, JobView
from worker import protocol

router = APIRouter(tags=["generate"], route_class=StrictRoute)

MAX_WAIT_S = 60


def preferred_wait(prefer: str | None) -> int:
    """Seconds of `Prefer: wait=N` (RFC 7240), at most 60; 0 for none, and for what is not understood, which a preference may be."""
    for part in re.split(r"[,;]", prefer or ""):
        found = re.fullmatch(r'\s*wait\s*=\s*"?(\d{1,6})"?\s*', part, re.IGNORECASE)
        if found:
            return min(int(found[1]), MAX_WAIT_S)
    return 0


_REFUSALS = keyed_problems(
    "not-succeeded",
    "body-too-large",
    "invalid-request",
    "idempotency-key-reused",
    "queue-full",
    "too-many-jobs",
    "storage-full",
    "no-worker",
    "draining",
    "redis-away",
    "redis-full",
    "redis-disk",
    "redis-replicas",
    "store-away",
    "other-store",
)
_ANSWERS: Responses = {
    202: {
        **told(
            "The job waits or runs: it has not ended within the time of `Prefer`.",
            json_of("queued"),
            "Location",
            "Preference-Applied",
        ),
        "links": job_links(),
    },
    200: {
        **told(
            "The job has ended within the time of `Prefer`. With `Accept: image/png`, and one picture, it is the picture.",
            {**json_of("succeeded", "failed"), **PNG},
            "Location",
            "Preference-Applied",
            "Content-Location",
            "ETag",
        ),
        "model": JobView,
        "links": job_links(),
    },
}


@router.post("/generate", status_code=202, response_model=JobView, responses={**_ANSWERS, **_REFUSALS})
async def generate(
    body: Annotated[GenerateRequest, Body(openapi_examples=examples.REQUESTS)],
    store: Store,
    caller: GenerateCaller,
    key_holds: KeyHolds,
    watchers: AllWatchers,
    previews: Annotated[
        bool, Query(description="Tell what the pictures look like on their way, as events `preview`: four times each.")
    ] = False,
    prefer: Annotated[
        str | None,
        Header(
            alias="Prefer",
            description="`wait=N`: answer when the job has ended, or after N seconds, of at most 60 (RFC 7240).",
            examples=["wait=30"],
        ),
    ] = None,
    accept: Annotated[str | None, Header(include_in_schema=False)] = None,  # OpenAPI has another place for it: the answers
    idempotency_key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            max_length=255,
            description="Any text: an equal request with an equal key is answered with the same job.",
            examples=["3f0c8a52-6f4e-4f0e-9d1c-5a1f1f6f2c11"],
        ),
    ] = None,
) -> Response:
    """Queue a job, and wait for it if asked to. With `Accept: image/png` besides, a job of one picture answers with the picture itself."""
    key = Key(idempotency_key, fingerprint(body, previews)) if idempotency_key is not None else None
    job_id = await store.made_before(key, caller.id) if key else None
    if job_id is None:
        record = choose_model(body.model, await store.models())
        request = resolve(body, record)
        room = request.num_images * picture_bytes(record.image_size, record.image_channels)
        job_id = await store.submit(
            request,
            record.checkpoint,
            image_bytes=room,
            preview_bytes=room if previews else 0,  # four of a quarter of the pixels each
            previews=previews,
            owner=caller.id,
            in_flight=caller.in_flight,
            key=key,
        )
    headers = {"Location": f"/jobs/{job_id}"}
    wait_s, ended = preferred_wait(prefer), False
    if wait_s and watchers.refusal(caller.id) is None:  # else not: it is a preference
        with watchers.place(caller.id):
            ended = await store.wait(job_id, wait_s, key_holds)
        if not key_holds():
            raise key_needed("this key was revoked while its job was waited for")
        headers["Preference-Applied"] = f"wait={wait_s}"
    job = await store.get(job_id)
    if ended and "image/png" in (accept or "").lower() and _pictures(job) == 1:
        return await _picture(store, job_id, str(job["status"]), job["error"], headers)
    return JSONResponse(job, 200 if ended else 202, headers)


def fingerprint(body: GenerateRequest, previews: bool) -> str:
    """The same for every way of writing the same request."""
    said = {**body.model_dump(mode="json", exclude_unset=True), "previews": previews}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _pictures(job: dict[str, Any]) -> int:
    request = job["request"]
    return int(request["num_images"]) if "num_images" in request else len(request["class_label"])


async def _picture(store: Store, job_id: str, status: str, error: str | None, headers: dict[str, str]) -> Response:
    if status != protocol.SUCCEEDED:
        raise Problem(409, f"job {job_id} {status}{f': {error}' if error else ''}", kind="not-succeeded")
    data, digest = await store.image(job_id, 0)
    return Response(data, 200, {**headers, "ETag": f'"{digest}"', "Content-Location": f"/jobs/{job_id}/images/0"}, "image/png")
