"""What a picture says of itself is read back as it was said, or is a ValueError."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bent import DEEP, JUNK, LONG, bent_bytes, bent_json, text_of
from worker.picture_text import LONGEST, PictureText
from worker.protocol import GenerationRequest

REQUEST = GenerationRequest("tiny", (2, None, 1), 2.0, (0.1, 0.9), 25, "euler", 40)
TEXT = PictureText(REQUEST, 1, "cd" * 32)
DOCUMENT = json.loads(TEXT.dump())


def check(text: str) -> None:
    """A text that is read says the same again; any other is a ValueError that says something, in one line."""
    try:
        found = PictureText.parse(text)
    except ValueError as error:
        assert type(error) is ValueError and str(error) and "\n" not in str(error) and len(str(error)) < 2000
        return
    assert PictureText.parse(found.dump()) == found and 0 <= found.index < found.request.num_images


@given(st.integers(1, 64).flatmap(lambda count: st.tuples(st.just(count), st.integers(0, count - 1))))
def test_what_is_said_is_read(place: tuple[int, int]) -> None:
    count, index = place
    said = PictureText(replace(REQUEST, class_labels=tuple(range(count))), index, "cd" * 32)
    assert PictureText.parse(said.dump()) == said
    assert said.alone == replace(REQUEST, class_labels=(index,), seed=40 + index)


@given(st.text(max_size=100) | JUNK.map(text_of))
def test_any_text_is_a_picture_or_a_value_error(text: str) -> None:
    check(text)


@given(bent_bytes(TEXT.dump().encode()))
def test_a_text_with_bent_bytes_is_a_picture_or_a_value_error(data: bytes) -> None:
    check(data.decode(errors="surrogateescape"))


@settings(max_examples=200)
@given(bent_json(DOCUMENT))
def test_a_bent_document_is_a_picture_or_a_value_error(document: Any) -> None:
    check(text_of(document))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (DEEP[:60_000], "no description of a picture"),
        (f'{{"version": {LONG}}}', "integer string"),
        (" " * (LONGEST + 1), f"its text has {LONGEST + 1} characters"),
        ("{}", "version"),
        ("[]", "no description of a picture"),
        (text_of({**DOCUMENT, "version": 2}), "its text is of version '2', and version 1 is what this dit reads"),
        (text_of({**DOCUMENT, "index": 3}), "tells of 3 pictures, numbered from 0, and its index is '3'"),
        (text_of({**DOCUMENT, "index": True}), "its index is 'True'"),
        (text_of({**DOCUMENT, "checkpoint": "../.."}), "names no checkpoint"),
        (text_of({**DOCUMENT, "seed": 40}), "contradicts itself"),
        (text_of({**DOCUMENT, "class_label": 2}), "contradicts itself"),
        (text_of({**DOCUMENT, "author": "me"}), "contradicts itself"),
        (text_of({**DOCUMENT, "request": {**DOCUMENT["request"], "steps": 0}}), "steps is of another type or out of range"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_what_no_worker_wrote_is_told(text: str, told: str) -> None:
    with pytest.raises(ValueError) as raised:
        PictureText.parse(text)
    assert told in str(raised.value)


def test_of_two_fields_of_one_name_the_last_counts_as_everywhere_in_json() -> None:
    assert PictureText.parse(TEXT.dump().replace('"index": 1', '"index": 9, "index": 1')) == TEXT


def test_a_picture_of_a_request_with_fewer_fields_is_read() -> None:
    """As workers wrote them before there were spacings."""
    old = {name: value for name, value in DOCUMENT["request"].items() if name not in ("spacing", "eta", "shift", "guidance_channels")}
    assert PictureText.parse(text_of({**DOCUMENT, "request": old})) == TEXT
