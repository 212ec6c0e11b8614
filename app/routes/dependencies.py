"""What routes ask for."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.auth import ADMIN, GENERATE, Caller
from app.jobs import JobStore
from app.metrics import Metrics
from app.problems import Problem
from app.watchers import Watchers


async def job_store(request: Request) -> JobStore:
    store: JobStore = request.app.state.jobs
    return store


Store = Annotated[JobStore, Depends(job_store)]

# Tells OpenAPI, and so `/docs`, of keys; who calls was found out before (app/middleware.py).
BEARER = HTTPBearer(
    auto_error=False, scheme_name="key", bearerFormat="dit_<id>_<secret>", description="Needed where the server has a key file."
)


def needs(scope: str) -> Callable[..., Awaitable[Caller]]:
    """A dependency that gives the caller; 403 for one who has neither this scope nor is an admin."""

    async def caller(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER, scopes=[scope])]) -> Caller:
        found: Caller = request.state.caller
        if not found.may(scope):
            wanted = ADMIN if scope == ADMIN else f"{scope} or {ADMIN}"
            raise Problem(403, f"this call needs a key of the scope {wanted}; key {found.name} has {found.scope}")
        return found

    return caller


GenerateCaller = Annotated[Caller, Depends(needs(GENERATE))]


async def key_holds(request: Request) -> Callable[[], bool]:
    holds: Callable[[], bool] = request.state.key_holds
    return holds


KeyHolds = Annotated[Callable[[], bool], Depends(key_holds)]  # asked again and again by what goes on for long


async def metrics(request: Request) -> Metrics:
    found: Metrics = request.app.state.metrics
    return found


ProcessMetrics = Annotated[Metrics, Depends(metrics)]


async def watchers(request: Request) -> Watchers:
    found: Watchers = request.app.state.watchers
    return found


AllWatchers = Annotated[Watchers, Depends(watchers)]


admin_only = needs(ADMIN)  # whoever may stop a queue for everybody
