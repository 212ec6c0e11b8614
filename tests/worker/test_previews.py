"""What a picture looks like on its way: as often as promised, of the right picture, and without a trace in what is made."""

import base64
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.worker.engines import assert_empty, drain, ends, images, pictures, record_of
from worker.engine import PREVIEWS, Engine, Preview
from worker.images import encode_preview
from worker.models import OneModel
from worker.protocol import GenerationRequest
from worker.runner import Runner

MakeRequest = Callable[..., GenerationRequest]


class AtOnce(ThreadPoolExecutor):
    """Encodes before it answers: a preview that a busy thread makes only after the picture itself is told to nobody."""

    def submit(self, work: Any, /, *arguments: Any, **options: Any) -> Any:
        task = super().submit(work, *arguments, **options)
        wait([task])
        return task


def shown(runner: Runner, **jobs: GenerationRequest) -> tuple[Engine, list[tuple[int, Any]]]:
    """Jobs that are to be shown, run to their end."""
    engine = Engine(OneModel(runner, record_of(runner)))
    engine._encoder = AtOnce(1)
    for name, request in jobs.items():
        engine.add(name, request, runner.checkpoint.hash, previews=True)
    return engine, drain(engine)


def previews(events: list[tuple[int, Any]]) -> Iterator[Preview]:
    return (event for _, event in events if isinstance(event, Preview))


def pixels(url: str) -> np.ndarray:
    kind, data = url.split(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.float64)


@pytest.mark.parametrize(
    ("steps", "sampler", "at"), [(20, "euler", [4, 8, 12, 16]), (6, "ab2", [2, 4]), (2, "euler", [1]), (1, "euler", [])]
)
def test_each_picture_is_shown_as_often_as_promised(
    runner: Runner, make_request: MakeRequest, steps: int, sampler: str, at: list[int]
) -> None:
    request = make_request(class_labels=(0, 1, 2), steps=steps, sampler=sampler)
    engine, events = shown(runner, a=request)
    told = [(p.index, round(p.share * steps)) for p in previews(events)]
    assert sorted(told) == [(i, step) for i in range(3) for step in at] and len(at) < PREVIEWS
    assert_empty(engine)


def test_who_does_not_ask_is_shown_nothing(runner: Runner, make_request: MakeRequest) -> None:
    engine = Engine(OneModel(runner, record_of(runner)))
    engine.add("shown", make_request(steps=10), runner.checkpoint.hash, previews=True)
    engine.add("not", make_request(steps=10, seed=8), runner.checkpoint.hash)
    assert {p.job_id for p in previews(drain(engine))} == {"shown"}


def test_pictures_have_the_same_bytes_whether_they_were_shown_or_not(runner: Runner, make_request: MakeRequest) -> None:
    jobs = {"a": make_request(class_labels=(0, 1, 2), steps=10), "b": make_request(steps=7, guidance_scale=1.0)}
    _, events = shown(runner, **jobs)
    assert images(events) == pictures(runner, jobs) and ends(events) == {"a": "done", "b": "done"}


@pytest.mark.parametrize(
    ("objective", "sampler"), [("flow", "euler"), ("flow", "heun"), ("diffusion", "ddpm"), ("diffusion", "dpm-solver++")]
)
def test_a_preview_is_of_the_clean_picture_and_comes_nearer(
    make_runner: Callable[..., Runner], make_request: MakeRequest, objective: str, sampler: str
) -> None:
    """The last one is much nearer to the picture itself than noise is."""
    _, events = shown(make_runner(objective), a=make_request(steps=25, sampler=sampler))
    (png,) = images(events).values()
    final = np.asarray(Image.open(io.BytesIO(png)), np.float64)
    distance = [np.abs(pixels(p.url) - final).mean() for p in previews(events)]
    assert len(distance) == 4 and distance[-1] < distance[0] and distance[-1] < 20


def test_a_large_picture_is_shown_at_half_its_size(runner: Runner, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.runner.PREVIEW_HALVED_FROM", 16)
    _, events = shown(runner, a=make_request(steps=10))
    assert {pixels(p.url).shape for p in previews(events)} == {(8, 8)}


def test_a_preview_that_fails_costs_nothing_but_itself(
    runner: Runner, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(pictures: object) -> None:
        raise torch.OutOfMemoryError("no room for looks")

    expected = pictures(runner, {"a": make_request(steps=10)})
    monkeypatch.setattr(runner, "preview", fail)
    engine, events = shown(runner, a=make_request(steps=10))
    assert images(events) == expected and not list(previews(events)) and "previews of 1 picture" in caplog.text
    assert_empty(engine)


def test_a_picture_whose_step_failed_is_not_shown_what_its_slot_held_before(
    make_runner: Callable[..., Runner], make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would be another job's picture."""
    runner, advance = make_runner(max_rows=16), Runner.step
    shown(runner, another=make_request(steps=10, class_labels=(0, 1, 2, 3)))
    fails = [True]

    def step(self: Runner, group: Any) -> None:
        if fails and fails.pop():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        advance(self, group)

    monkeypatch.setattr(Runner, "step", step)
    _, events = shown(runner, a=make_request(steps=10))
    assert [round(10 * p.share) for p in previews(events)] == [2, 4, 6, 8] and ends(events) == {"a": "done"}


def test_a_picture_that_is_not_finite_is_not_shown(runner: Runner, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    original = runner.preview
    monkeypatch.setattr(runner, "preview", lambda group: (runner.clean.fill_(float("nan")), original(group))[1])
    _, events = shown(runner, a=make_request(steps=10))
    assert not list(previews(events)) and ends(events) == {"a": "done"}


@pytest.mark.parametrize(("size", "channels", "kind"), [(28, 1, "png"), (64, 1, "jpeg"), (64, 3, "jpeg"), (16, 3, "png")])
def test_a_preview_is_small(size: int, channels: int, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size, size, channels), dtype=np.uint8)
    url = encode_preview(noise)
    assert url.startswith(f"data:image/{kind};base64,") and pixels(url).shape[:2] == (size, size)
    assert len(url) < 1.4 * (size * size * channels + 200)
