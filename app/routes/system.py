"""`/healthz`, `/readyz`, `/metrics`, the page and the API's documentation, all from local files."""

from pathlib import Path

from fastapi import APIRouter, Depends, Response
from fastapi.responses import FileResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from app.openapi import json_of, problems, told
from app.problems import Problem
from app.queues import LOOK_FOR_ROOM, QueueState, states
from app.routes.dependencies import BEARER, ProcessMetrics, Store
from app.schemas import Health, Readiness

router = APIRouter(tags=["system"])

STATIC = Path(__file__).parent.parent / "static"


@router.get("/healthz", response_model=Health, responses={200: told("It does.", json_of("healthy")), **problems()})
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get(
    "/readyz",
    response_model=Readiness,
    responses={
        200: told("It could.", json_of("ready")),
        **problems("redis-away", "redis-full", "redis-disk", "redis-replicas", "store-away", "not-ready"),
    },
)
async def readyz(store: Store) -> dict[str, object]:
    """A picture could be made now: Redis takes writes, the image store answers, and a living worker serves a model whose queue is open."""
    queues = states(await store.redis.eval(LOOK_FOR_ROOM, 0))
    await store.pictures.check()
    ready = [queue.model for queue in queues if queue.ready]
    if not ready:
        raise Problem(503, why_not(queues), kind="not-ready", retry_after_s=5)
    return {"status": "ready", "models": ready}


def why_not(queues: list[QueueState]) -> str:
    """Of models that are served; of the others there is nothing to say."""
    reasons = [f"model {queue.model}: {_ailment(queue)}" for queue in queues if queue.served]
    return "; ".join(reasons) or "no worker serves a model at the moment"


def _ailment(queue: QueueState) -> str:
    if not queue.workers:
        return "its worker is gone"
    return "no worker of it can store pictures" if queue.workers == queue.troubled else f"its queue is {queue.state}"


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    dependencies=[Depends(BEARER)],  # of any scope
    responses={
        200: told("Prometheus' text.", json_of("metrics", media_type="text/plain")),
        **problems("key-needed", "rate-limit", "redis-away"),  # the last of a key with a rate, which is counted there
    },
)
async def metrics(store: Store, process: ProcessMetrics) -> Response:
    """For Prometheus; also while Redis is away."""
    return Response(await process.scrape(store.redis, store.pictures.bytes_key), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(STATIC / "index.html")


@router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    return FileResponse(STATIC / "docs.html")
