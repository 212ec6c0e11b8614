"""A request → a request with nothing left to a default."""

import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis
from starlette.testclient import TestClient

from app.schemas import GenerateRequest
from worker import protocol
from worker.protocol import GenerationRequest, ModelRecord


@pytest.fixture
def resolved(client: TestClient) -> Callable[..., dict[str, Any]]:
    """`resolved(class_label=…)`: the request as the job shows it."""

    def post(**request: Any) -> dict[str, Any]:
        answer = client.post("/generate", json=request)
        assert answer.status_code == 202, answer.text
        return dict(answer.json()["request"])

    return post


def test_what_is_absent_takes_the_models_defaults(resolved: Callable[..., dict[str, Any]]) -> None:
    assert resolved(class_label="dog", seed=7) == {
        "class_label": 1,
        "num_images": 1,
        "guidance_scale": 2.0,
        "guidance_interval": [0.0, 1.0],
        "guidance_channels": "all",
        "guidance_rescale": 0.0,
        "steps": 4,
        "sampler": "euler",
        "shift": 1.0,
        "seed": 7,
        "model": "tiny",
    }


def test_null_is_as_good_as_absent(resolved: Callable[..., dict[str, Any]]) -> None:
    fields = set(GenerateRequest.model_fields) - {"class_label", "seed"}
    nothing = dict.fromkeys(sorted(fields))
    assert resolved(class_label=1, seed=7, **nothing) == resolved(class_label=1, seed=7)
    assert isinstance(resolved(class_label=1, seed=None)["seed"], int)


def test_what_is_given_stays(resolved: Callable[..., dict[str, Any]]) -> None:
    given = {
        "class_label": 3,
        "num_images": 64,
        "guidance_scale": 20,
        "guidance_interval": [0.25, 0.75],
        "guidance_channels": "first-three",
        "guidance_rescale": 0.7,
        "steps": 1000,
        "sampler": "euler",
        "shift": 100,
        "seed": 0,
        "model": "tiny",
    }
    assert resolved(**given) == given


def test_a_resolved_request_can_be_posted_again(resolved: Callable[..., dict[str, Any]]) -> None:
    for request in (
        {"class_label": "cat"},
        {"class_label": ["cat", None, 3]},
        {"class_label": [1, 1]},
        {"class_label": None, "num_images": 2},
        {"class_label": 0, "shift": 0.3, "guidance_rescale": 1, "guidance_channels": "first-three"},
    ):
        first = resolved(**request)
        assert resolved(**first) == first


SPACINGS = ["paper", "leading", "trailing", "log-snr"]
DIFFUSION = {
    "objective": "diffusion",
    "samplers": ["ddpm", "ddim", "dpm-solver++"],
    "spacings": SPACINGS,
    "default_spacings": {"ddpm": "paper", "ddim": "paper", "dpm-solver++": "log-snr"},
    "defaults": {"steps": 4, "guidance_scale": 2.0, "sampler": "ddpm"},
}


@pytest.fixture
def diffused(resolved: Callable[..., dict[str, Any]], serve: Callable[..., ModelRecord]) -> Callable[..., dict[str, Any]]:
    """`diffused(class_label=…)`: the same by a diffusion model that takes the place of the flow model."""
    serve(**DIFFUSION)
    return resolved


def test_a_diffusion_model_has_spacing_and_eta_in_place_of_shift(diffused: Callable[..., dict[str, Any]]) -> None:
    plain = diffused(class_label=0, seed=7)
    assert (plain["spacing"], plain["eta"]) == ("paper", 0.0) and "shift" not in plain
    given = {**plain, "sampler": "ddim", "spacing": "log-snr", "eta": 1, "guidance_rescale": 0.25, "guidance_channels": "first-three"}
    assert diffused(**given) == given


def test_a_resolved_request_of_a_diffusion_model_can_be_posted_again(diffused: Callable[..., dict[str, Any]]) -> None:
    for request in ({}, {"spacing": "trailing"}, {"sampler": "ddim", "eta": 0.3}, {"sampler": "dpm-solver++", "eta": 0, "shift": 1}):
        first = diffused(class_label=["cat", 2], **request)
        assert diffused(**first) == first


def test_the_models_own_spacing_is_the_default_and_a_quality_may_have_another(
    resolved: Callable[..., dict[str, Any]], serve: Callable[..., ModelRecord]
) -> None:
    quality = {"draft": {"steps": 2}, "best": {"steps": 9, "spacing": "trailing", "sampler": "ddim"}}
    serve(**{**DIFFUSION, "default_spacings": {"ddim": "leading", "dpm-solver++": "log-snr"}, "quality": quality})
    asked: dict[str, dict[str, Any]] = {
        "leading": {"sampler": "ddim"},
        "log-snr": {"sampler": "dpm-solver++", "quality": "draft"},
        "trailing": {"quality": "best"},
        "paper": {"quality": "best", "spacing": "paper"},
    }
    for spacing, request in asked.items():
        assert resolved(class_label=0, **request)["spacing"] == spacing
    assert resolved(class_label=0, quality="best", eta=0.5)["eta"] == 0.5, "which its sampler takes"


