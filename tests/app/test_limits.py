"""How often a key may call: never more than its limit, and every answer tells where it stands."""

import http.client
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from starlette.testclient import TestClient

from app.limits import TAKE
from worker import protocol

Open = Callable[..., AbstractContextManager[TestClient]]
Bearer = Callable[..., dict[str, str]]
RATE = protocol.rate_key("3f9c2a10")


def standing(answer: Any) -> tuple[int, int, int]:
    """Calls a minute, calls left, seconds to the next, as the headers tell them."""
    policy = re.fullmatch(r'"default";q=(\d+);w=60', answer.headers["ratelimit-policy"])
    left = re.fullmatch(r'"default";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
    assert policy and left
    return int(policy[1]), int(left[1]), int(left[2])


# --- the script --------------------------------------------------------------------------------------------------------


@pytest.fixture
def take(redis: Redis) -> Callable[[int], tuple[bool, int, int]]:
    """`take(per_minute)`: one call of alice's → whether it is allowed, how many are left, seconds to the next."""
    script = redis.register_script(TAKE)

    def once(per_minute: int) -> tuple[bool, int, int]:
        allowed, remaining, next_s = script([RATE], [per_minute])
        return bool(allowed), remaining, next_s

    return once


@pytest.mark.parametrize("quota", [1, 2, 3, 7, 13, 30])
def test_as_many_calls_as_the_quota_are_allowed_at_once(take: Callable[[int], tuple[bool, int, int]], quota: int) -> None:
    answers = [take(quota) for _ in range(quota + 3)]  # within less than 60/30 s
    assert answers == [(i < quota, max(quota - 1 - i, 0), -(-60 // quota)) for i in range(quota + 3)]


def test_one_call_comes_back_after_a_minute_divided_by_the_quota(take: Callable[[int], tuple[bool, int, int]], redis: Redis) -> None:
    while take(6)[0]:
        pass
    redis.decrby(RATE, 10_000_000)  # as if 10 s had passed
    assert [take(6)[0] for _ in range(3)] == [True, False, False]
    redis.decrby(RATE, 25_000_000)
    assert [take(6)[:2] for _ in range(3)] == [(True, 1), (True, 0), (False, 0)]


def test_after_a_minute_all_is_forgotten(take: Callable[[int], tuple[bool, int, int]], redis: Redis) -> None:
    take(6)
    assert 9_000 < redis.pttl(RATE) <= 10_000
    while take(6)[0]:
        pass
    assert 55_000 < redis.pttl(RATE) <= 60_000


def test_a_clock_that_was_put_back_locks_nobody_out(take: Callable[[int], tuple[bool, int, int]], redis: Redis) -> None:
    redis.set(RATE, int((time.time() + 3600) * 1e6))
    assert take(60) == (False, 0, 1)


def test_the_largest_quota_counts_too(take: Callable[[int], tuple[bool, int, int]]) -> None:
    assert take(1_000_000) == (True, 999_999, 1)


def test_calls_are_counted_also_where_memory_has_run_out(take: Callable[[int], tuple[bool, int, int]], redis: Redis) -> None:
    redis.config_set("maxmemory", 1)
    try:
        assert take(5)[:2] == (True, 4)
    finally:
        redis.config_set("maxmemory", 0)


# --- over HTTP ---------------------------------------------------------------------------------------------------------


def test_a_call_too_many_is_429_with_the_time_to_come_back(open_client: Open, key_file: Path, bearer: Bearer) -> None:
    headers = bearer(per_minute=3)
    with open_client(api_keys_file=key_file) as client:
        assert [standing(client.get("/models", headers=headers)) for _ in range(3)] == [(3, 2, 20), (3, 1, 20), (3, 0, 20)]
        answer = client.get("/models", headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (429, "application/problem+json")
        document = answer.json()
        assert (document["title"], document["status"], document["instance"]) == ("Too many requests", 429, "/models")
        assert "alice may make 3 calls a minute" in document["detail"]
        quota, left, next_s = standing(answer)
        assert (quota, left) == (3, 0) and answer.headers["retry-after"] == str(next_s) and 15 < next_s <= 20


def test_every_answer_of_a_limited_key_tells_where_it_stands(open_client: Open, key_file: Path, bearer: Bearer) -> None:
    headers, trainer = bearer(per_minute=100), bearer("trainer", scope="train", per_minute=100)
    with open_client(api_keys_file=key_file) as client:
        submitted = client.post("/generate", json={"class_label": 0}, headers=headers)
        answers = [
            submitted,
            client.post("/generate", json={}, headers=headers),
            client.post("/generate", content=b" " * 70_000, headers=headers),
            client.get("/generate", headers=headers),
            client.get("/nothing", headers=headers),
            client.delete(f"/jobs/{submitted.json()['id']}", headers=headers),
            client.get(f"/jobs/{submitted.json()['id']}/events", headers=headers),
        ]
        assert [answer.status_code for answer in answers] == [202, 422, 413, 405, 404, 200, 200]
        assert [standing(answer)[1] for answer in answers] == list(range(99, 92, -1))
        other = client.get("/models", headers=trainer)
        assert (other.status_code, standing(other)[1]) == (403, 99)


def test_without_a_limit_nothing_is_told_and_nothing_counted(open_client: Open, key_file: Path, bearer: Bearer, redis: Redis) -> None:
    unlimited, limited = bearer(), bearer("bob", per_minute=5)
    with open_client(api_keys_file=key_file) as client, open_client() as open_to_all:
        answers = [
            client.get("/models", headers=unlimited),
            client.get("/models"),
            *(client.get(path, headers=limited) for path in ("/", "/healthz", "/readyz", "/openapi.json", "/static/page.js")),
            open_to_all.get("/models"),
        ]
        assert not any(name.startswith("ratelimit") for answer in answers for name in answer.headers)
        assert redis.keys("dit:rate:*") == []


def test_each_key_has_a_rate_of_its_own(open_client: Open, key_file: Path, bearer: Bearer) -> None:
    alice, bob = bearer("alice", per_minute=1), bearer("bob", per_minute=1)
    with open_client(api_keys_file=key_file) as client:
        assert [client.get("/models", headers=headers).status_code for headers in (alice, alice, bob, bob)] == [200, 429, 200, 429]


def test_calls_at_once_to_several_apis_never_exceed_the_limit(
    on_port: Callable[..., AbstractContextManager[int]], key_file: Path, bearer: Bearer
) -> None:
    headers, quota, began = bearer(per_minute=10), 10, time.monotonic()

    def call(port: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", "/models", headers=headers)
            return connection.getresponse().status
        finally:
            connection.close()

    with on_port(api_keys_file=key_file) as first, on_port(api_keys_file=key_file) as second, ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(call, [first, second] * 40))
    assert set(statuses) == {200, 429}
    assert quota <= statuses.count(200) <= quota + (time.monotonic() - began) * quota / 60
