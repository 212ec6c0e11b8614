"""`GET /models`: what is served."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path

from app import examples
from app.auth import GENERATE
from app.openapi import json_of, keyed_problems, told
from app.problems import Problem
from app.routes.dependencies import Store, needs
from app.schemas import ModelList, ModelView

router = APIRouter(prefix="/models", tags=["models"], dependencies=[Depends(needs(GENERATE))])


@router.get("", response_model=ModelList, responses={200: told("Each model.", json_of("models")), **keyed_problems("redis-away")})
async def list_models(store: Store) -> dict[str, Any]:
    """What workers serve at the moment."""
    return {"models": [asdict(record) for record in await store.models()]}


@router.get(
    "/{model_id}",
    response_model=ModelView,
    responses={200: told("The model.", json_of("model")), **keyed_problems("not-found", "invalid-request", "redis-away")},
)
async def get_model(
    model_id: Annotated[str, Path(max_length=100, description="Its id.", examples=[examples.MODEL_ID])], store: Store
) -> dict[str, Any]:
    """Its classes with all their names, what it can do, its defaults, and how good it was found to be."""
    records = {record.id: record for record in await store.models()}
    if model_id not in records:
        raise Problem(404, f"model {model_id[:60]!a} is not served; there is: {', '.join(records) or 'none at the moment'}")
    return asdict(records[model_id])
