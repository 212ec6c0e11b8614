"""What came through Redis is checked again: a request is sound or it is a ValueError."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app import schemas
from model import samplers
from model.checkpoint import Checkpoint
from model.spacing import SPACINGS
from tests.bent import DEEP, JUNK, LONG, bent_bytes, bent_json, text_of
from worker import protocol
from worker.load import Loader
from worker.protocol import LARGEST_SEED, GenerationRequest, ModelRecord
from worker.results import Order
from worker.serve import describe

SETTINGS = {"steps": 4, "guidance_scale": 2.0, "sampler": "euler"}
SOUND = GenerationRequest("tiny", (0, None), 2.0, (0.0, 1.0), 25, "euler", 7)
OF_VERSION_2 = {"spacing": None, "eta": 0.0, "shift": 1.0, "guidance_channels": "all", "guidance_rescale": 0.0, "block_cache": 1}
QUIET = settings(database=None, deadline=None, derandomize=True)
NUMBERS = st.floats(1, 20), st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda ends: (min(ends), max(ends)))
REQUESTS = st.builds(
    GenerationRequest,
    model=st.text(max_size=20),
    class_labels=st.lists(st.none() | st.integers(0, 10**6), min_size=1, max_size=64).map(tuple),
    guidance_scale=NUMBERS[0],
    guidance_interval=NUMBERS[1],
    steps=st.integers(1, 1000),
    sampler=st.text(max_size=20),
    seed=st.integers(0, LARGEST_SEED - 63),
    spacing=st.none() | st.text(max_size=20),
    eta=st.floats(0, 1) | st.sampled_from([0, 1]),
    shift=st.floats(0, protocol.MAX_SHIFT, exclude_min=True),
    guidance_channels=st.sampled_from([protocol.ALL_CHANNELS, protocol.FIRST_THREE_CHANNELS]),
    guidance_rescale=st.floats(0, 1),
    block_cache=st.integers(1, protocol.MAX_BLOCK_CACHE),
)


def sound(**changes: Any) -> dict[str, Any]:
    return {**asdict(SOUND), **changes}


@QUIET
@given(REQUESTS)
def test_a_request_survives_its_way_through_redis(request: GenerationRequest) -> None:
    assert GenerationRequest.parse(request.dump()) == request


@QUIET
@given(st.text() | JUNK.map(json.dumps))
def test_junk_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        GenerationRequest.parse(text)


@QUIET
@given(st.sampled_from(sorted(asdict(SOUND))), JUNK)
def test_a_sound_request_with_one_field_of_junk_is_refused_or_sound(name: str, junk: Any) -> None:
    try:
        request = GenerationRequest.parse(json.dumps(sound(**{name: junk})))
    except ValueError as error:
        assert str(error).startswith("not a generation request: ")
        return
    assert isinstance(request.model, str) and isinstance(request.sampler, str) and isinstance(request.spacing, str | None)
    assert request.guidance_channels in ("all", "first-three")
    assert 0 <= request.eta <= 1 and 0 < request.shift <= 100 and 0 <= request.guidance_rescale <= 1 and 1 <= request.block_cache <= 8
    assert all(type(y) in (int, type(None)) for y in request.class_labels)
    assert type(request.steps) is int and type(request.seed) is int
    assert math.isfinite(request.guidance_scale) and all(math.isfinite(end) for end in request.guidance_interval)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_labels", []),
        ("class_labels", [0] * 65),
        ("class_labels", "0"),
        ("class_labels", [True]),
        ("class_labels", [1.5]),
        ("guidance_scale", 0.5),
        ("guidance_scale", 20.5),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", "2"),
        ("guidance_scale", True),
        ("guidance_interval", [0.0]),
        ("guidance_interval", [0.0, 0.5, 1.0]),
        ("guidance_interval", [0.7, 0.3]),
        ("guidance_interval", [-0.1, 1.0]),
        ("guidance_interval", [0.0, math.nan]),
        ("guidance_interval", "01"),
        ("steps", 0),
        ("steps", 1001),
        ("steps", 2.0),
        ("steps", "25"),
        ("seed", -1),
        ("seed", LARGEST_SEED),  # the second picture's is too large
        ("seed", 2**70),
        ("seed", 1.0),
        ("model", 3),
        ("sampler", None),
        ("spacing", 1),
        ("spacing", ["paper"]),
        ("eta", -0.1),
        ("eta", 1.1),
        ("eta", math.nan),
        ("eta", None),
        ("eta", "0"),
        ("eta", True),
        ("shift", 0),
        ("shift", -3.0),
        ("shift", 100.1),
        ("shift", math.inf),
        ("shift", math.nan),
        ("shift", "1"),
        ("shift", None),
        ("guidance_channels", "first-two"),
        ("guidance_channels", 3),
        ("guidance_channels", None),
        ("guidance_channels", ["all"]),
        ("guidance_channels", {}),
        ("guidance_rescale", -0.1),
        ("guidance_rescale", 1.1),
        ("guidance_rescale", math.nan),
        ("guidance_rescale", "0.5"),
        ("guidance_rescale", False),
        ("block_cache", 0),
        ("block_cache", 9),
        ("block_cache", 2.0),
        ("block_cache", True),
    ],
)
def test_a_field_out_of_its_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^not a generation request: .*({name}|unpack)"):
        GenerationRequest.parse(json.dumps(sound(**{name: value})))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '{"class_labels": null, "guidance_interval": [0, 1]}', '"text"', "[" * 100_000, '{"steps": 3}']
)
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a generation request"):
        GenerationRequest.parse(text)


def test_an_unknown_or_a_missing_field_is_refused() -> None:
    with pytest.raises(ValueError, match="os_command"):
        GenerationRequest.parse(json.dumps(sound(os_command="true")))
    for name in set(asdict(SOUND)) - set(OF_VERSION_2):
        document = sound()
        del document[name]
        with pytest.raises(ValueError, match=name):
            GenerationRequest.parse(json.dumps(document))


def test_a_payload_of_version_1_is_as_it_was() -> None:
    text = '{"class_labels": [0, null], "guidance_interval": [0.0, 1.0], "guidance_scale": 2.0, "model": "tiny", "sampler": "euler", '
    request = GenerationRequest.parse(text + '"seed": 7, "steps": 25}')
    assert request == SOUND and OF_VERSION_2.items() <= asdict(request).items()


def test_the_limits_are_those_of_the_model_and_of_the_api() -> None:
    """Three modules that may not import one another each say them."""
    assert protocol.MAX_SHIFT == samplers.MAX_SHIFT == schemas.MAX_SHIFT
    assert samplers.MAX_STEPS == 1000 and protocol.LARGEST_SEED == schemas.MAX_SEED
    channels = get_args(get_args(schemas.GenerateRequest.model_fields["guidance_channels"].annotation)[0])
    assert channels == (protocol.ALL_CHANNELS, protocol.FIRST_THREE_CHANNELS)


def test_a_dump_is_the_same_text_for_the_same_request() -> None:
    assert replace(SOUND).dump() == SOUND.dump()
    assert list(json.loads(replace(SOUND, block_cache=2).dump())) == sorted(asdict(SOUND))


def test_a_request_without_a_block_cache_is_one_that_older_workers_take() -> None:
    assert "block_cache" not in json.loads(SOUND.dump())


def test_a_record_survives_its_way_through_redis(record: ModelRecord) -> None:
    full = replace(record, quality={"draft": {"steps": 4}}, metrics={"consistency": 0.9})
    assert ModelRecord.parse(full.dump()) == full
    assert ModelRecord.parse(full.dump().encode()) == full


def test_the_record_of_a_worker_from_before_the_spacings_is_read(record: ModelRecord) -> None:
    document = asdict(record)
    del document["spacings"]
    assert ModelRecord.parse(json.dumps(document)) == replace(record, spacings=[])


@pytest.mark.parametrize(
    ("objective", "names", "spacings", "default"),
    [
        ("flow", ["euler", "heun", "ab2"], [], None),
        ("diffusion", ["ddpm", "ddpm-small", "ddpm-large", "ddim", "dpm-solver++", "sde-dpm-solver++"], SPACINGS, None),
        ("diffusion", ["ddpm", "ddpm-small", "ddpm-large", "ddim", "dpm-solver++", "sde-dpm-solver++"], SPACINGS, "log-snr"),
    ],
)
def test_a_worker_tells_the_samplers_and_spacings_of_its_model(
    build_checkpoint: Callable[..., Checkpoint], objective: str, names: list[str], spacings: list[str], default: str | None
) -> None:
    config = replace(build_checkpoint(objective).config, default_spacing=default)
    loader = Loader(torch.device("cpu"), torch.float32, compile=False)
    record = describe("tiny", config, "c" * 64, None, loader)
    assert (record.samplers, record.spacings, record.defaults.get("spacing")) == (names, list(spacings), default)


RECORD = ModelRecord(
    id="tiny",
    checkpoint="c" * 64,
    labels=[["cat", "house cat"], ["dog"]],
    image_size=16,
    image_channels=1,
    objective="flow",
    samplers=["euler"],
    max_steps=1000,
    defaults=SETTINGS,
    quality={"draft": {"steps": 2, "guidance_interval": [0.1, 0.8]}},
    default_spacings={"ddim": "paper"},
    rows_per_s=12.5,
)


def check_record(text: str | bytes) -> None:
    """What is read can be said in JSON, and is read again; any other is a ValueError in one line."""
    try:
        found = ModelRecord.parse(text)
    except ValueError as error:
        assert str(error).startswith("not a model's record: ") and "\n" not in str(error) and len(str(error)) < 300
        return
    assert json.dumps(asdict(found), allow_nan=False, ensure_ascii=False).encode() and ModelRecord.parse(found.dump()) == found


@settings(QUIET, max_examples=300)
@given(bent_json(json.loads(RECORD.dump())).map(text_of) | JUNK.map(text_of))
def test_a_bent_record_of_a_model_is_read_or_refused(text: str) -> None:
    check_record(text)


@QUIET
@given(bent_bytes(RECORD.dump().encode()) | st.binary(max_size=50))
def test_a_record_of_bent_bytes_is_read_or_refused(data: bytes) -> None:
    check_record(data)


@pytest.mark.parametrize("text", [DEEP, LONG, f'{{"id": {LONG}}}', '{"rows_per_s": 1e999}', "null", "[]"], ids=lambda text: text[:12])
def test_json_that_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a model's record"):
        ModelRecord.parse(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": [["cat", 3]]},
        {"labels": [[]]},
        {"labels": ["cat"]},
        {"image_size": 2**40},
        {"image_channels": True},
        {"samplers": "euler"},
        {"max_steps": 0},
        {"defaults": {"steps": 4}},
        {"defaults": {**SETTINGS, "guidance_scale": "2"}},
        {"defaults": {**SETTINGS, "steps": 10**400}},
        {"quality": {"draft": 2}},
        {"quality": {"draft": {"guidance_interval": [1, 0]}}},
        {"metrics": {"fid": math.nan}},
        {"metrics": {"fid": math.inf}},
        {"metrics": {"\ud800": 1}},
        {"default_spacings": {"ddim": None}},
        {"rows_per_s": -1},
        {"rows_per_s": True},
        {"block_cache": 1},
        {"id": ""},
    ],
    ids=str,
)
def test_a_record_by_which_no_request_can_be_resolved_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a model's record"):
        ModelRecord.parse(text_of({**json.loads(RECORD.dump()), **changes}))


@settings(QUIET, max_examples=200)
@given(
    st.tuples(
        *[st.none() | st.binary(max_size=12) | st.just(sound) for sound in (b"2", SOUND.dump().encode(), b"c" * 64, b"600", b"1", b"id")]
    )
    | bent_bytes(SOUND.dump().encode()).map(lambda request: (b"2", request, b"c", b"600", None, None))
)
def test_any_record_of_a_job_is_an_order_or_a_value_error(record: tuple[bytes | None, ...]) -> None:
    try:
        order = Order.parse(record)
    except ValueError:
        return
    assert 1 <= order.result_ttl_s <= protocol.MAX_RESULT_TTL_S and GenerationRequest.parse(order.request.dump()) == order.request


def test_keys_are_apart_for_every_job_execution_and_image() -> None:
    keys = [
        protocol.job_key("a"),
        protocol.job_key("b"),
        protocol.events_key("a"),
        protocol.image_key("a", "x", 0),
        protocol.image_key("a", "x", 1),
        protocol.image_key("a", "y", 0),
        protocol.image_key("b", "x", 0),
        protocol.model_key("a"),
        protocol.bell_key("a"),
        protocol.queue_name("a"),
        protocol.DEAD_KEY,
    ]
    assert len(set(keys)) == len(keys)
    assert (keys[0], keys[2], keys[3]) == ("dit:job:a", "dit:job:a:events", "dit:image:a:x:0")


def test_every_field_of_a_job_is_on_the_list(jobs: Any, make_request: Callable[..., GenerationRequest]) -> None:
    job_id = jobs.submit(make_request())
    assert set(jobs.record(job_id)) <= set(protocol.JOB_FIELDS)


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = "import sys, worker.protocol; print(sorted({m.split('.')[0] for m in sys.modules} & {'redis', 'rq', 'torch', 'numpy', 'PIL'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_record_of_a_newer_worker_is_still_read() -> None:
    record = ModelRecord("tiny", "c" * 64, [["cat"]], 16, 1, "flow", ["euler"], 1000, SETTINGS)
    told = json.loads(record.dump())
    assert ModelRecord.parse(json.dumps({**told, "something": "new"})) == record
