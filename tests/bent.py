"""Hypothesis strategies: what a hand, a disk or an enemy makes of sound bytes and of sound JSON."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

# Of other types, empty, huge, not finite, and characters that UTF-8 cannot say.
ODD = st.sampled_from(
    [None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -0.5, 1e308, float("nan"), float("inf"), "", "\ud800", "\0", "/"]
)
JUNK = st.recursive(
    ODD | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
DEEP = "[" * 100_000  # deeper than any parser goes
LONG = "9" * 5000  # more digits than Python makes a number of


@st.composite
def bent_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """Some bytes changed, taken out, put in or said twice; or cut short."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["change", "remove", "insert", "repeat", "cut"])):
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "remove":
                del data[at : at + draw(st.integers(1, 16))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case "cut":
                del data[at:]
    return bytes(data)


@st.composite
def bent_json(draw: st.DrawFn, sound: Any) -> Any:
    """One to three places of a document, at any depth, replaced by junk, removed, or joined by a field that does not belong there."""
    document = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document)) or [()]))
        if not path:
            return draw(JUNK)
        parent = document
        for step in path[:-1]:
            parent = parent[step]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
            case "replace":
                parent[path[-1]] = draw(JUNK)
            case "remove":
                del parent[path[-1]]
            case "add":
                if isinstance(parent, dict):
                    parent[draw(st.text(max_size=5))] = draw(JUNK)
                else:
                    parent.append(draw(JUNK))
    return document


def places(document: Any, path: tuple[Any, ...] = ()) -> Any:
    """The path of every value inside."""
    inside = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for step, value in inside:
        yield (*path, step)
        yield from places(value, (*path, step))


def text_of(document: Any) -> str:
    """JSON as Python writes it: NaN, and lone surrogates by their escapes."""
    return json.dumps(document)
