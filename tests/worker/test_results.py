"""Each change of a job's state is one step, fenced by its execution: whoever has lost the job changes nothing."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from worker import protocol
from worker.protocol import GenerationRequest
from worker.results import JobResults, Order

ENTRY = {"index": 0, "seed": 7, "sha256": "00", "bytes": 3}
BEGUN = [("queued", {}), ("progress", {"step": 0, "steps": 3})]


@pytest.fixture
def results(redis: Redis) -> JobResults:
    return JobResults(redis)


@pytest.fixture
def job(jobs: Any, make_request: Callable[..., GenerationRequest]) -> str:
    """A job that is queued."""
    return jobs.submit(make_request())


@pytest.fixture
def running(results: JobResults, job: str) -> str:
    """A job that execution `mine` runs."""
    assert results.start(job, "mine") == "run"
    return job


def state(jobs: Any, job: str) -> tuple[dict[str, str], list[Any]]:
    return jobs.record(job), jobs.events(job)


def order(results: JobResults, job: str) -> Order:
    """As a worker that takes the job reads it."""
    return Order.parse(results.start_in(results.connection.pipeline(), job, "reader")[1])


def test_a_start_takes_the_job_and_counts(jobs: Any, results: JobResults, job: str) -> None:
    before = time.time()
    assert results.start(job, "mine") == "run"
    record = jobs.record(job)
    assert (record["status"], record["execution"], record["attempts"], record["step"]) == ("running", "mine", "1", "0")
    assert before - 1 <= float(record["started_at"]) <= time.time() + 1


def test_a_start_is_told_once_with_the_steps_of_the_request(jobs: Any, results: JobResults, job: str) -> None:
    assert [results.start(job, "mine"), results.start(job, "mine")] == ["run", "run"], "as after a lost answer"
    assert jobs.events(job) == BEGUN


@pytest.mark.parametrize("request_text", ["", "{", "[]", "{}", '{"steps": "many"}'])
def test_a_request_that_cannot_be_read_is_no_error_of_the_start(
    redis: Redis, jobs: Any, results: JobResults, job: str, request_text: str
) -> None:
    redis.hset(protocol.job_key(job), "request", request_text)
    assert results.start(job, "mine") == "run"
    assert jobs.events(job) == BEGUN[:1]


def test_a_second_start_takes_the_job_from_the_first_and_keeps_its_time(jobs: Any, results: JobResults, running: str) -> None:
    first = jobs.record(running)
    results.tell(running, "mine", "progress", {}, step=2)
    assert results.start(running, "other") == "run"
    record = jobs.record(running)
    assert (record["execution"], record["attempts"], record["step"]) == ("other", "2", "0")
    assert record["started_at"] == first["started_at"]


@pytest.mark.parametrize("end", ["succeed", "fail", "cancel"])
def test_a_job_that_has_ended_is_not_started_again(jobs: Any, results: JobResults, running: str, end: str) -> None:
    arguments = {"succeed": [[ENTRY]], "fail": ["why"], "cancel": []}[end]
    assert getattr(results, end)(running, "mine", *arguments)
    before = state(jobs, running)
    assert results.start(running, "other") == "drop"
    assert state(jobs, running) == before


def test_a_job_that_is_unknown_is_not_started_and_not_made(redis: Redis, results: JobResults) -> None:
    assert results.start("nobody", "mine") == "drop"
    assert not results.fail("nobody", "mine", "why") and not results.give_back("nobody", "mine")
    assert results.tell("nobody", "mine", "progress", {}, step=1) == "lost"
    assert redis.keys("dit:*") == []


def test_a_job_is_tried_only_so_often_and_alone_from_the_third_time(redis: Redis, jobs: Any, results: JobResults, job: str) -> None:
    verdicts = [results.start(job, f"execution {attempt}") for attempt in range(protocol.MAX_ATTEMPTS + 1)]
    assert verdicts == ["run", "run", "alone", "alone", "alone", "exhausted"]
    assert results.fail(job, "execution 5", "given up", dead=True), "whoever is told so can end it"
    assert jobs.status(job) == "failed"
    assert [entry.decode() for entry in redis.zrange(protocol.DEAD_KEY, 0, -1)] == [job]


def test_a_start_that_is_repeated_after_a_lost_answer_is_counted_once(jobs: Any, results: JobResults, job: str) -> None:
    assert [results.start(job, "mine") for _ in range(3)] == ["run"] * 3
    assert jobs.record(job)["attempts"] == "1"
    jobs.cancel(job)
    assert [results.start(job, "mine") for _ in range(2)] == ["cancel"] * 2


def test_a_job_that_runs_under_a_living_lease_is_not_started_elsewhere(redis: Redis, jobs: Any, results: JobResults, job: str) -> None:
    """Whatever put it into the queue a second time."""
    redis.zadd(jobs.started, {f"{job}:mine": 1})
    assert results.start(job, "mine") == "run"
    before = state(jobs, job)
    assert time.time() < redis.zscore(jobs.started, f"{job}:mine") <= time.time() + protocol.LEASE_S + 1, "it counts from the start"
    assert results.start(job, "other") == "elsewhere"
    assert state(jobs, job) == before
    jobs.expire_leases()
    assert results.start(job, "other") == "run"


def test_the_list_of_the_dead_forgets_those_whose_record_has_expired(redis: Redis, jobs: Any, results: JobResults, job: str) -> None:
    redis.zadd(protocol.DEAD_KEY, {"long ago": time.time() - 601, "just now": time.time() - 500})
    results.start(job, "mine")
    assert results.fail(job, "mine", "why", dead=True)
    assert redis.zrange(protocol.DEAD_KEY, 0, -1) == [b"just now", job.encode()]
    assert abs(redis.zscore(protocol.DEAD_KEY, job) - time.time()) < 60 and 590 <= redis.ttl(protocol.DEAD_KEY) <= 600


@pytest.mark.parametrize("dead", [True, False])
def test_only_a_failure_is_dead(redis: Redis, jobs: Any, results: JobResults, running: str, dead: bool) -> None:
    jobs.cancel(running)
    assert results.fail(running, "mine", "why", dead=dead)
    assert jobs.status(running) == "canceled" and not redis.exists(protocol.DEAD_KEY)


def test_a_job_given_back_by_its_owner_has_lost_no_attempt(jobs: Any, results: JobResults, job: str) -> None:
    for restart in range(3 * protocol.MAX_ATTEMPTS):
        assert results.start(job, f"worker {restart}") == "run"
        assert results.give_back(job, f"worker {restart}")
    assert jobs.record(job)["attempts"] == "0"


def test_progress_is_told_while_it_runs(jobs: Any, results: JobResults, running: str) -> None:
    assert results.tell(running, "mine", "progress", {"step": 2, "steps": 3}, step=2) == "run"
    assert jobs.record(running)["step"] == "2"
    assert jobs.events(running) == [*BEGUN, ("progress", {"step": 2, "steps": 3})]


def test_to_ask_changes_nothing(jobs: Any, results: JobResults, running: str) -> None:
    before = state(jobs, running)
    assert results.tell(running, "mine") == "run"
    assert results.tell(running, "mine", "", {"step": 1}, step=1) == "run"
    assert state(jobs, running) == before


def test_success_writes_the_images_and_the_last_event(jobs: Any, results: JobResults, running: str) -> None:
    assert results.succeed(running, "mine", [ENTRY])
    record = jobs.record(running)
    assert (record["status"], json.loads(record["images"]), record["error"]) == ("succeeded", [ENTRY], "")
    assert float(record["finished_at"]) >= float(record["started_at"])
    assert jobs.events(running)[-1] == ("done", {"status": "succeeded"})


def test_failure_says_why(jobs: Any, results: JobResults, running: str) -> None:
    assert results.fail(running, "mine", "the step failed: “ü”")
    assert (jobs.status(running), jobs.record(running)["error"]) == ("failed", "the step failed: “ü”")
    assert jobs.events(running)[-1] == ("done", {"status": "failed", "error": "the step failed: “ü”"})


@pytest.mark.parametrize("end", ["succeed", "fail", "cancel"])
def test_record_events_and_images_live_for_the_result_ttl_after_the_end(redis: Redis, results: JobResults, running: str, end: str) -> None:
    keys = [protocol.job_key(running), protocol.events_key(running)]
    assert [redis.ttl(key) for key in keys] == [-1, -1], "while it runs nothing expires"
    results.store_image(running, "mine", 0, b"png", 600)
    arguments = {"succeed": [[ENTRY]], "fail": ["why"], "cancel": []}[end]
    getattr(results, end)(running, "mine", *arguments)
    for key in [*keys, protocol.image_key(running, "mine", 0)]:
        assert 590 <= redis.ttl(key) <= 600


def test_an_image_belongs_to_its_execution(redis: Redis, results: JobResults, running: str) -> None:
    results.store_image(running, "mine", 0, b"\x89PNG", 60)
    results.store_image(running, "other", 0, b"late", 60)
    assert redis.get(protocol.image_key(running, "mine", 0)) == b"\x89PNG"


def test_a_lost_execution_changes_nothing(jobs: Any, results: JobResults, running: str) -> None:
    assert results.start(running, "other") == "run"
    before = state(jobs, running)
    assert results.tell(running, "mine", "progress", {"step": 3}, step=3) == "lost"
    assert results.tell(running, "mine", "image", ENTRY) == "lost"
    assert not results.succeed(running, "mine", [ENTRY])
    assert not results.fail(running, "mine", "why")
    assert not results.cancel(running, "mine")
    assert not results.give_back(running, "mine")
    assert state(jobs, running) == before


def test_a_job_that_waits_again_belongs_to_nobody(redis: Redis, jobs: Any, results: JobResults, running: str) -> None:
    redis.delete(jobs.queue)
    redis.zadd(jobs.started, {f"{running}:mine": 1e12})
    assert results.give_back(running, "mine")
    before = state(jobs, running)
    assert before[0]["status"] == "queued" and before[0]["execution"] == "" and before[0]["step"] == "0"
    assert before[1][-1] == ("queued", {"retry": True})
    assert (jobs.waiting(), jobs.rq_status(running), redis.exists(jobs.started)) == ([running], "queued", 0)
    assert results.tell(running, "mine", "progress", {"step": 3}, step=3) == "lost"
    assert not results.succeed(running, "mine", [ENTRY])
    assert not results.give_back(running, "mine"), "once is enough"
    assert state(jobs, running) == before and jobs.waiting() == [running]


def test_a_job_given_back_waits_first_once_and_rings(redis: Redis, jobs: Any, results: JobResults, running: str) -> None:
    redis.delete(jobs.queue, jobs.bell)
    redis.rpush(jobs.queue, "other")
    redis.rpush(jobs.intermediate, running)  # its worker had not come as far as to take it from there
    assert results.give_back(running, "mine")
    assert jobs.waiting() == [running, "other"] and redis.llen(jobs.intermediate) == 0
    assert redis.llen(jobs.bell) == 1 and 0 < redis.ttl(jobs.bell) <= protocol.BELL_TTL_S


@pytest.mark.parametrize("end", ["succeed", "fail", "cancel"])
def test_the_end_is_final(jobs: Any, results: JobResults, running: str, end: str) -> None:
    """The same end again is confirmed, since the first answer may have been lost; it changes nothing."""
    assert results.succeed(running, "mine", [ENTRY])
    before = state(jobs, running)
    arguments = {"succeed": [[]], "fail": ["why"], "cancel": []}[end]
    assert getattr(results, end)(running, "mine", *arguments) is (end == "succeed")
    assert not getattr(results, end)(running, "other", *arguments)
    assert not results.give_back(running, "mine")
    assert results.tell(running, "mine", "progress", {}, step=1) == "lost"
    assert jobs.cancel(running) == "succeeded"
    assert state(jobs, running) == before


def test_a_queued_job_is_canceled_at_once(redis: Redis, jobs: Any, results: JobResults, job: str) -> None:
    assert jobs.cancel(job) == "queued"
    assert jobs.status(job) == "canceled"
    assert jobs.events(job)[-1] == ("done", {"status": "canceled"})
    assert jobs.waiting() == [] and jobs.rq_status(job) is None, "rq has forgotten it"
    assert 590 <= redis.ttl(protocol.job_key(job)) <= 600 and 590 <= redis.ttl(protocol.events_key(job)) <= 600
    assert results.start(job, "mine") == "drop"


def test_a_job_popped_in_this_very_moment_is_canceled_and_dropped_by_its_worker(
    redis: Redis, jobs: Any, results: JobResults, job: str
) -> None:
    redis.lmove(jobs.queue, jobs.intermediate)
    assert jobs.cancel(job) == "queued"
    assert jobs.rq_status(job) == "queued", "the worker needs rq's record to end the job there too"
    assert results.start(job, "mine") == "drop"


def test_a_running_job_is_told_to_stop(jobs: Any, results: JobResults, running: str) -> None:
    assert jobs.cancel(running) == "running"
    assert jobs.status(running) == "canceling"
    assert jobs.cancel(running) == "canceling", "again changes nothing"
    assert results.tell(running, "mine", "progress", {"step": 2}, step=2) == "cancel"
    assert jobs.events(running) == BEGUN, "there is no more progress"
    assert results.cancel(running, "mine")
    assert (jobs.status(running), jobs.events(running)[-1]) == ("canceled", ("done", {"status": "canceled"}))
    assert jobs.cancel(running) == "canceled"


@pytest.mark.parametrize("end", ["succeed", "fail"])
def test_a_cancel_that_came_in_time_wins_over_a_result(jobs: Any, results: JobResults, running: str, end: str) -> None:
    jobs.cancel(running)
    arguments = {"succeed": [[ENTRY]], "fail": ["why"]}[end]
    assert getattr(results, end)(running, "mine", *arguments)
    record = jobs.record(running)
    assert (record["status"], record["images"], record["error"]) == ("canceled", "[]", "")
    assert jobs.events(running)[-1] == ("done", {"status": "canceled"})


def test_cancel_of_an_unknown_job_makes_nothing(redis: Redis, jobs: Any) -> None:
    assert jobs.cancel("nobody") is None
    assert redis.keys("dit:*") == []


def test_a_job_that_waits_again_is_still_being_canceled(jobs: Any, results: JobResults, running: str) -> None:
    jobs.cancel(running)
    assert results.give_back(running, "mine")
    assert (jobs.status(running), jobs.record(running)["execution"]) == ("canceling", "")
    assert jobs.events(running) == BEGUN, "and not told as waiting again"
    assert results.start(running, "other") == "cancel"
    assert results.cancel(running, "other")
    assert jobs.status(running) == "canceled"


def test_many_jobs_are_told_of_in_one_round_trip_each_with_its_own_answer(
    redis: Redis, jobs: Any, results: JobResults, running: str, make_request: Callable[..., GenerationRequest]
) -> None:
    canceling, lost = jobs.submit(make_request()), jobs.submit(make_request())
    results.start(canceling, "mine")
    jobs.cancel(canceling)
    results.start(lost, "other")
    pipeline = redis.pipeline()
    results.store_image(running, "mine", 0, b"png", 60, pipeline)
    assert not redis.exists(protocol.image_key(running, "mine", 0)), "it waits for its event"
    news = [(job, "mine", "image", {"index": 0}, None) for job in (running, canceling, lost)]
    assert results.tell_all(news, pipeline) == (["run", "cancel", "lost"], [])
    assert redis.get(protocol.image_key(running, "mine", 0)) == b"png"
    assert [jobs.events(job)[-1][0] for job in (running, canceling, lost)] == ["image", "progress", "progress"]


def test_pictures_and_ends_are_told_in_one_round_trip(
    redis: Redis, jobs: Any, results: JobResults, running: str, make_request: Callable[..., GenerationRequest]
) -> None:
    canceling, lost = jobs.submit(make_request()), jobs.submit(make_request())
    results.start(canceling, "mine")
    jobs.cancel(canceling)
    results.start(lost, "other")
    news = [(job, "mine", "image", {"index": 0}, None) for job in (running, canceling, lost)]
    ends = [(job, "mine", [ENTRY]) for job in (running, canceling, lost)]
    assert results.tell_all(news, redis.pipeline(), ends) == (["run", "cancel", "lost"], [True, True, False])
    assert [jobs.status(job) for job in (running, canceling, lost)] == ["succeeded", "canceled", "running"]
    assert results.cancel(canceling, "mine"), "told again, as it is after a `cancel`, it is confirmed"
    assert [event for event, _ in jobs.events(running)] == ["queued", "progress", "image", "done"]


def test_a_request_comes_back_as_it_was_queued(jobs: Any, results: JobResults, make_request: Callable[..., GenerationRequest]) -> None:
    request = make_request(class_labels=(1, None), seed=2**40)
    assert order(results, jobs.submit(request, checkpoint="c" * 64)) == Order(request, "c" * 64, 600)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", "4", "payload version b'4' is not understood by this worker .version 3."),
        ("version", "0", "payload version b'0'"),
        ("version", "one", "payload version"),
        ("version", None, "payload version None"),
        ("checkpoint", None, "lacks its request, its checkpoint or its TTL"),
        ("request", None, "lacks its request, its checkpoint or its TTL"),
        ("result_ttl_s", None, "lacks its request, its checkpoint or its TTL"),
        ("result_ttl_s", "long", "invalid literal"),
        ("result_ttl_s", "0", "cannot live for 0 s"),
        ("result_ttl_s", "9" * 16, "cannot live for"),
        ("result_ttl_s", "1.5", "invalid literal"),
        ("request", "{}", "not a generation request"),
        ("request", b"\xff\xfe", "decode"),
    ],
)
def test_a_record_that_is_not_for_this_worker_is_a_value_error(
    redis: Redis, jobs: Any, results: JobResults, make_request: Callable[..., GenerationRequest], field: str, value: Any, message: str
) -> None:
    job = jobs.submit(make_request(), checkpoint="c" * 64)
    if value is None:
        redis.hdel(protocol.job_key(job), field)
    else:
        redis.hset(protocol.job_key(job), field, value)
    with pytest.raises(ValueError, match=message):
        order(results, job)


def test_the_version_before_is_understood(
    redis: Redis, jobs: Any, results: JobResults, make_request: Callable[..., GenerationRequest]
) -> None:
    job = jobs.submit(make_request(), checkpoint="c" * 64)
    redis.hset(protocol.job_key(job), "version", protocol.VERSION - 1)
    assert order(results, job).request == make_request()


def test_the_stream_of_a_long_job_is_trimmed(redis: Redis, results: JobResults, running: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "EVENTS_KEPT", 100)
    for step in range(400):
        results.tell(running, "mine", "progress", {"step": step}, step=step)
    assert 100 <= redis.xlen(protocol.events_key(running)) < 300


@pytest.mark.parametrize("ttl", ["long", "1.5", "nan", "inf", "-3", "9" * 19, ""])
def test_a_damaged_record_ends_and_expires_too(redis: Redis, jobs: Any, results: JobResults, running: str, ttl: str) -> None:
    redis.hset(protocol.job_key(running), "result_ttl_s", ttl)
    assert results.fail(running, jobs.record(running)["execution"], "its record is damaged")
    assert jobs.status(running) == "failed" and redis.ttl(protocol.job_key(running)) > 0


@pytest.mark.parametrize("attempts", ["many", "nan", ""])
def test_a_damaged_count_of_attempts_keeps_no_job_from_waiting_again(
    redis: Redis, jobs: Any, results: JobResults, running: str, attempts: str
) -> None:
    redis.hset(protocol.job_key(running), "attempts", attempts)
    assert results.give_back(running, jobs.record(running)["execution"])
    assert (jobs.status(running), jobs.record(running)["attempts"]) == ("queued", "0")
