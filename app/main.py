"""create_app(): lifespan, middleware, routes, the page."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Request, Response
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from starlette.staticfiles import StaticFiles

from app import problems
from app.jobs import CONNECTION, JobStore
from app.routes import generate, jobs, models, system
from app.schemas import ProblemView
from app.settings import Settings

MAX_BODY_BYTES = 64 * 1024


def create_app(settings: Settings) -> FastAPI:
    """The API over the Redis that `settings.redis_url` names."""
    if settings.redis_url is None:
        raise ValueError("DIT_REDIS_URL must be set for the API alone (`dit up` brings a server of its own)")
    url = settings.redis_url

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sync, connection = Redis.from_url(url, **CONNECTION), AsyncRedis.from_url(url, **CONNECTION)
        app.state.jobs = JobStore(
            sync,
            connection,
            queue_limit=settings.queue_limit,
            result_ttl_s=settings.result_ttl,
            image_bytes=settings.image_bytes,
        )
        yield
        await connection.aclose()
        sync.close()

    app = FastAPI(
        title="dit",
        summary="Class-conditional image generation with a Diffusion Transformer, as a service",
        version="0.1.0",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    problems.install(app)
    app.middleware("http")(limit_body)
    for module in (generate, jobs, models, system):
        app.include_router(module.router)
    app.mount("/static/swagger", StaticFiles(directory=swagger_folder()), name="swagger")
    app.mount("/static", StaticFiles(directory=system.STATIC), name="static")
    _describe_problems(app)
    return app


def swagger_folder() -> Path:
    """Swagger UI's files, which come inside a package: `/docs` works without a network."""
    return Path(str(resources.files("fastapi_swagger"))) / "resources"


async def limit_body(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """413 for a body that says it is too large, or that does not say how large it is."""
    if request.method in ("POST", "PUT", "PATCH"):
        length = request.headers.get("content-length", "")
        if not re.fullmatch(r"[0-9]{1,10}", length) or int(length) > MAX_BODY_BYTES:
            detail = f"a body needs a Content-Length of at most {MAX_BODY_BYTES} bytes, got {length[:20]!a}"
            return problems.response(problems.Problem(413, detail), request.url.path)
    return await call_next(request)


def _describe_problems(app: FastAPI) -> None:
    """Put the problem document into OpenAPI, where routes refer to it."""
    make = app.openapi

    def openapi() -> dict[str, object]:
        schema = make()
        schema["components"]["schemas"].setdefault("ProblemView", ProblemView.model_json_schema())
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
