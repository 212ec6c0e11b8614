"""`/models`: what workers say they serve."""

from collections.abc import Callable
from dataclasses import asdict

from redis import Redis
from starlette.testclient import TestClient

from worker import protocol
from worker.protocol import ModelRecord


def test_no_model_is_an_empty_list(bare_client: TestClient) -> None:
    assert bare_client.get("/models").json() == {"models": []}


def test_every_model_is_listed_by_id(bare_client: TestClient, serve: Callable[..., ModelRecord]) -> None:
    records = [serve(id=name) for name in ("fish", "birds")]
    models = bare_client.get("/models").json()["models"]
    assert [model["id"] for model in models] == ["birds", "fish"]
    assert models[1].items() <= asdict(records[0]).items()


def test_one_model_is_told_with_what_a_form_needs(client: TestClient, record: ModelRecord) -> None:
    model = client.get("/models/tiny").json()
    assert model["labels"] == record.labels and model["defaults"] == record.defaults and model["samplers"] == ["euler"]
    assert (model["image_size"], model["image_channels"], model["max_steps"]) == (16, 1, 1000)
    assert (model["checkpoint"], model["metrics"], set(model["quality"])) == (record.checkpoint, record.metrics, {"draft", "best"})


def test_a_diffusion_model_is_told_with_its_spacings(bare_client: TestClient, serve: Callable[..., ModelRecord]) -> None:
    defaults = {"steps": 4, "guidance_scale": 2.0, "sampler": "ddim", "spacing": "trailing"}
    serve(id="flowing")
    serve(id="diffused", objective="diffusion", samplers=["ddim"], spacings=["paper", "trailing"], defaults=defaults)
    models = {model["id"]: model for model in bare_client.get("/models").json()["models"]}
    assert (models["diffused"]["spacings"], models["diffused"]["defaults"]) == (["paper", "trailing"], defaults)
    assert models["flowing"]["spacings"] == []


def test_an_unknown_model_is_404_and_the_known_are_named(client: TestClient) -> None:
    for name in ("birds", "%00", "é" * 100):
        answer = client.get(f"/models/{name}")
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
        assert "there is: tiny" in answer.json()["detail"]


def test_a_model_is_gone_with_its_record(client: TestClient, redis: Redis) -> None:
    assert 0 < redis.ttl(protocol.model_key("tiny")) <= protocol.MODEL_TTL_S
    redis.delete(protocol.model_key("tiny"))
    assert client.get("/models/tiny").status_code == 404
