"""What routes ask for."""

from typing import Annotated

from fastapi import Depends, Request

from app.jobs import JobStore
from app.metrics import Metrics
from app.schemas import ProblemView


def job_store(request: Request) -> JobStore:
    store: JobStore = request.app.state.jobs
    return store


Store = Annotated[JobStore, Depends(job_store)]


def metrics(request: Request) -> Metrics:
    found: Metrics = request.app.state.metrics
    return found


ProcessMetrics = Annotated[Metrics, Depends(metrics)]


def admin_only() -> None:
    """Whoever may stop a queue for everybody. The one place that asks; until there are keys, everybody is admitted."""


def problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """The problem documents that a route may answer with, for OpenAPI."""
    content = {"application/problem+json": {"schema": {"$ref": f"#/components/schemas/{ProblemView.__name__}"}}}
    return {status: {"description": "Problem (RFC 9457)", "content": content} for status in statuses}
