"""`/healthz`, `/readyz`, the page and the API's documentation, all from local files."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from app.problems import Problem
from app.routes.dependencies import Store, problems

router = APIRouter(tags=["system"])

STATIC = Path(__file__).parent.parent / "static"


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses=problems(503))
async def readyz(store: Store) -> dict[str, object]:
    """Redis answers and a worker serves a model."""
    models = await store.models()
    if not models:
        raise Problem(503, "no worker serves a model at the moment", retry_after_s=5)
    return {"status": "ready", "models": [model.id for model in models]}


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(STATIC / "index.html")


@router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    return FileResponse(STATIC / "docs.html")
