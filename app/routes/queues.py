"""`/queues`: what waits, and an operator's gate before each queue."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path

from app import examples
from app.openapi import Responses, json_of, keyed_problems, told
from app.problems import Problem
from app.queues import LOOK, QueueState, gate_call, no_such_model, states
from app.routes.dependencies import Store, admin_only
from app.schemas import QueueList, QueueView
from worker.protocol import DRAINING, OPEN, PAUSED

router = APIRouter(prefix="/queues", tags=["queues"], dependencies=[Depends(admin_only)])

Model = Annotated[str, Path(max_length=100, description="Its id.", examples=[examples.MODEL_ID])]


def _answers(state: str) -> Responses:
    problems = keyed_problems("not-found", "body-too-large", "invalid-request", "redis-away", "redis-full", "redis-disk", "redis-replicas")
    return {200: told("The queue as it is now.", json_of(f"queue-{state}")), **problems}


@router.get("", response_model=QueueList, responses={200: told("Each queue.", json_of("queues")), **keyed_problems("redis-away")})
async def list_queues(store: Store) -> dict[str, Any]:
    """Of every model that was ever served."""
    return {"queues": [_view(queue) for queue in states(await store.redis.eval(LOOK, 0))]}


@router.post("/{model}/pause", response_model=QueueView, responses=_answers(PAUSED))
async def pause(model: Model, store: Store) -> dict[str, Any]:
    """Workers take no more jobs of it; what runs goes on, and jobs are accepted."""
    return await _set(store, model, PAUSED)


@router.post("/{model}/drain", response_model=QueueView, responses=_answers(DRAINING))
async def drain(model: Model, store: Store) -> dict[str, Any]:
    """No more jobs of it are accepted; those that wait are worked off."""
    return await _set(store, model, DRAINING)


@router.post("/{model}/resume", response_model=QueueView, responses=_answers(OPEN))
async def resume(model: Model, store: Store) -> dict[str, Any]:
    """As if it had never been paused or drained."""
    return await _set(store, model, OPEN)


async def _set(store: Store, model: str, state: str) -> dict[str, Any]:
    if not await store.redis.eval(*gate_call(model, state)):
        raise Problem(404, no_such_model(model))
    return next(_view(queue) for queue in states(await store.redis.eval(LOOK, 0)) if queue.model == model)


def _view(queue: QueueState) -> dict[str, Any]:
    return {**asdict(queue), "oldest_s": round(queue.oldest_s, 1)}
