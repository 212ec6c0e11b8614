"""JSON and its schemas, in Markdown and in words."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Schema = dict[str, Any]

_LINE = 110  # characters of JSON


def given(schema: Schema) -> Schema:
    """Null is what is not given."""
    return {**schema, "anyOf": [kind for kind in schema["anyOf"] if kind != {"type": "null"}]} if "anyOf" in schema else schema


def type_of(schema: Schema) -> str:
    """In words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        *kinds, last = dict.fromkeys(type_of(kind) for kind in schema["anyOf"])
        return f"{', '.join(kinds)} or {last}" if kinds else last
    if schema["type"] == "array":
        return _list(schema)
    if schema["type"] == "object":
        inner = schema.get("additionalProperties")
        return f"object of {type_of(inner)}" if isinstance(inner, dict) else "object"
    return f"{'text' if schema['type'] == 'string' else schema['type']}{_bounds(schema)}"


def _list(schema: Schema) -> str:
    if "prefixItems" in schema:
        return f"[{', '.join(type_of(item) for item in schema['prefixItems'])}]"
    most = f"up to {schema['maxItems']} of " if "maxItems" in schema else ""
    inner = type_of(schema["items"])
    return f"list of {most}({inner})" if " or " in inner else f"list of {most}{inner}"


def _bounds(schema: Schema) -> str:
    if "maxLength" in schema:
        return f" of up to {schema['maxLength']} characters"
    if "format" in schema:
        return f" ({schema['format']})"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is None:
        return ""
    above = "above " if "exclusiveMinimum" in schema else ""
    last = "" if high is None else _whole(high - 1 if "exclusiveMaximum" in schema else high)  # of integers alone
    return f" {above}{_whole(low)} … {last}" if last else f" from {above}{_whole(low)}"


def _whole(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def shown(value: Any, indent: str = "") -> str:
    """JSON; what is short enough is on one line."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(flat) <= _LINE or not isinstance(value, dict | list):
        return flat
    deeper = f"{indent}  "
    if isinstance(value, dict):
        inner = [f"{deeper}{json.dumps(name)}: {shown(entry, deeper)}" for name, entry in value.items()]
    else:
        inner = [f"{deeper}{shown(entry, deeper)}" for entry in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return ",\n".join([first + "\n" + inner[0], *inner[1:]]) + f"\n{indent}{last}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Its lines, and an empty one."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""
