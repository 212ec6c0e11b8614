"""What Prometheus reads: of this process, of the queues, and of what workers counted."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from starlette.testclient import TestClient

from app import metrics
from app.embedded import EmbeddedServer
from worker import protocol
from worker.counts import HISTOGRAMS
from worker.stats import Sender, Stats

Scrape = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(client: TestClient) -> Scrape:
    """Sample and labels → value."""
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "each series once"
    return found


def value(seen: Scrape, name: str, **labels: str) -> float:
    return seen[name, frozenset(labels.items())]


# --- queues and Redis ---------------------------------------------------------------------------------------------------


def test_queues_are_told_by_model(client: TestClient, submit: Callable[..., str], redis: Redis, serve: Callable[..., Any]) -> None:
    serve(id="another")
    first, *_ = [submit(model="tiny") for _ in range(3)]
    redis.hincrbyfloat(protocol.job_key(first), "created_at", -5)
    redis.zadd("rq:wip:dit-tiny", {"a:1": redis.time()[0] + 15})
    redis.hset("rq:worker:w", "pid", 1), redis.expire("rq:worker:w", 30), redis.sadd("rq:workers:dit-tiny", "rq:worker:w")
    redis.set(protocol.gate_key("another"), "paused")
    seen = scrape(client)
    names = ("dit_queue_depth", "dit_jobs_running", "dit_workers", "dit_workers_troubled", "dit_queue_paused", "dit_queue_draining")
    assert [value(seen, name, model="tiny") for name in names] == [3, 1, 1, 0, 0, 0]
    assert [value(seen, name, model="another") for name in names] == [0, 0, 0, 0, 1, 0]
    assert 5 <= value(seen, "dit_queue_oldest_seconds", model="tiny") < 30
    assert value(seen, "dit_queue_oldest_seconds", model="another") == 0
    assert value(seen, "dit_redis_up") == 1 and value(seen, "dit_redis_memory_bytes") > 1e5
    assert value(seen, "dit_image_bytes_reserved") == int(redis.get(protocol.BYTES_KEY) or 0) > 0
    assert (value(seen, "dit_queue_limit"), value(seen, "dit_image_bytes_limit")) == (1000, 1 << 30)


def test_the_dead_are_counted(client: TestClient, redis: Redis) -> None:
    redis.zadd(protocol.DEAD_KEY, {"a": 1, "b": 2})
    assert value(scrape(client), "dit_dead_jobs") == 2


def test_without_redis_the_process_still_tells_of_itself(
    mortal_server: EmbeddedServer, open_client: Callable[..., AbstractContextManager[TestClient]]
) -> None:
    with open_client(redis_url=mortal_server.url) as client:
        assert value(scrape(client), "dit_redis_up") == 1
        mortal_server.stop()
        client.get("/models")
        seen = scrape(client)
        assert value(seen, "dit_redis_up") == 0
        assert value(seen, "dit_http_requests_total", route="/models", method="GET", status="503") == 1
        assert value(seen, "process_resident_memory_bytes") > 1e6
        assert not [name for name, _ in seen if name.startswith("dit_queue_depth")], "no number is better than an old one"
        mortal_server.start()
        assert value(scrape(client), "dit_redis_up") == 1


# --- what workers counted -----------------------------------------------------------------------------------------------


def test_a_model_that_has_done_nothing_yet_counts_from_0(client: TestClient) -> None:
    seen = scrape(client)
    assert value(seen, "dit_images_total", model="tiny") == value(seen, "dit_tick_seconds_count", model="tiny") == 0
    assert value(seen, "dit_jobs_ended_total", model="tiny", status="failed", kind="not-finite") == 0
    assert value(seen, "dit_jobs_ended_total", model="tiny", status="succeeded", kind="") == 0


def test_counts_of_workers_are_told(client: TestClient, redis: Redis) -> None:
    stats = Stats()
    for rows in (1, 4, 1000):
        stats.observe("tiny", "rows", rows)
    stats.count("tiny", "images", 7), stats.count("tiny", "bucket_rows", 12), stats.count("tiny", "not_finite")
    Sender(redis, "worker", stats).send()
    seen = scrape(client)
    assert value(seen, "dit_images_total", model="tiny") == 7
    assert value(seen, "dit_bucket_rows_total", model="tiny") == 12
    assert (value(seen, "dit_not_finite_total", model="tiny"), value(seen, "dit_out_of_memory_total", model="tiny")) == (1, 0)
    told = [value(seen, "dit_forward_rows_bucket", model="tiny", le=le) for le in ("1.0", "2.0", "4.0", "256.0", "+Inf")]
    assert told == [1, 1, 2, 2, 3], "of histograms Prometheus wants sums from below"
    assert (value(seen, "dit_forward_rows_sum", model="tiny"), value(seen, "dit_forward_rows_count", model="tiny")) == (1005, 3)


def test_ends_of_jobs_are_told_with_their_kind(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    for _ in range(2):
        submit(), worker.succeed(worker.take())
    submit(), worker.fail(worker.take(), "no luck")
    client.delete(f"/jobs/{submit()}")
    seen = scrape(client)
    ended = {tuple(sorted(dict(labels).items())): n for (name, labels), n in seen.items() if name == "dit_jobs_ended_total" and n}
    assert ended == {
        (("kind", ""), ("model", "tiny"), ("status", "succeeded")): 2,
        (("kind", "refused"), ("model", "tiny"), ("status", "failed")): 1,
        (("kind", ""), ("model", "tiny"), ("status", "canceled")): 1,
    }
    assert value(seen, "dit_queue_wait_seconds_count", model="tiny") == 3 and value(seen, "dit_job_seconds_count", model="tiny") == 2


def test_every_histogram_of_the_protocol_is_told() -> None:
    assert set(metrics._HISTOGRAMS) == set(HISTOGRAMS) and set(metrics._COUNTERS) == set(metrics.COUNTERS)


# --- requests -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(open_client: Callable[..., AbstractContextManager[TestClient]]) -> Any:
    """A process that has answered nothing yet."""
    with open_client() as client:
        yield client


def test_requests_are_counted_by_route_method_and_status(fresh: TestClient) -> None:
    for path in ("/jobs/one", "/jobs/other", "/models"):
        fresh.get(path)
    fresh.post("/generate", json={"class_label": 0}), fresh.post("/generate", json={})
    seen = scrape(fresh)
    assert value(seen, "dit_http_requests_total", route="/jobs/{job_id}", method="GET", status="404") == 2
    assert value(seen, "dit_http_requests_total", route="/models", method="GET", status="200") == 1
    assert value(seen, "dit_http_requests_total", route="/generate", method="POST", status="202") == 1
    assert value(seen, "dit_http_requests_total", route="/generate", method="POST", status="422") == 1
    assert value(seen, "dit_http_request_seconds_count", route="/generate", method="POST") == 2


def test_what_clients_make_up_does_not_make_series(fresh: TestClient) -> None:
    before = len(scrape(fresh))
    for number in range(20):
        fresh.get(f"/nothing/{number}")
        fresh.request(f"VERB{number}", "/models")
        fresh.get(f"/static/nothing-{number}.css")
    seen = scrape(fresh)
    labels = {dict(of)["route"]: dict(of)["method"] for (name, of) in seen if name == "dit_http_requests_total"}
    assert {"(none)", "/models", "/static"} <= set(labels), labels
    assert len(seen) - before < 100


def test_an_error_that_nobody_expected_counts_as_500(fresh: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(fresh.app.state.jobs, "models", fail)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError):
        fresh.get("/models")
    assert value(scrape(fresh), "dit_http_requests_total", route="/models", method="GET", status="500") == 1


def test_an_open_stream_is_counted_until_it_ends(fresh: TestClient, redis: Redis, worker: Any) -> None:
    job = fresh.post("/generate", json={"class_label": 0}).json()["id"]

    def end_it_once_it_is_watched(worker: Any, job: str) -> None:
        deadline = time.monotonic() + 30
        while value(scrape(fresh), "dit_event_streams") != 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        worker.succeed(job)

    with worker.meanwhile(end_it_once_it_is_watched):
        assert "event: done" in fresh.get(f"/jobs/{job}/events").text
    after = scrape(fresh)
    assert value(after, "dit_event_streams") == 0
    assert value(after, "dit_http_requests_total", route="/jobs/{job_id}/events", method="GET", status="200") == 1
