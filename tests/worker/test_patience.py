"""Real servers that go away, fill up or lose their disk: a call waits, is sent again, and is given up in the end."""

import copy
import inspect
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    DataError,
    ExecAbortError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from worker import patience
from worker.patience import Patience, impatient_client, is_trouble


@pytest.fixture
def client(mortal: Any) -> Iterator[Redis]:
    with Redis.from_url(mortal.url, protocol=2) as client:
        client.set_retry(Patience(30))
        yield client


@pytest.fixture
def admin(mortal: Any) -> Iterator[Redis]:
    with Redis.from_url(mortal.url, protocol=2) as client:
        yield client


def mended_meanwhile(call: Callable[[], Any], mend: Callable[[], object]) -> Any:
    """What the call gives that begins before, and ends after, this."""
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(call)
        time.sleep(3 * patience._PAUSE_S)
        assert not task.done()
        mend()
        return task.result(60)


def test_a_call_outlasts_a_restart(mortal: Any, client: Redis) -> None:
    client.set("a", "1")
    mortal.kill()
    assert mended_meanwhile(lambda: client.get("a"), mortal.start) == b"1"


def test_a_transaction_outlasts_a_restart_and_happens_once(mortal: Any, client: Redis) -> None:
    mortal.kill()

    def count() -> list[int]:
        with client.pipeline() as pipeline:
            return pipeline.incr("n").incr("n").execute()

    assert mended_meanwhile(count, mortal.start) == [1, 2]


def test_a_script_outlasts_a_restart_that_forgets_it(mortal: Any, client: Redis) -> None:
    script = client.register_script("return redis.call('INCR', KEYS[1])")
    assert script(["n"]) == 1
    mortal.kill()
    assert mended_meanwhile(lambda: script(["n"]), mortal.start) == 2


def test_a_subscription_outlasts_a_restart_that_it_was_caught_in(mortal: Any, client: Redis, admin: Redis) -> None:
    """A worker that was just born when Redis went died of this: redis-py connects again where it only notes the failure."""
    with client.pubsub() as subscription:
        subscription.subscribe("before")
        mortal.kill()
        mended_meanwhile(lambda: subscription.subscribe("after"), mortal.start)
        while admin.pubsub_numsub("before", "after") != [(b"before", 1), (b"after", 1)]:
            time.sleep(0.02)


def test_a_subscription_is_given_up_in_the_end(mortal: Any, client: Redis) -> None:
    client.set_retry(Patience(0.5))
    with client.pubsub() as subscription:
        subscription.subscribe("before")
        mortal.kill()
        with pytest.raises(ConnectionError):
            subscription.subscribe("after")


@pytest.mark.parametrize("way", ["call", "transaction", "pipeline", "script"])
@pytest.mark.parametrize(("setting", "wrong"), [("maxmemory", 1), ("min-replicas-to-write", 1)])
def test_a_call_waits_for_memory_and_for_replicas(client: Redis, admin: Redis, way: str, setting: str, wrong: int) -> None:
    def call() -> Any:
        if way == "call":
            return client.set("a", "1")
        if way == "script":
            return client.register_script("return redis.call('SET', KEYS[1], '1')")(["a"])
        with client.pipeline(transaction=way == "transaction") as pipeline:
            return pipeline.set("a", "1").execute()

    admin.config_set(setting, wrong)
    mended_meanwhile(call, lambda: admin.config_set(setting, 0))
    assert admin.get("a") == b"1"


def test_a_call_waits_for_the_disk(mortal: Any, client: Redis, admin: Redis, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    admin.config_set("dir", str(folder))
    admin.config_set("save", "3600 1")
    shutil.rmtree(folder)
    admin.bgsave()
    while admin.info("persistence")["rdb_last_bgsave_status"] == "ok":
        time.sleep(0.02)

    def mend() -> None:
        folder.mkdir()
        admin.config_set("dir", str(folder))  # the server stands in the folder that is no more
        admin.bgsave()

    assert mended_meanwhile(lambda: client.set("a", "1"), mend)


def test_in_the_end_it_is_given_up(mortal: Any, client: Redis, admin: Redis) -> None:
    client.set_retry(Patience(0.5))
    admin.config_set("maxmemory", 1)
    with pytest.raises(OutOfMemoryError):
        client.set("a", "1")
    mortal.kill()
    with pytest.raises(ConnectionError):
        client.get("a")


def test_a_worker_that_ends_has_less_patience(mortal: Any, client: Redis) -> None:
    patience = Patience(1000)
    client.set_retry(patience)
    patience.until = time.monotonic() + 0.5
    mortal.kill()
    with pytest.raises(ConnectionError):
        client.get("a")


def test_what_can_wait_is_tried_once_and_only_in_that_thread(mortal: Any, client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(1000)
    client.set_retry(patience)
    monkeypatch.setattr("worker.patience._PAUSE_S", 0.05)
    mortal.kill()
    with patience.none(), pytest.raises(ConnectionError):
        client.get("a")
    waits = threading.Thread(target=lambda: client.get("a"))
    with patience.none():
        waits.start()
        waits.join(0.5)
        assert waits.is_alive()
    mortal.start()
    waits.join(60)
    assert not waits.is_alive()


def test_an_impatient_client_of_a_patient_one_is_not_patient(mortal: Any, client: Redis) -> None:
    other = impatient_client(client)
    assert other.ping()
    mortal.kill()
    with pytest.raises(ConnectionError):
        other.ping()


def test_what_is_wrong_is_not_sent_again(client: Redis) -> None:
    client.set("a", "text")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        client.lpush("a", "1")


def test_errors_that_pass_are_told_from_those_that_stay() -> None:
    passing = [ConnectionError(), TimeoutError(), BusyLoadingError(), OutOfMemoryError(), ReadOnlyError(), BrokenPipeError()]
    assert all(is_trouble(error) for error in [*passing, ResponseError("MISCONF Valkey is configured to save RDB snapshots, but …")])
    assert is_trouble(ExecAbortError("Transaction discarded because of: OOM command not allowed when used memory > 'maxmemory'."))
    assert not any(
        is_trouble(error)
        for error in [
            ExecAbortError("Transaction discarded because of previous errors."),
            AuthenticationError(),
            ResponseError("ERR syntax"),
            DataError(),
            ValueError(),
        ]
    )


def test_redis_py_has_the_seam_that_this_stands_on(client: Redis) -> None:
    parameters = list(inspect.signature(Retry.call_with_retry).parameters)
    assert parameters == list(inspect.signature(Patience.call_with_retry).parameters)
    kept = Patience()
    assert copy.deepcopy(kept) is kept, "each connection copies what it is given"
    client.set_retry(kept)
    assert client.connection_pool.get_connection().retry is kept