@pytest.mark.parametrize("objective", ["flow", "diffusion"])
def test_the_record_of_a_worker_from_before_the_spacings_still_serves(
    client: TestClient, redis: Redis, resolved: Callable[..., dict[str, Any]], serve: Callable[..., ModelRecord], objective: str
) -> None:
    document = json.loads(serve(**(DIFFUSION if objective == "diffusion" else {})).dump())
    del document["spacings"], document["default_spacings"]
    redis.set(protocol.model_key("tiny"), json.dumps(document))
    assert client.get("/models/tiny").json()["spacings"] == []
    first = resolved(class_label=0)
    assert resolved(**first) == first and "spacing" not in first
    refused = {"flow": {"spacing": "paper"}, "diffusion": {"shift": 3.0}}[objective]
    assert client.post("/generate", json={"class_label": 0, **refused}).status_code == 422


def test_an_absent_seed_is_drawn_and_told(resolved: Callable[..., dict[str, Any]]) -> None:
    seeds = {resolved(class_label=0)["seed"] for _ in range(4)}
    assert len(seeds) == 4 and all(0 <= seed < 2**53 for seed in seeds)


@pytest.mark.parametrize(
    ("name", "index"), [("cat", 0), ("CAT", 0), ("  House \t cat ", 0), ("lorry", 3), ("Truck", 3), (2, 2), (None, None), (0, 0)]
)
def test_a_class_answers_to_each_of_its_names_aside_from_case_and_spacing(
    resolved: Callable[..., dict[str, Any]], name: str | int | None, index: int | None
) -> None:
    assert resolved(class_label=name)["class_label"] == index


def test_a_list_makes_one_picture_each(resolved: Callable[..., dict[str, Any]]) -> None:
    request = resolved(class_label=["lorry", 0, None])
    assert request["class_label"] == [3, 0, None] and "num_images" not in request


def test_a_quality_sets_what_the_request_does_not(resolved: Callable[..., dict[str, Any]]) -> None:
    best = resolved(class_label=0, quality="best")
    assert (best["steps"], best["guidance_scale"], best["sampler"]) == (50, 3.5, "euler")
    assert resolved(class_label=0, quality="best", guidance_scale=1)["guidance_scale"] == 1
    assert resolved(class_label=0, quality="draft")["guidance_scale"] == 2.0


TUNED = {
    "defaults": {"steps": 8, "sampler": "euler", "guidance_scale": 2.0, "guidance_interval": [0.15, 1.0]},
    "quality": {
        "draft": {"steps": 5},
        "standard": {"steps": 8, "sampler": "euler", "guidance_scale": 2.0, "guidance_interval": [0.15, 1.0], "evaluations": 15},
        "best": {"steps": 30, "sampler": "euler", "guidance_scale": 2.5, "guidance_interval": [0.0, 0.8], "frechet_distance": 1.2},
    },
}


@pytest.mark.parametrize(
    ("asked", "scale", "interval"),
    [
        ({}, 2.0, [0.15, 1.0]),
        ({"guidance_scale": 2}, 2.0, [0.15, 1.0]),
        ({"guidance_scale": 3}, 3.0, [0.0, 1.0]),
        ({"guidance_scale": 3, "guidance_interval": [0.2, 0.5]}, 3.0, [0.2, 0.5]),
        ({"guidance_interval": [0, 1]}, 2.0, [0.0, 1.0]),
        ({"steps": 50}, 2.0, [0.15, 1.0]),
        ({"quality": "draft"}, 2.0, [0.15, 1.0]),
        ({"quality": "best"}, 2.5, [0.0, 0.8]),
        ({"quality": "best", "guidance_scale": 2.5}, 2.5, [0.0, 0.8]),
        ({"quality": "best", "guidance_scale": 2.0}, 2.0, [0.0, 1.0]),
        ({"quality": "best", "guidance_interval": [0.3, 0.3]}, 2.5, [0.3, 0.3]),
    ],
)
def test_a_tuned_interval_goes_with_the_scale_it_was_measured_with(
    resolved: Callable[..., dict[str, Any]], serve: Callable[..., ModelRecord], asked: dict[str, Any], scale: float, interval: list[float]
) -> None:
    serve(**TUNED)
    request = resolved(class_label=0, **asked)
    assert (request["guidance_scale"], request["guidance_interval"]) == (scale, interval)
    assert resolved(**request) == request


