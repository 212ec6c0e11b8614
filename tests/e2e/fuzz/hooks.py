"""Loaded by Schemathesis: half of the valid requests ask for what the model can do, and what is refused all the same has a reason."""

import atexit
import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import schemathesis

from app.examples import ANSWERS
from app.kinds import TYPE
from app.schemas import MAX_IMAGES, MAX_SEED
from tests.app.described import faults

MODEL = ANSWERS["model"]["value"]
NAMES = [names[0] for names in MODEL["labels"]]
# What a model can do is not in the schema, nor what two fields mean together.
NOT_IN_THE_SCHEMA = {
    *("class_label", "sampler", "steps", "spacing", "eta", "shift", "quality", "model", "block_cache", "seed", "num_images"),
    *("guidance_interval", "Idempotency-Key"),
}
UNAVAILABLE = {"POST /generate": "draining", "GET /readyz": "not-ready"}  # all that the fuzzer can bring about, by closing a queue
counts: Counter[str] = Counter()  # by operation and status


def possible(body: dict[str, Any]) -> dict[str, Any]:
    """A request that is valid, within what the bundled model can do; the same one if it is that already."""
    given = {name: value for name, value in body.items() if value is not None or name == "class_label"}
    label = given["class_label"]
    many = isinstance(label, list)
    for name in ("spacing", "eta", "block_cache", *(["num_images"] if many else []), *(["steps"] if "quality" in given else [])):
        given.pop(name, None)
    changes: dict[str, Any] = {"class_label": [_known(entry) for entry in label] if many else _known(label)}
    changes["model"] = MODEL["id"]
    if "sampler" in given and given["sampler"] not in MODEL["samplers"]:
        changes["sampler"] = _one_of(MODEL["samplers"], given["sampler"])
    if "guidance_interval" in given:
        changes["guidance_interval"] = sorted(given["guidance_interval"])
    for name in {"steps", "num_images", "seed"} & set(given):
        changes[name] = int(given[name])  # 7.0 is an integer to JSON Schema, and not one to the service
    if "seed" in given:
        changes["seed"] = min(changes["seed"], MAX_SEED - MAX_IMAGES)
    return {**given, **changes}


def _known(label: Any) -> Any:
    if isinstance(label, str):
        return label if label in NAMES else _one_of(NAMES, label)
    return label if label is None else int(label) % len(NAMES)


def _one_of(values: list[str], text: str) -> str:
    return values[len(text) % len(values)]


def is_valid(case: schemathesis.Case) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_positive and isinstance(case.body, dict)


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Half of the valid requests are made possible; half of these are long enough to be canceled, the others wait, some for the picture."""
    if case.operation.label != "POST /generate" or not is_valid(case):
        return
    dice = zlib.crc32(json.dumps(case.body, sort_keys=True).encode())
    if dice % 2 == 0:
        case.body = possible(case.body)
    if dice % 4 == 2:
        case.body = {name: value for name, value in case.body.items() if name != "quality"} | {"steps": 1000}
    if dice % 4 == 0:
        case.headers["Prefer"] = "wait=60"
    if dice % 8 == 0:
        case.headers["Accept"] = "image/png"


@schemathesis.hook
def after_call(context: schemathesis.HookContext, case: schemathesis.Case, response: schemathesis.Response) -> None:
    counts[f"{case.operation.label} {response.status_code}"] += 1


@schemathesis.deserializer("image/png")
def picture(context: schemathesis.DeserializationContext, response: schemathesis.Response) -> str:
    """So that its schema, of a text, is looked at, and a link from it leads nowhere."""
    assert response.content.startswith(b"\x89PNG\r\n\x1a\n")
    return response.content.decode("latin-1")


@schemathesis.check
def every_answer_is_described_with_all_its_fields_headers_and_events(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """What no check of Schemathesis' looks for: headers and fields that are told and not described, kinds of problems, each event."""
    url, headers = urlsplit(str(response.request.url)), {name: values[0] for name, values in response.headers.items()}
    path, method = unquote(url.path, errors="replace"), str(response.request.method)
    found = list(faults(case.operation.schema.raw_schema, method, path, response.status_code, headers, response.content))
    assert not found, "; ".join(found)


@schemathesis.check
def a_valid_request_is_refused_for_what_no_schema_can_say(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    if case.operation.label == "POST /generate" and response.status_code == 422 and is_valid(case):
        allowed = {"Idempotency-Key"} if possible(case.body) == case.body else NOT_IN_THE_SCHEMA
        fields = {error["field"] for error in response.json()["errors"]}
        assert fields <= allowed, f"refused for {', '.join(fields - allowed)}"


@schemathesis.check
def a_service_is_unavailable_where_its_queue_was_closed(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    if response.status_code == 503:
        kind = response.json()["type"].removeprefix(TYPE)
        assert kind == UNAVAILABLE.get(case.operation.label), f"503 of kind {kind}"


if path := os.environ.get("FUZZ_COUNTS"):
    atexit.register(lambda: Path(path).write_text(json.dumps(dict(sorted(counts.items())))))
