"""Jobs of several models in turn, one at a time, and bells that no worker sleeps through."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import Redis
from rq import suspension

from worker import protocol
from worker.intake import Intake
from worker.protocol import GenerationRequest
from worker.results import JobResults

MakeRequest = Callable[..., GenerationRequest]


@pytest.fixture
def intake(redis: Redis) -> Intake:
    return Intake(redis, "a")


@pytest.fixture
def submit(jobs: Any, make_request: MakeRequest) -> Callable[..., str]:
    """`submit(model="tiny", attempts=0)`: a job that was tried so often."""

    def put(model: str = "tiny", attempts: int = 0) -> str:
        job = jobs.submit(make_request(model=model))
        jobs.redis.hset(protocol.job_key(job), "attempts", attempts)
        return str(job)

    return put


def take(intake: Intake, *models: str, idle: bool = True, but: str = "") -> str | None:
    """The id of the next job, of any model `but` this one."""
    found = intake.take(models or ("tiny",), lambda model: model != but, idle=idle)
    return found[1] if found else None


def test_a_job_that_is_taken_is_in_the_intermediate_list(redis: Redis, jobs: Any, intake: Intake, submit: Callable[..., str]) -> None:
    first, second = submit(), submit()
    assert intake.take(["tiny"], lambda model: True, idle=True) == ("tiny", first)
    assert (jobs.waiting(), redis.lrange(jobs.intermediate, 0, -1)) == ([second], [first.encode()])


def test_an_empty_queue_gives_nothing_and_does_not_block(intake: Intake) -> None:
    assert take(intake) is None and take(intake, idle=False) is None
    assert intake.take([], lambda model: True, idle=True) is None


def test_models_take_turns(intake: Intake, submit: Callable[..., str]) -> None:
    many, few = [submit("many") for _ in range(5)], [submit("few") for _ in range(2)]
    taken = [take(intake, "few", "many", idle=False) for _ in range(7)]
    assert sorted(map(str, taken)) == sorted(many + few)
    assert {str(job) for job in taken[:4]} == {*many[:2], *few}


def test_a_model_that_is_not_wanted_keeps_its_jobs_and_its_turn(intake: Intake, submit: Callable[..., str]) -> None:
    one, other = submit("one"), submit("other")
    assert take(intake, "one", "other", but="one") == other
    assert take(intake, "one", "other", but="one") is None
    assert take(intake, "one", "other") == one


def test_a_model_that_has_gone_is_no_obstacle(intake: Intake, submit: Callable[..., str]) -> None:
    submit("one"), submit("one")
    assert take(intake, "one", "other") and take(intake, "other") is None and take(intake, "one")


def test_nothing_is_taken_while_rq_is_suspended(redis: Redis, intake: Intake, submit: Callable[..., str]) -> None:
    job = submit()
    suspension.suspend(redis)
    assert take(intake) is None and intake.suspended
    suspension.resume(redis)
    assert take(intake) == job and not intake.suspended


# Bells.


def rings(redis: Redis, model: str = "tiny") -> int:
    return int(redis.llen(protocol.bell_key(model)))


def test_each_submission_rings_and_a_bell_keeps_so_many_rings(redis: Redis, submit: Callable[..., str]) -> None:
    submit()
    assert rings(redis) == 1 and 0 < redis.ttl(protocol.bell_key("tiny")) <= protocol.BELL_TTL_S
    for _ in range(protocol.BELL_RINGS + 3):
        submit()
    assert rings(redis) == protocol.BELL_RINGS


def test_an_idle_worker_that_looks_answers_for_the_rings_so_far(redis: Redis, intake: Intake, submit: Callable[..., str]) -> None:
    for _ in range(3):
        submit()
    taken = [take(intake) for _ in range(3)]
    assert None not in taken and rings(redis) == 0


def test_who_leaves_a_job_waiting_rings_once_for_another(redis: Redis, intake: Intake, submit: Callable[..., str]) -> None:
    for _ in range(3):
        submit()
    for _ in range(2):
        take(intake)
        assert rings(redis) == 1
    take(intake)
    assert rings(redis) == 0


def test_a_busy_worker_leaves_the_rings_to_idle_ones(redis: Redis, intake: Intake, submit: Callable[..., str]) -> None:
    submit(), submit()
    take(intake, idle=False)
    assert rings(redis) == 2


def test_whoever_listens_hears_a_ring_of_any_model(redis: Redis, connect: Callable[[], Redis], submit: Callable[..., str]) -> None:
    heard: list[Any] = []
    client = connect()
    ring = client.blpop
    client.blpop = lambda *arguments: heard.append(ring(*arguments))
    intake = Intake(client, "b")
    assert take(intake, "one", "other") is None
    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(intake.listen, ["one", "other"])
        while not redis.info("clients")["blocked_clients"] and not listening.done():
            time.sleep(0.005)
        job = submit("other")
        listening.result(30)
    if heard == [None]:  # a slow machine: the second was over
        intake.listen(["one", "other"])
    assert heard[-1] == (protocol.bell_key("other").encode(), b"1")
    assert take(intake, "one", "other") == job


def test_a_job_that_came_between_look_and_listening_is_not_slept_through(intake: Intake, submit: Callable[..., str], redis: Redis) -> None:
    assert take(intake) is None
    submit()
    assert redis.blpop([protocol.bell_key("tiny")], 10) is not None


# Jobs that run alone.


def test_a_job_before_its_third_attempt_is_taken_by_anyone(intake: Intake, submit: Callable[..., str]) -> None:
    job = submit(attempts=protocol.ALONE_FROM - 2)
    assert take(intake, idle=False) == job


def test_a_job_at_its_third_attempt_is_left_to_an_idle_worker(redis: Redis, jobs: Any, intake: Intake, submit: Callable[..., str]) -> None:
    poison, behind = submit(attempts=protocol.ALONE_FROM - 1), submit()
    for _ in range(2):
        assert take(intake, idle=False) is None
    assert jobs.waiting() == [poison, behind], "nothing was popped"
    assert jobs.record(poison)["attempts"] == "2"
    assert 0 < redis.ttl(f"dit:alone:{poison}") <= protocol.CLAIM_S
    assert take(Intake(redis, "idle")) == poison
    assert not redis.exists(f"dit:alone:{poison}")


def test_only_one_busy_worker_waits_for_such_a_job(redis: Redis, intake: Intake, submit: Callable[..., str]) -> None:
    poison, behind = submit(attempts=2), submit()
    other = Intake(redis, "b")
    assert take(intake, idle=False) is None
    assert take(other, idle=False) == behind
    assert take(other, idle=False) is None
    redis.delete(f"dit:alone:{poison}")  # the first has died, or has not looked for CLAIM_S
    submit()
    assert take(other, idle=False) is None and take(intake, idle=False) is not None


def test_who_waits_for_such_a_job_takes_it_before_those_of_other_models(intake: Intake, submit: Callable[..., str]) -> None:
    poison = submit("poisoned", attempts=2)
    submit("other"), submit("other"), submit("other")
    while take(intake, "other", "poisoned", idle=False):
        pass
    assert take(intake, "other", "poisoned") == poison


@pytest.mark.parametrize("way", ["canceling", "canceled", "unknown"])
def test_a_job_that_only_needs_to_be_ended_is_taken_by_anyone(
    redis: Redis, jobs: Any, intake: Intake, submit: Callable[..., str], way: str
) -> None:
    job = submit(attempts=2)
    if way == "canceling":
        results = JobResults(redis)
        results.start(job, "mine")
        jobs.cancel(job)
        redis.delete(jobs.queue)
        results.give_back(job, "mine")
    elif way == "canceled":
        redis.hset(protocol.job_key(job), "status", "canceled")
    else:
        redis.delete(protocol.job_key(job))
    assert take(intake, idle=False) == job
