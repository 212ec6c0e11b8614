"""`GET /models`: what is served."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends

from app.auth import GENERATE
from app.problems import Problem
from app.routes.dependencies import Store, keyed_problems, needs
from app.schemas import ModelList, ModelView

router = APIRouter(prefix="/models", tags=["models"], dependencies=[Depends(needs(GENERATE))])


@router.get("", response_model=ModelList, responses=keyed_problems(503))
async def list_models(store: Store) -> dict[str, Any]:
    return {"models": [asdict(record) for record in await store.models()]}


@router.get("/{model_id}", response_model=ModelView, responses=keyed_problems(404, 422, 503))
async def get_model(model_id: str, store: Store) -> dict[str, Any]:
    records = {record.id: record for record in await store.models()}
    if model_id not in records:
        raise Problem(404, f"model {model_id[:60]!a} is not served; there is: {', '.join(records) or 'none at the moment'}")
    return asdict(records[model_id])
