"""From latents to PNGs beside the steps: nothing waits, nothing is lost, and what the decoder or an encoder cannot bear fails alone."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.worker.engines import Jobs, assert_empty, drain, ends, images, pictures, start, traced
from worker import engine as engine_module
from worker.decoder import Decoding
from worker.engine import ImageReady, JobDone
from worker.images import encode_png
from worker.protocol import GenerationRequest
from worker.runner import Runner
from worker.scheduler import Picture

MakeRequest = Callable[..., GenerationRequest]


# --- decoder and encoder -----------------------------------------------------------------------------------------------


class Slow(Decoding):
    """A decoding that is not ready until it is told so, or waited for."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding, self.held = decoding, True

    def ready(self) -> bool:
        return not self.held

    def result(self) -> list[Any]:
        return self._decoding.result()


@pytest.fixture
def decodings(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[Slow]:
    """Every decoding of the runner, each held back as on a device that is busy."""
    made, decode = list[Slow](), runner.decode

    def slowly(finished: Sequence[Picture]) -> Decoding:
        made.append(Slow(decode(finished)))
        return made[-1]

    monkeypatch.setattr(runner, "decode", slowly)
    return made


def test_steps_go_on_while_the_decoder_works_and_nothing_is_lost(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, decodings: list[Slow]
) -> None:
    jobs = {"short": make_request(steps=1, class_labels=(0, 1)), **three_jobs}
    engine, trace = traced(runner, jobs)
    events = drain(engine)
    assert len(decodings) == 4 and len(trace) == 9, "nobody waited for a decoding until nothing was left to step"
    assert images(events) == pictures(runner, jobs) and ends(events) == dict.fromkeys(jobs, "done")


def test_a_picture_that_is_lost_while_it_is_decoded_begins_again_and_arrives_once(
    runner: Runner, make_request: MakeRequest, decodings: list[Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the decoder made of it before."""
    jobs = {"a": make_request(steps=2, class_labels=(0, 1)), "long": make_request(steps=9, seed=90)}
    clean = pictures(runner, jobs)
    engine = start(runner, jobs)
    engine.tick()
    engine.tick()
    (lane,) = engine.lanes.values()
    picture, _ = lane.decoding[0][0][0]
    monkeypatch.setattr(runner, "lost", lambda: [(picture, 0)])  # at every tick, though it is so only once
    engine.tick()
    assert picture.attempt == 1 and picture.evaluation == 0
    spoiled, whole = decodings[-1].result()
    monkeypatch.setattr(decodings[-1], "result", lambda: [np.zeros_like(spoiled), whole])
    decodings[-1].held = False
    events = drain(engine)
    assert Counter((e.job_id, e.index) for _, e in events if isinstance(e, ImageReady)) == dict.fromkeys(clean, 1)
    assert images(events) == clean and ends(events) == {"a": "done", "long": "done"}


@pytest.mark.parametrize("times", [1, 2])
def test_a_picture_whose_decoder_gives_nothing_is_tried_again_once(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    jobs = {"hit": make_request(class_labels=(0, 1), steps=2, seed=70), **three_jobs}
    clean = pictures(runner, jobs)
    decode, emptied = runner.decode, list[int]()

    def without(finished: Sequence[Picture]) -> Decoding:
        slots = [i for i, p in enumerate(finished) if (p.job.id, p.index) == ("hit", 1) and len(emptied) < times]
        decoding = decode(finished)
        decoding._finite = torch.tensor([i not in slots for i in range(len(finished))])
        emptied.extend(slots)
        return decoding

    monkeypatch.setattr(runner, "decode", without)
    engine = start(runner, jobs)
    events = drain(engine)
    assert len(emptied) == times
    message = "done" if times == 1 else "picture 1 left the finite numbers, also alone"
    assert ends(events) == {**dict.fromkeys(three_jobs, "done"), "hit": message}
    arrived = images(events)
    assert {key: png for key, png in arrived.items() if key[0] != "hit"} == {key: png for key, png in clean.items() if key[0] != "hit"}
    assert times == 2 or arrived == clean
    assert_empty(engine)


def test_one_decoder_batch_a_tick_while_others_go_on(runner: Runner, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where decoding takes seconds, leases must be renewed in between; the slots of those that wait keep their latents."""
    jobs = {"five": make_request(steps=1, class_labels=(0, 1, 2, 3, None), guidance_scale=1.0), "one": make_request(steps=6, seed=99)}
    expected = pictures(runner, jobs)
    runner.decoder.buckets = [2]
    engine, trace = traced(runner, jobs)
    events = drain(engine)
    assert [entry["decoded"] for entry in trace] == [2, 2, 1, 0, 0, 1]
    assert [[i for job, _, i in entry["steps"] if job == "one"] for entry in trace] == [[0], [1], [2], [3], [4], [5]]
    assert images(events) == expected and ends(events) == {"five": "done", "one": "done"}
    assert_empty(engine)


def test_a_late_job_does_not_wait_for_the_decoder_behind_a_job_of_64(runner: Runner, make_request: MakeRequest) -> None:
    runner.decoder.buckets = [2]
    engine, trace = traced(runner, {"large": make_request(steps=1, class_labels=(0, 1, 2, 3) * 16, guidance_scale=1.0)})

    def join(tick: int) -> None:
        if tick == 2:
            engine.add("late", make_request(steps=2, seed=99), runner.checkpoint.hash)

    events = drain(engine, join)
    assert [i for i, entry in enumerate(trace) if any(job == "late" for job, _, _ in entry["steps"])] == [2, 3]
    assert events.index(next(e for e in events if e[1] == JobDone("late"))) < len(events) // 2
    assert len(images(events)) == 65


def test_a_picture_that_the_decoder_cannot_bear_fails_its_job_alone(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = {"bad": make_request(steps=2, class_labels=(0, 3)), **three_jobs}
    clean, decode = pictures(runner, three_jobs), runner.decode

    def fragile(finished: Sequence[Picture]) -> Decoding:
        if any(picture.class_label == 3 for picture in finished):
            raise RuntimeError("class 3 is too much")
        return decode(finished)

    monkeypatch.setattr(runner, "decode", fragile)
    engine = start(runner, jobs)
    events = drain(engine)
    assert ends(events) == {"bad": "the decoder failed: class 3 is too much", **dict.fromkeys(three_jobs, "done")}
    assert {key: png for key, png in images(events).items() if key[0] != "bad"} == clean
    assert_empty(engine)


def test_out_of_memory_in_the_decoder_halves_its_batch_and_the_bytes_stay(
    runner: Runner, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"a": make_request(steps=2, class_labels=(0, 1, 2, 3) * 4, guidance_scale=1.0)}
    clean, decode, sizes = pictures(runner, job), runner.decode, list[int]()

    def small(finished: Sequence[Picture]) -> Decoding:
        sizes.append(len(finished))
        if len(finished) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(finished)

    monkeypatch.setattr(runner, "decode", small)
    events = drain(start(runner, job))
    assert sizes == [16, 8, 4, 4, 4, 4] and runner.decode_buckets == [2, 4]
    assert images(events) == clean and ends(events) == {"a": "done"}


def test_an_encoder_that_throws_fails_that_job_alone(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = pictures(runner, three_jobs)

    def encode(pixels: Any, request: GenerationRequest, index: int, checkpoint: str) -> tuple[bytes, str]:
        if request.class_labels[index] == 3:
            raise OSError("no paper")
        return encode_png(pixels, request, index, checkpoint)

    monkeypatch.setattr(engine_module, "encode_png", encode)
    engine = start(runner, {"bad": make_request(class_labels=(0, 3), steps=1), **three_jobs})
    events = drain(engine)
    assert ends(events) == {"bad": "picture 1 could not be encoded: no paper", **dict.fromkeys(three_jobs, "done")}
    assert {key: png for key, png in images(events).items() if key[0] != "bad"} == clean
    assert_empty(engine)


@pytest.fixture
def encoding_gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No picture is encoded until it is set."""
    gate = threading.Event()

    def encode(pixels: Any, request: GenerationRequest, index: int, checkpoint: str) -> tuple[bytes, str]:
        assert gate.wait(60)
        return encode_png(pixels, request, index, checkpoint)

    monkeypatch.setattr(engine_module, "encode_png", encode)
    return gate


def test_the_trace_tells_too_of_ticks_that_only_waited(runner: Runner, make_request: MakeRequest, encoding_gate: threading.Event) -> None:
    trace: list[dict[str, Any]] = []
    engine = start(runner, {"a": make_request(steps=1)}, trace.append)
    assert engine.tick() == []
    encoding_gate.set()
    drain(engine)
    first, waiting = ({key: value for key, value in entry.items() if key not in ("t", "seconds")} for entry in trace)
    assert first["steps"] == [("a", 0, 0)] and first["decoded"] == 1
    assert waiting == {"rows": 0, "bucket": 0, "pictures": 0, "jobs": 0, "steps": [], "decoded": 0}


def test_steps_go_on_while_pictures_are_encoded_but_no_more_than_a_few_pile_up(
    runner: Runner, make_request: MakeRequest, encoding_gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MOST_ENCODING", 5)
    jobs = {"five": make_request(steps=1, class_labels=(0, 1, 2, 3, None), guidance_scale=1.0), "long": make_request(steps=6, seed=9)}
    engine = start(runner, {**jobs, "three": make_request(steps=4, class_labels=(0, 1, 2), seed=50)})
    assert [engine.tick() for _ in range(3)] == [[]] * 3 and len(engine._encoding) == 5
    encoding_gate.set()
    delivered = [event for event in engine.tick() if isinstance(event, ImageReady)]
    assert len(engine._encoding) <= 5 and [(e.job_id, e.index) for e in delivered][:3] == [("five", 0), ("five", 1), ("five", 2)]
    assert ends(drain(engine))["long"] == "done"


def test_a_job_removed_while_it_is_decoded_leaves_no_trace(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, decodings: list[Slow]
) -> None:
    clean = pictures(runner, three_jobs)
    gone = make_request(steps=1, class_labels=(0, 1))
    engine = start(runner, {"gone": gone, **three_jobs})
    engine.tick()
    assert decodings[-1].held and "gone" in engine.jobs
    engine.remove("gone")
    engine.add("gone", replace(gone, seed=1234), runner.checkpoint.hash)  # another of the same name
    events = drain(engine)
    expected = {**clean, **pictures(runner, {"gone": replace(gone, seed=1234)})}
    assert images(events) == expected and ends(events) == dict.fromkeys({"gone", *three_jobs}, "done")
    assert_empty(engine)


def test_a_job_removed_while_it_is_encoded_leaves_no_trace(
    runner: Runner, three_jobs: Jobs, make_request: MakeRequest, encoding_gate: threading.Event
) -> None:
    gone = make_request(steps=1, class_labels=(0, 1))
    engine = start(runner, {"gone": gone, **three_jobs})
    assert engine.tick() == [] and len(engine._encoding) == 2
    engine.remove("gone")
    engine.add("gone", replace(gone, seed=1234), runner.checkpoint.hash)
    encoding_gate.set()
    events = drain(engine)
    expected = pictures(runner, {**three_jobs, "gone": replace(gone, seed=1234)})
    assert images(events) == expected and ends(events) == dict.fromkeys({"gone", *three_jobs}, "done")
    assert_empty(engine)
