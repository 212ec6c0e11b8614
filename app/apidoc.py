"""python -m app.apidoc > docs/api.md, or `make docs`: the OpenAPI document as a page to read. Nothing is said here that it does not say."""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from app.events import EVENTS
from app.kinds import KINDS, TYPE
from app.main import create_app
from app.markdown import Schema, given, shown, table, type_of
from app.openapi import PROBLEM_JSON
from app.settings import Settings

Lines = Iterator[str]

_EVERYWHERE = ("RateLimit", "RateLimit-Policy", "X-Request-Id")  # headers that are told once, in the description


def page(document: dict[str, Any]) -> str:
    """Markdown."""
    parts = (_head(document), _overview(document), _calls(document), _events(document), _problems(), _schemas(document))
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _head(document: dict[str, Any]) -> Lines:
    info = document["info"]
    yield "# The HTTP API"
    yield ""
    yield f"Made by `make docs` from the OpenAPI document of dit {info['version']}. A running server has that document at `/openapi.json`,"
    yield "and at `/docs` for trying it out."
    yield ""
    yield info["description"].replace("\n### ", "\n## ")


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, Schema]]:
    """`POST /generate` and what is told of it, tag by tag."""
    for tag in document["tags"]:
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if tag["name"] in operation["tags"]:
                    yield f"{method.upper()} {path}", operation


def _overview(document: dict[str, Any]) -> Lines:
    yield "## Calls"
    yield ""
    yield from table(
        ("call", "scope of the key", "what it does"),
        ((f"[`{call}`](#{_anchor(call)})", _scope(operation), _first_sentence(operation)) for call, operation in _operations(document)),
    )


def _scope(operation: Schema) -> str:
    if "security" not in operation:
        return "needs none"
    return ", ".join(operation["security"][0]["key"]) or "any"


def _first_sentence(operation: Schema) -> str:
    return str(operation["description"]).split(". ")[0].rstrip(".") + "."


def _anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return "".join(character for character in heading.lower().replace(" ", "-") if character.isalnum() or character in "-_")


def _calls(document: dict[str, Any]) -> Lines:
    shown_before: set[str] = set()
    for tag in document["tags"]:
        yield f"## {tag['name'].capitalize()}"
        yield ""
        yield tag["description"]
        yield ""
        for call, operation in _operations(document):
            if tag["name"] in operation["tags"]:
                yield from _call(call, operation, document, shown_before)


def _call(call: str, operation: Schema, document: dict[str, Any], shown_before: set[str]) -> Lines:
    yield f"### {call}"
    yield ""
    yield operation["description"]
    yield ""
    parameters = operation.get("parameters", [])
    if parameters:
        yield from table(("parameter", "type", ""), (_parameter(parameter) for parameter in parameters))
    if "requestBody" in operation:
        yield from _body(operation["requestBody"]["content"]["application/json"], document)
    for sample in operation["x-codeSamples"]:
        yield from (f"{sample['label']}:", "", f"```{sample['lang']}", sample["source"], "```", "")
    yield from table(
        ("answer", "", "headers"), (_answer(status, operation["responses"][status]) for status in sorted(operation["responses"]))
    )
    yield from _example(operation, document, shown_before)


def _parameter(parameter: Schema) -> Sequence[str]:
    schema = parameter["schema"]
    optional = "" if parameter["required"] else f"; {json.dumps(schema['default'])} when absent" if "default" in schema else "; optional"
    return f"`{parameter['name']}` in the {parameter['in']}", f"{type_of(schema)}{optional}", parameter["description"]


def _body(content: Schema, document: dict[str, Any]) -> Lines:
    name = content["schema"]["$ref"].rpartition("/")[2]
    yield "The body, of which only the class is required:"
    yield ""
    yield from _fields(document["components"]["schemas"][name])
    yield from table(
        ("for example", "body"), ((example["summary"], f"`{json.dumps(example['value'])}`") for example in content["examples"].values())
    )


def _answer(status: str, response: Schema) -> Sequence[str]:
    """Of a problem only its kinds: there is a table of what they mean."""
    names = [f"`{name}`" for name in response["headers"] if name not in _EVERYWHERE]
    content = response["content"]
    if PROBLEM_JSON in content:
        return status, ", ".join(f"[`{kind}`](#problems)" for kind in content[PROBLEM_JSON]["examples"]), ", ".join(names)
    media = " or ".join(f"`{media_type}`" for media_type in content)
    schema = content.get("application/json", {}).get("schema")
    return f"{status} {media}".rstrip(), response["description"] + (f" {type_of(schema)}" if schema else ""), ", ".join(names)


def _example(operation: Schema, document: dict[str, Any], shown_before: set[str]) -> Lines:
    """The first of the first success, once for each schema."""
    responses = operation["responses"]
    content = responses[min(responses)]["content"]
    schema = json.dumps(content.get("application/json", {}).get("schema"))
    if "application/json" in content and schema not in shown_before:
        shown_before.add(schema)
        example = document["components"]["examples"][next(iter(content["application/json"]["examples"]))]
        yield from (f"{example['summary']}:", "", "```json", shown(example["value"]), "```", "")


def _events(document: dict[str, Any]) -> Lines:
    yield "## The events of a job"
    yield ""
    yield "An event has an `id`, to go on after, a name (`event`) and `data`, which is JSON:"
    yield ""
    schemas = document["components"]["schemas"]
    rows = ((f"`{name}`", _in_short(schemas[model.__name__]), schemas[model.__name__]["description"]) for name, model in EVENTS.items())
    yield from table(("event", "data", ""), rows)


def _in_short(schema: Schema) -> str:
    return "; ".join(f"`{name}` {type_of(field)}" for name, field in schema["properties"].items())


def _problems() -> Lines:
    yield "## Problems"
    yield ""
    yield f"`type` is `{TYPE}` and one of these:"
    yield ""
    rows = ((f"`{kind.name}`", str(kind.status), kind.means, "yes" if kind.retry_after_s is not None else "") for kind in KINDS.values())
    yield from table(("kind", "status", "what it means", "`Retry-After`"), rows)
    yield from ("```json", shown(KINDS["invalid-request"].example), "```", "")


def _schemas(document: dict[str, Any]) -> Lines:
    yield "## What the answers hold"
    yield ""
    asked, told = {"GenerateRequest"}, {model.__name__ for model in EVENTS.values()}  # there are tables of these already
    for name, schema in document["components"]["schemas"].items():
        if name in asked | told:
            continue
        yield from (f"### {name}", "", schema["description"], "")
        yield from _fields(schema)


def _fields(schema: Schema) -> Lines:
    required = schema.get("required", [])
    rows = (
        (f"`{name}`", type_of(field) if name in required else f"{type_of(given(field))}; optional", field.get("description", ""))
        for name, field in schema["properties"].items()
    )
    yield from table(("field", "type", ""), rows)


if __name__ == "__main__":
    sys.stdout.write(page(create_app(Settings.model_construct(redis_url="redis://unused")).openapi()))
