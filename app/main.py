"""create_app(): lifespan, middleware, routes, the page."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from app import middleware, openapi, problems
from app.auth import KeyFile
from app.jobs import CONNECTION, JobStore
from app.limits import RateLimiter
from app.metrics import Metrics
from app.pictures import open_to_read
from app.routes import generate, jobs, models, queues, system
from app.seen import Seen
from app.settings import Settings
from app.watchers import Watchers
from worker.connect import connect, connect_async
from worker.stores import open_store


def create_app(settings: Settings) -> FastAPI:
    """The API over the Redis that `settings.redis_url` names. ValueError for what is missing or wrong."""
    if settings.redis_url is None:
        raise ValueError("DIT_REDIS_URL must be set for the API alone (`dit up` brings a server of its own)")
    url, options = settings.redis_url, {**CONNECTION, "password": settings.redis_password}
    keys = None if settings.api_keys_file is None else KeyFile(settings.api_keys_file)
    images = open_store(settings.image_store)
    open_to_read(images)

    sync = connect(url, **options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        connection = connect_async(url, **options)
        app.state.jobs = JobStore(
            sync,
            connection,
            queue_limit=settings.queue_limit,
            result_ttl_s=settings.result_ttl,
            image_bytes=settings.room_bytes,
            images=images,
        )
        app.state.limiter, app.state.watchers = RateLimiter(connection), Watchers()
        yield
        app.state.jobs.pictures.close()
        await connection.aclose()
        sync.close()

    app = FastAPI(
        title="dit",
        summary="Class-conditional image generation with a Diffusion Transformer, as a service",
        version="0.1.0",
        lifespan=lifespan,
        openapi_tags=openapi.TAGS,
        generate_unique_id_function=lambda route: route.name,
        docs_url=None,
        redoc_url=None,
    )
    problems.install(app)
    middleware.install(app, keys, settings.origins)
    for module in (generate, jobs, models, queues, system):
        app.include_router(module.router)
    app.mount("/static/swagger", StaticFiles(directory=swagger_folder()), name="swagger")
    app.mount("/static", StaticFiles(directory=system.STATIC), name="static")
    openapi.install(app, keyed=keys is not None)
    _watch(app, Metrics(settings.queue_limit, settings.room_bytes))
    return app


def _watch(app: FastAPI, metrics: Metrics) -> None:
    """Around the middleware that answers 500, which Starlette keeps outside of all that is added."""
    app.state.metrics = metrics
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: Seen(build(), metrics)  # type: ignore[method-assign]


def swagger_folder() -> Path:
    """Swagger UI's files, which come inside a package: `/docs` works without a network."""
    return Path(str(resources.files("fastapi_swagger"))) / "resources"