def test_a_quality_with_a_scale_of_its_own_and_no_interval_guides_always(
    resolved: Callable[..., dict[str, Any]], serve: Callable[..., ModelRecord]
) -> None:
    serve(**{**TUNED, "quality": {"best": {"steps": 30, "guidance_scale": 2.0}}})
    assert resolved(class_label=0, quality="best")["guidance_interval"] == [0.0, 1.0]


def test_a_qualitys_spacing_goes_with_its_sampler(diffused: Callable[..., dict[str, Any]], serve: Callable[..., ModelRecord]) -> None:
    serve(**{**DIFFUSION, "quality": {"draft": {"steps": 8, "sampler": "ddim", "spacing": "trailing"}}})
    assert diffused(class_label=0, quality="draft")["spacing"] == "trailing"
    assert diffused(class_label=0, quality="draft", sampler="dpm-solver++")["spacing"] == "log-snr"


def test_the_models_list_shows_the_measured_qualities(client: TestClient, serve: Callable[..., ModelRecord]) -> None:
    serve(**TUNED)
    model = client.get("/models/tiny").json()
    assert (model["quality"], model["defaults"]) == (TUNED["quality"], TUNED["defaults"])


def test_a_guidance_interval_may_be_one_point(resolved: Callable[..., dict[str, Any]]) -> None:
    assert resolved(class_label=0, guidance_interval=[1, 1])["guidance_interval"] == [1.0, 1.0]


def test_the_job_holds_all_that_a_worker_needs(client: TestClient, redis: Redis, record: ModelRecord) -> None:
    answer = client.post("/generate", json={"class_label": ["cat", None], "seed": 5})
    job = redis.hgetall(protocol.job_key(answer.json()["id"]))
    assert GenerationRequest.parse(job[b"request"].decode()) == GenerationRequest("tiny", (0, None), 2.0, (0.0, 1.0), 4, "euler", 5)
    assert client.get(f"/jobs/{answer.json()['id']}").json()["request"] == answer.json()["request"]
    assert (int(job[b"version"]), job[b"checkpoint"].decode(), job[b"status"]) == (protocol.VERSION, record.checkpoint, b"queued")
    assert set(name.decode() for name in job) <= set(protocol.JOB_FIELDS)


def test_the_job_holds_every_choice(client: TestClient, redis: Redis, serve: Callable[..., ModelRecord]) -> None:
    serve(**DIFFUSION)
    choices = {
        "spacing": "leading",
        "eta": 0.5,
        "guidance_channels": "first-three",
        "guidance_rescale": 0.7,
        "guidance_interval": [0.1, 0.9],
    }
    answer = client.post("/generate", json={"class_label": 1, "seed": 5, "sampler": "ddim", **choices})
    request = GenerationRequest.parse(redis.hget(protocol.job_key(answer.json()["id"]), "request").decode())
    assert request == GenerationRequest("tiny", (1,), 2.0, (0.1, 0.9), 4, "ddim", 5, "leading", 0.5, 1.0, "first-three", 0.7)


def test_the_queue_names_no_code(client: TestClient, redis: Redis) -> None:
    """An rq job of ours is data: one operation that is compared, no arguments, nothing pickled."""
    job_id = client.post("/generate", json={"class_label": 0}).json()["id"]
    assert redis.lrange("rq:queue:dit-tiny", 0, -1) == [job_id.encode()]
    data = json.loads(zlib.decompress(redis.hget(f"rq:job:{job_id}", "data")))
    assert data == [protocol.OPERATION, None, [], {}]


def test_one_of_several_models_must_be_named(bare_client: TestClient, serve: Callable[..., ModelRecord]) -> None:
    serve(id="birds", labels=[["wren"], ["robin"]], checkpoint="b" * 64)
    serve(id="fish")
    answer = bare_client.post("/generate", json={"class_label": 0})
    assert answer.status_code == 422 and "birds, fish" in answer.json()["errors"][0]["detail"]
    chosen = bare_client.post("/generate", json={"class_label": "wren", "model": "birds"}).json()
    assert (chosen["request"]["model"], chosen["checkpoint"]) == ("birds", "b" * 64)


def test_a_name_of_several_classes_is_not_guessed(
    client: TestClient, serve: Callable[..., ModelRecord], resolved: Callable[..., dict[str, Any]]
) -> None:
    serve(labels=[["crane", "bird"], ["crane"], ["dog"]])
    answer = client.post("/generate", json={"class_label": "Crane"})
    assert answer.status_code == 422 and "several classes; give an index: 0, 1" in answer.text
    assert resolved(class_label="bird")["class_label"] == 0 and resolved(class_label=1)["class_label"] == 1
