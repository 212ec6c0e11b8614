"""The arithmetic of benchmarks/serving.py, overhead.py and what they share, which are scripts and in no package."""

import importlib
import json
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from model.checkpoint import load
from model.sampling import sample

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SAMPLERS = ["euler", "sde-dpm-solver++"]


@pytest.fixture(scope="module")
def serving() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("serving")


@pytest.fixture(scope="module")
def service(serving: ModuleType) -> ModuleType:
    return importlib.import_module("_service")


@pytest.fixture(scope="module")
def peer(serving: ModuleType) -> ModuleType:
    return importlib.import_module("_peer")


def a_request(service: ModuleType, **changes: Any) -> Any:
    plain = {"class_label": 0, "guidance_scale": 2.0, "steps": 20, "sampler": "euler", "seed": 7, "num_images": 1}
    return service.Request(**{**plain, **changes})


def an_outcome(service: ModuleType, status: str = "succeeded", scheduled: float = 0.0, started: float = 0.0, finished: float = 0.0) -> Any:
    return service.Outcome(a_request(service), scheduled, status, scheduled, started, finished)


def test_requests_of_one_seed_are_the_same_and_of_another_are_not(service: ModuleType) -> None:
    drawn = [list(islice(service.draw_requests(seed, "fine", SAMPLERS, 10), 50)) for seed in ((0, 1), (0, 1), (0, 2))]

    assert drawn[0] == drawn[1] != drawn[2]


def test_the_fine_mix_stays_in_its_ranges_and_draws_all_that_the_model_has(service: ModuleType) -> None:
    drawn = list(islice(service.draw_requests((0,), "fine", SAMPLERS, 10), 1000))

    assert {request.steps for request in drawn} == set(range(10, 51))
    assert all(1 <= request.guidance_scale <= 5 for request in drawn)
    assert {request.sampler for request in drawn} == set(SAMPLERS)
    assert {request.class_label for request in drawn} == set(range(10))
    assert {request.num_images for request in drawn} == {1, 2, 3, 4}


def test_the_coarse_mix_has_five_values_each_of_steps_and_guidance(service: ModuleType) -> None:
    drawn = list(islice(service.draw_requests((0,), "coarse", SAMPLERS, 10), 300))

    assert {request.steps for request in drawn} == {10, 20, 30, 40, 50}
    assert {request.guidance_scale for request in drawn} == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_arrivals_bring_the_work_that_was_asked_for_in_the_order_of_their_times(serving: ModuleType, service: ModuleType) -> None:
    requests = list(islice(service.draw_requests((0,), "fine", SAMPLERS, 10), 10_000))

    coming = serving.arrivals(iter(requests), lambda request: request.steps, 3000, 60.0, (0,))

    times = [time for time, _ in coming]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 60
    assert [request for _, request in coming] == requests[: len(coming)]
    work = sum(request.steps for _, request in coming)
    assert 3000 <= work < 3000 + coming[-1][1].steps


def test_gaps_between_arrivals_spread_as_much_as_their_mean(serving: ModuleType, service: ModuleType) -> None:
    """As those of a Poisson process do, and of evenly spaced arrivals do not."""
    coming = serving.arrivals(iter([a_request(service)] * 4000), lambda _: 1, 4000, 100.0, (0,))

    times = [time for time, _ in coming]
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(100 / 4000, rel=0.01)
    assert spread == pytest.approx(mean, rel=0.1)


def test_a_latency_counts_from_the_scheduled_time_also_for_a_job_that_has_not_ended(serving: ModuleType, service: ModuleType) -> None:
    outcomes = [
        an_outcome(service, scheduled=10.0, started=11.0, finished=12.5),
        an_outcome(service, "running", scheduled=20.0, started=25.0),
        an_outcome(service, "queued", scheduled=30.0),
        an_outcome(service, "failed", scheduled=10.0, finished=11.0),
        an_outcome(service, "refused", scheduled=10.0),
    ]

    assert serving.latencies(outcomes, now=100.0) == [2.5, 80.0, 70.0]


