"""What is counted, is counted once, adds up over workers and outlives them."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError

from worker import counts, protocol
from worker.counts import HISTOGRAMS, bucket_fields, ended_field, stats_key, sum_field
from worker.maintenance import Maintenance
from worker.protocol import GenerationRequest
from worker.results import JobResults
from worker.rq_worker import DiTWorker
from worker.stats import Sender, Stats

MakeRequest = Callable[..., GenerationRequest]


def stored(redis: Redis, model: str = "tiny") -> dict[str, float]:
    return {name.decode(): float(value) for name, value in redis.hgetall(stats_key(model)).items()}


def observed(told: dict[str, float], histogram: str) -> int:
    return int(sum(told.get(name, 0) for name in bucket_fields(histogram)))


# In memory.


def test_what_was_taken_is_not_taken_again() -> None:
    stats = Stats()
    stats.count("tiny", "images")
    stats.count("tiny", "images", by=3)
    stats.count("other", "images")
    assert stats.take() == {"tiny": {"images": 4}, "other": {"images": 1}}
    assert stats.take() == {}


@pytest.mark.parametrize(("value", "bucket"), [(0, "rows|1"), (1, "rows|1"), (1.5, "rows|2"), (256, "rows|256"), (257, "rows|inf")])
def test_a_value_counts_for_the_first_bound_that_is_not_smaller(value: float, bucket: str) -> None:
    stats = Stats()
    stats.observe("tiny", "rows", value)
    assert stats.take() == {"tiny": {bucket: 1, "rows|sum": value}}


def test_nothing_is_lost_between_a_loop_that_counts_and_a_heart_that_takes() -> None:
    stats, taken, ended = Stats(), [0.0], threading.Event()

    def beat() -> None:
        while True:
            last = ended.is_set()
            taken[0] += sum(counts["images"] for counts in stats.take().values())
            if last:
                return

    heart = threading.Thread(target=beat)
    heart.start()
    for _ in range(20_000):
        stats.count("tiny", "images")
    ended.set()
    heart.join()
    assert taken == [20_000]


@pytest.mark.parametrize("histogram", HISTOGRAMS)
def test_bounds_rise_and_have_fields_of_their_own(histogram: str) -> None:
    bounds, fields = HISTOGRAMS[histogram], bucket_fields(histogram)
    assert list(bounds) == sorted(set(bounds))
    assert len({*fields, sum_field(histogram)}) == len(bounds) + 2
    assert [float(field.split("|")[1]) for field in fields[:-1]] == list(bounds)


# To Redis.


def test_counts_of_several_workers_add_up_and_live_for_a_month(redis: Redis) -> None:
    for name in ("first", "second"):
        stats = Stats()
        sender = Sender(redis, name, stats)
        stats.count("tiny", "images", by=2)
        stats.observe("tiny", "tick_s", 0.25)
        sender.send()
        stats.count("tiny", "images")
        sender.send()
        sender.send()
    assert stored(redis) == {"images": 6, "tick_s|0.5": 2, "tick_s|sum": 0.5}
    assert counts.STATS_TTL_S - 60 < redis.ttl(stats_key("tiny")) <= counts.STATS_TTL_S
    assert 0 < redis.ttl(protocol.sent_key("first")) <= protocol.SENT_TTL_S


def test_counts_of_several_models_go_in_one_call(redis: Redis) -> None:
    stats = Stats()
    for model, by in (("one", 1), ("other", 2)):
        stats.count(model, "images", by)
        stats.observe(model, "rows", 3)
    before = redis.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]
    Sender(redis, "worker", stats).send()
    assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] - before <= 2, "one, and one that the server did not know yet"
    assert [stored(redis, model)["images"] for model in ("one", "other")] == [1, 2]


def test_nothing_is_sent_where_nothing_was_counted(redis: Redis) -> None:
    Sender(redis, "worker", Stats()).send()
    assert redis.keys("*") == []


def test_what_is_sent_again_after_a_lost_answer_is_counted_once(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    sender = Sender(redis, "worker", stats)
    stats.count("tiny", "images")
    add = sender._add

    def lose_the_answer(*arguments: Any) -> None:
        add(*arguments)
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(sender, "_add", lose_the_answer)
    with pytest.raises(ConnectionError):
        sender.send()
    monkeypatch.setattr(sender, "_add", add)
    stats.count("tiny", "images", by=10)
    sender.send()
    assert stored(redis)["images"] == 1, "the same again, and nothing newer with it"
    sender.send()
    assert stored(redis)["images"] == 11


def test_what_could_not_be_sent_is_sent_later(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    sender = Sender(redis, "worker", stats)
    add = sender._add

    def away(*arguments: Any) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(sender, "_add", away)
    stats.count("tiny", "images")
    for _ in range(3):
        with pytest.raises(ConnectionError):
            sender.send()
    monkeypatch.setattr(sender, "_add", add)
    sender.send()
    assert stored(redis) == {"images": 1}


# What the scripts count.


def test_the_end_of_a_job_is_counted_once_with_its_kind(redis: Redis, jobs: Any, make_request: MakeRequest) -> None:
    results = JobResults(redis)
    ids = [jobs.submit(make_request()) for _ in range(4)]
    for job in ids[:3]:
        results.start(job, "mine")
        results.start(job, "mine")
    for _ in range(2):
        assert results.succeed(ids[0], "mine", [])
        assert results.fail(ids[1], "mine", "why", kind=counts.DECODER)
        assert results.cancel(ids[2], "mine")
        jobs.cancel(ids[3])
    told = stored(redis)
    ended = {name: value for name, value in told.items() if name.startswith("ended")}
    assert ended == {"ended|succeeded|": 1, "ended|failed|decoder": 1, "ended|canceled|": 2}
    assert (observed(told, "wait_s"), observed(told, "job_s")) == (3, 1)
    assert 0 <= told["wait_s|sum"] < 10 and told["wait_s|sum"] / 3 <= told["job_s|sum"] < 10


def test_a_result_that_came_after_the_cancel_counts_as_canceled(redis: Redis, jobs: Any, make_request: MakeRequest) -> None:
    results, job = JobResults(redis), jobs.submit(make_request())
    results.start(job, "mine")
    jobs.cancel(job)
    assert results.succeed(job, "mine", [])
    told = stored(redis)
    assert told["ended|canceled|"] == 1 and "ended|succeeded|" not in told and observed(told, "job_s") == 0


def test_only_the_first_start_of_a_job_is_a_wait(redis: Redis, jobs: Any, make_request: MakeRequest) -> None:
    results, job = JobResults(redis), jobs.submit(make_request())
    redis.hincrbyfloat(protocol.job_key(job), "created_at", -90)
    assert [results.start(job, name) for name in ("one", "other")] == ["run", "run"]
    told = stored(redis)
    assert {name for name in told if name.startswith("wait_s")} == {"wait_s|120", "wait_s|sum"}
    assert 89 < told["wait_s|sum"] < 100


def test_a_job_whose_every_worker_died_is_counted(redis: Redis, jobs: Any, make_worker: Any, make_request: MakeRequest) -> None:
    job, dead = jobs.submit(make_request()), make_worker()
    for _ in range(protocol.MAX_ATTEMPTS):
        found = dead._take(idle=True)
        dead._lease(found[0])
        dead.engine.remove(job)
        dead.leases.clear()
        jobs.expire_leases()
        Maintenance(redis)._requeue_abandoned("tiny")
    assert jobs.status(job) == "failed"
    assert stored(redis)[ended_field("failed", counts.WORKER_DIED)] == 1


# What a worker counts.


@pytest.mark.usefixtures("in_this_process")
def test_a_worker_has_told_all_it_counted_when_it_ends(redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> None:
    jobs.submit(make_request(steps=4, class_labels=(0, 1, 2)))  # guided: two rows each
    jobs.submit(make_request(class_labels=(9,)))
    worker.work(burst=True)
    told = stored(redis)
    assert (told["images"], told["ended|succeeded|"], told["ended|failed|refused"]) == (3, 1, 1)
    assert told["rows|sum"] == 4 * 3 * 2 and told["bucket_rows"] >= told["rows|sum"]
    assert observed(told, "rows") == 4 and observed(told, "tick_s") >= 4 and observed(told, "decode_s") == 1
    assert 0 < told["tick_s|sum"] < 60 and "not_finite" not in told


@pytest.mark.usefixtures("in_this_process")
def test_counts_outlive_their_worker_and_those_of_the_next_are_added(
    redis: Redis, jobs: Any, make_worker: Callable[[], DiTWorker], make_request: MakeRequest
) -> None:
    for _ in range(2):
        jobs.submit(make_request())
        make_worker().work(burst=True)
    assert (stored(redis)["images"], stored(redis)["ended|succeeded|"]) == (2, 2)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(("part", "kind"), [("step", counts.STEP), ("decode", counts.DECODER)])
def test_a_failure_is_counted_with_what_failed(
    redis: Redis, jobs: Any, worker: Any, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch, part: str, kind: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(worker.engine.runner, part, fail)
    jobs.submit(make_request())
    worker.work(burst=True)
    assert stored(redis)[ended_field("failed", kind)] == 1


@pytest.mark.usefixtures("in_this_process")
def test_counts_that_cannot_be_sent_keep_nothing_else_from_it(
    jobs: Any, worker: DiTWorker, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(worker._sender, "send", away)
    job = jobs.submit(make_request())
    worker.work(burst=True)
    assert jobs.status(job) == "succeeded" and jobs.leftovers() == []