def test_percentiles_are_values_that_occurred(service: ModuleType) -> None:
    assert service.percentiles([float(n) for n in range(100, 0, -1)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert service.percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert service.percentiles([]) == {}


def test_a_job_across_the_edge_of_a_window_counts_by_its_share_inside(service: ModuleType) -> None:
    outcomes = [
        an_outcome(service, started=8.0, finished=12.0),  # half of it
        an_outcome(service, started=12.0, finished=14.0),
        an_outcome(service, started=19.0, finished=23.0),  # a quarter
        an_outcome(service, started=21.0, finished=22.0),
        an_outcome(service, "canceled", started=12.0, finished=14.0),
    ]

    assert service.per_second(outcomes, 10.0, 20.0, lambda _: 8) == pytest.approx((4 + 8 + 2) / 10)


@pytest.mark.parametrize("changes", [{"steps": 21}, {"guidance_scale": 2.01}, {"sampler": "heun"}])
def test_a_batch_of_equals_takes_no_job_that_differs(peer: ModuleType, service: ModuleType, changes: dict[str, Any]) -> None:
    first, equal = (peer.peer_job_id(a_request(service, num_images=n)) for n in (1, 4))
    other = peer.peer_job_id(a_request(service, **changes))

    assert peer.equal_waiting(first, [other, equal, other]) == [equal]


def test_a_batch_of_equals_takes_the_oldest_that_fit_its_rows(peer: ModuleType, service: ModuleType) -> None:
    first, *waiting = (peer.peer_job_id(a_request(service, num_images=n)) for n in (2, 4, 3, 1, 2))

    chosen = peer.equal_waiting(first, waiting, most_rows=16)  # guided pictures have two rows: 4 + 8, then 3 × 2 do not fit

    assert chosen == [waiting[0], waiting[2]]


def test_an_unguided_picture_is_one_row_and_a_guided_one_two(service: ModuleType) -> None:
    assert a_request(service, guidance_scale=1.0, num_images=3).rows == 3
    assert a_request(service, guidance_scale=1.5, num_images=3).rows == 6


def test_the_name_of_every_sampler_is_allowed_in_a_job_id_of_rq(peer: ModuleType, service: ModuleType) -> None:
    from rq.job import validate_job_id

    for sampler in SAMPLERS:
        validate_job_id(peer.peer_job_id(a_request(service, sampler=sampler)))


def test_the_trace_tells_rows_and_busy_share_of_a_window(service: ModuleType, tmp_path: Path) -> None:
    def tick(t: float, seconds: float, rows: int, bucket: int) -> str:
        return json.dumps({"t": t, "seconds": seconds, "rows": rows, "bucket": bucket, "pictures": 1, "jobs": 1, "decoded": 0})

    path = tmp_path / "trace.jsonl"
    lines = [tick(0.0, 9.0, 32, 32), tick(10.0, 1.0, 6, 8), tick(12.0, 2.0, 12, 16), tick(14.0, 1.0, 0, 0), tick(30.0, 1.0, 32, 32)]
    path.write_text("\n".join([*lines, lines[0][:20]]))  # the worker was killed in a line

    use = service.device_use(service.read_trace(path), 10.0, 20.0)

    assert use == {"rows": 9.0, "rows_share_of_padded": 0.75, "busy_share": 0.8}


def test_of_an_idle_request_the_ticks_while_it_was_open_are_the_engines_own_time(serving: ModuleType, service: ModuleType) -> None:
    overhead = importlib.import_module("overhead")
    outcome = service.Outcome(a_request(service), 100.0, "succeeded", 100.001, 100.003, 100.013)
    answer = overhead.Answer(outcome, posted=100.0, answered=100.015, clock=(50.0, 50.015))
    ticks = [service.Tick(t, 0.004, 2, 4) for t in (49.99, 50.003, 50.008, 50.1)]

    parts = overhead.parts(answer, ticks)

    assert parts["engine"] == pytest.approx(8)
    assert parts["posted_to_created"] + parts["created_to_started"] + parts["started_to_finished_less_engine"] == pytest.approx(5, abs=1e-6)
    assert parts["posted_to_finished_less_engine"] == pytest.approx(5, abs=1e-6)
    assert parts["posted_to_answered_less_engine"] == pytest.approx(7, abs=1e-6)
    assert "engine" not in overhead.parts(answer, [])


def test_without_a_trace_nothing_is_said_of_the_device(service: ModuleType, tmp_path: Path) -> None:
    assert service.device_use(service.read_trace(tmp_path / "none.jsonl"), 0.0, 1.0) == {}


@pytest.mark.parametrize(("sampler", "guidance"), [("euler", 1.0), ("euler", 2.0), ("heun", 2.0)])
def test_the_peer_that_draws_with_diffusers_draws_our_pictures(serving: ModuleType, sampler: str, guidance: float) -> None:
    """The same weights and noise; the schedulers' times differ a little, since theirs end at a thousandth."""
    checkpoint = load(BENCHMARKS.parent / "checkpoints" / "fashion-mnist", torch.device("cpu"))
    pipeline = importlib.import_module("_pipeline").Pipeline(checkpoint, torch.float32, compile=False)
    labels, seeds = [1, 9, None], [3, 4, 5]
    setting: Any = {"steps": 40, "guidance_scale": guidance, "sampler": sampler}

    theirs, ours = pipeline.pictures(labels, seeds, **setting), sample(checkpoint, labels, seeds=seeds, **setting)

    assert theirs.shape == ours.shape
    assert (theirs.float() - ours.float()).abs().mean() < 4, "of 255 grey levels"
    assert (ours[0].float() - ours[1].float()).abs().mean() > 40, "they are not all alike"
