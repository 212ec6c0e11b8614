"""Jobs that were given up: listed, and started afresh once."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app.auth import read_keys
from app.cli import app
from app.dead import dead_jobs, requeue
from app.embedded import EmbeddedServer
from app.jobs import new_id
from worker import protocol

REASON = "given up: its worker died 5 times"
QUEUE = protocol.queue_name("tiny")


@pytest.fixture
def bury(worker: Any, redis: Redis) -> Callable[[str], str]:
    """`bury(job_id)`: its workers died too often; as the last of them and rq leave it."""

    def make(job_id: str) -> str:
        redis.lrem(f"rq:queue:{QUEUE}", 0, job_id)
        for attempt in range(protocol.MAX_ATTEMPTS):
            assert worker.results.start(job_id, f"execution-{attempt + 1}") in ("run", "alone")
        assert worker.results.fail(job_id, f"execution-{protocol.MAX_ATTEMPTS}", REASON, dead=True)
        queue = Queue(QUEUE, connection=redis, serializer=JSONSerializer)
        job = Job.fetch(job_id, connection=redis, serializer=JSONSerializer)
        job.retries_left = 0
        queue.failed_job_registry.add(job, ttl=job.failure_ttl, exc_string=REASON)
        return job_id

    return make


@pytest.fixture
def die(submit: Callable[..., str], bury: Callable[[str], str]) -> Callable[..., str]:
    """`die(**request)`: such a job."""
    return lambda **request: bury(submit(**request))


def waiting(redis: Redis) -> list[str]:
    return [job_id.decode() for job_id in redis.lrange(f"rq:queue:{QUEUE}", 0, -1)]


def record(redis: Redis, job_id: str) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in redis.hgetall(protocol.job_key(job_id)).items()}


def rq_record(redis: Redis, job_id: str) -> dict[bytes, bytes]:
    """Without what tells the time."""
    return {name: value for name, value in redis.hgetall(f"rq:job:{job_id}").items() if name not in (b"created_at", b"enqueued_at")}


# --- the list ----------------------------------------------------------------------------------------------------------


def test_jobs_that_were_given_up_are_listed_the_newest_first(redis: Redis, die: Callable[..., str]) -> None:
    before = time.time()
    first, second = die(class_label=[0, None, 2]), die(class_label="truck")
    newest, older = dead_jobs(redis)
    assert (newest.id, newest.model, newest.class_labels, newest.attempts, newest.error) == (second, "tiny", [3], 5, REASON)
    assert (older.id, older.class_labels) == (first, [0, None, 2]) and before <= older.ended_at <= newest.ended_at <= time.time()


def test_jobs_whose_record_has_expired_are_forgotten(redis: Redis, die: Callable[..., str]) -> None:
    expired, kept = die(), die()
    redis.delete(protocol.job_key(expired))
    assert [job.id for job in dead_jobs(redis)] == [kept]
    assert [member.decode() for member in redis.zrange(protocol.DEAD_KEY, 0, -1)] == [kept]


def test_no_dead_job_is_an_empty_list(redis: Redis) -> None:
    assert dead_jobs(redis) == []


# --- the way back ------------------------------------------------------------------------------------------------------


def test_a_requeued_job_is_as_one_just_submitted(
    redis: Redis, client: TestClient, die: Callable[..., str], submit: Callable[..., str]
) -> None:
    job_id, fresh = die(seed=7), submit(seed=7)
    dead = record(redis, job_id)
    requeue(redis, job_id)
    again, new = record(redis, job_id), record(redis, fresh)
    own = {name: dead[name] for name in ("created_at", "request_id")}
    assert again == {**new, **own, "attempts": "0", "step": "0"}
    assert client.get(f"/jobs/{job_id}").json().items() >= {"status": "queued", "error": None, "finished_at": None, "images": []}.items()
    assert rq_record(redis, job_id) == rq_record(redis, fresh)
    assert waiting(redis) == [fresh, job_id] and dead_jobs(redis) == []
    assert redis.llen(protocol.bell_key("tiny")) > 0 and 0 < redis.ttl(protocol.bell_key("tiny")) <= protocol.BELL_TTL_S
    keys = (protocol.job_key(job_id), protocol.events_key(job_id), f"rq:job:{job_id}")
    assert [redis.ttl(key) for key in keys] == [-1, -1, -1]
    assert Queue(QUEUE, connection=redis, serializer=JSONSerializer).failed_job_registry.get_job_ids(cleanup=False) == []


def test_a_requeued_job_is_leased_and_ends(redis: Redis, client: TestClient, die: Callable[..., str], worker: Any) -> None:
    job_id = die()
    requeue(redis, job_id)
    found = Queue.dequeue_any(
        [Queue(QUEUE, connection=redis, serializer=JSONSerializer)], None, connection=redis, serializer=JSONSerializer
    )
    assert found and (found[0].id, found[0].func_name) == (job_id, protocol.OPERATION)
    worker.take(job_id)
    assert record(redis, job_id)["attempts"] == "1"
    worker.succeed(job_id)
    assert client.get(f"/jobs/{job_id}").json()["status"] == "succeeded"
    assert redis.ttl(protocol.job_key(job_id)) > 0 and redis.ttl(protocol.events_key(job_id)) > 0


def test_events_go_on_after_the_end_that_was_none(redis: Redis, client: TestClient, die: Callable[..., str], worker: Any) -> None:
    """A reader stops at the first `done`, so there is but one, whether it reads from the beginning or from where it was."""
    job_id = die()
    last_seen = redis.xrevrange(protocol.events_key(job_id), count=1)[0][0].decode()
    requeue(redis, job_id)
    worker.succeed(worker.take())
    since = ["queued", "progress", "image", "done"]
    before = ["queued", *["progress"] * protocol.MAX_ATTEMPTS]
    for headers, expected in (({}, before + since), ({"Last-Event-ID": last_seen}, since)):
        lines = client.get(f"/jobs/{job_id}/events", headers=headers).text.splitlines()
        assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")] == expected
        assert 'data: {"status": "succeeded"}' in lines


def test_a_requeued_job_can_die_and_be_requeued_again(redis: Redis, die: Callable[..., str], worker: Any) -> None:
    job_id = die()
    for _ in range(2):
        requeue(redis, job_id)
        assert worker.results.fail(worker.take(), "execution-1", REASON, dead=True)
        assert [job.id for job in dead_jobs(redis)] == [job_id]
    names = [fields[b"event"].decode() for _, fields in redis.xrange(protocol.events_key(job_id))]
    assert [name for name in names if name != "progress"] == ["queued", "queued", "queued", "done"]


def test_many_who_requeue_a_job_at_once_queue_it_once(server: EmbeddedServer, redis: Redis, die: Callable[..., str]) -> None:
    job_id = die()

    def attempt(_: int) -> str:
        with Redis.from_url(server.url, protocol=2) as client:
            try:
                requeue(client, job_id)
                return "queued"
            except ValueError as error:
                return str(error)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(attempt, range(16)))
    assert sorted(answers) == [f"job {job_id} is queued, and not among the dead"] * 15 + ["queued"]
    assert waiting(redis) == [job_id]
    assert [fields[b"event"] for _, fields in redis.xrange(protocol.events_key(job_id))].count(b"queued") == 2


def test_a_job_that_expires_meanwhile_is_not_queued(redis: Redis, die: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at its record and the transaction."""
    job_id, create = die(), Job.create

    def meanwhile(*arguments: Any, **options: Any) -> Job:
        redis.delete(protocol.job_key(job_id))
        return create(*arguments, **options)

    monkeypatch.setattr(Job, "create", meanwhile)
    with pytest.raises(ValueError, match="has expired"):
        requeue(redis, job_id)
    assert waiting(redis) == [] and not redis.exists(protocol.job_key(job_id))


def test_a_job_that_is_not_dead_is_refused(redis: Redis, client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    job_id = submit()
    before = record(redis, job_id)
    with pytest.raises(ValueError, match=f"job {job_id} is queued, and not among the dead"):
        requeue(redis, job_id)
    assert (record(redis, job_id), waiting(redis)) == (before, [job_id])
    worker.fail(worker.take(), "its pictures left the finite numbers")
    with pytest.raises(ValueError, match="is failed, and not among the dead"):
        requeue(redis, job_id)
    assert waiting(redis) == []


def test_an_expired_or_unknown_job_is_refused(redis: Redis, die: Callable[..., str]) -> None:
    job_id = die()
    redis.delete(protocol.job_key(job_id))
    for unknown in (job_id, new_id(), "nonsense"):
        with pytest.raises(ValueError, match=f"there is no job '{unknown}', or its record has expired; submit it again"):
            requeue(redis, unknown)
    assert waiting(redis) == []


@pytest.mark.parametrize("field", ["request", "result_ttl_s"])
def test_a_damaged_record_is_listed_and_not_requeued(redis: Redis, die: Callable[..., str], field: str) -> None:
    job_id, sound = die(), die(class_label=3)
    redis.hdel(protocol.job_key(job_id), field)
    redis.hset(protocol.job_key(job_id), "attempts", "\udcff".encode(errors="surrogateescape"))
    if field == "request":
        redis.hset(protocol.job_key(job_id), "request", b"\xff{")
    listed = {job.id: job for job in dead_jobs(redis)}
    assert (listed[job_id].attempts, listed[job_id].error, listed[sound].class_labels) == (0, REASON, [3])
    with pytest.raises(ValueError):
        requeue(redis, job_id)
    assert waiting(redis) == []


# --- bounds ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def post(open_client: Callable[..., Any], key_file: Path, bearer: Callable[..., dict[str, str]]) -> Iterator[Callable[[], Any]]:
    """`post()`: a job of a key that may have two in flight, where three may wait."""
    headers = bearer("alice", in_flight=2)
    with open_client(api_keys_file=key_file, queue_limit=3) as client:
        yield lambda: client.post("/generate", json={"class_label": 0}, headers=headers)


def kind(answer: Any) -> str:
    return str(answer.json().get("type", "")).rpartition(":")[2]


def test_a_requeued_job_is_one_in_flight_again(
    redis: Redis, post: Callable[[], Any], bury: Callable[[str], str], key_file: Path, worker: Any
) -> None:
    dead = bury(post().json()["id"])
    others = [post().json()["id"] for _ in range(2)]  # the books of those in flight have forgotten the dead one
    (entry,) = read_keys(key_file)
    assert {job.owner for job in dead_jobs(redis)} == {entry.id}
    requeue(redis, dead)  # over the bound, and not refused: it was accepted once
    worker.succeed(worker.take(others[0]))
    assert kind(post()) == "too-many-jobs", "two are left: the requeued one, and one that waits"
    worker.succeed(worker.take(dead))
    assert post().status_code == 202
    in_flight = {job_id.decode() for job_id in redis.smembers(protocol.active_key(entry.id))}
    assert len(in_flight) == 2 and others[1] in in_flight


def test_a_full_queue_takes_it_and_then_counts_it(redis: Redis, die: Callable[..., str], open_client: Callable[..., Any]) -> None:
    dead = [die(), die()]
    with open_client(queue_limit=1) as client:
        for job_id in dead:
            requeue(redis, job_id)
        assert waiting(redis) == dead
        assert kind(client.post("/generate", json={"class_label": 0})) == "queue-full"


def test_requeued_or_not_the_room_for_its_pictures_is_kept_once_and_given_back(
    redis: Redis, bury: Callable[[str], str], submit: Callable[..., str]
) -> None:
    job_id = bury(submit())
    kept = int(redis.get(protocol.BYTES_KEY) or 0)
    for _ in range(2):
        requeue(redis, job_id)
        bury(job_id)
    assert int(redis.get(protocol.BYTES_KEY) or 0) == kept > 0 and redis.zcard(protocol.BOOKS_KEY) == 1
    redis.delete(protocol.job_key(job_id))
    redis.zadd(protocol.BOOKS_KEY, dict.fromkeys(redis.zrange(protocol.BOOKS_KEY, 0, -1), 0))  # its time has come
    submit()
    assert int(redis.get(protocol.BYTES_KEY) or 0) == kept and redis.zcard(protocol.BOOKS_KEY) == 1, "of the new job"


# --- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def dit(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """`dit("dead", …)`: as `dit jobs dead …` is typed."""
    monkeypatch.setenv("DIT_REDIS_URL", server.url)
    return lambda *arguments: CliRunner().invoke(app, ["jobs", *arguments])


def test_the_command_lists_them(dit: Callable[..., Result], redis: Redis, die: Callable[..., str]) -> None:
    assert dit("dead").stdout == "no job was given up\n" and json.loads(dit("dead", "--json").stdout) == []
    job_id = die(class_label=2)
    (entry,) = json.loads(dit("dead", "--json").stdout)
    assert entry.pop("ended_at").startswith("20")
    assert entry == {"id": job_id, "owner": "", "model": "tiny", "class_labels": [2], "attempts": 5, "error": REASON}
    header, line = dit("dead").stdout.splitlines()
    assert header.split() == ["id", "owner", "model", "class_labels", "attempts", "ended_at", "error"]
    assert line.split()[:4] == [job_id, "tiny", "[2]", "5"] and line.endswith(REASON)


def test_the_command_requeues_those_that_are_named(dit: Callable[..., Result], redis: Redis, die: Callable[..., str]) -> None:
    first, second, third = (die() for _ in range(3))
    result = dit("requeue", first, third)
    assert (result.exit_code, result.stdout) == (0, f"job {first} waits again\njob {third} waits again\n")
    assert waiting(redis) == [first, third] and [job.id for job in dead_jobs(redis)] == [second]


def test_the_command_requeues_all(dit: Callable[..., Result], redis: Redis, die: Callable[..., str]) -> None:
    ids = {die() for _ in range(3)}
    assert dit("requeue", "--all").exit_code == 0
    assert set(waiting(redis)) == ids and dead_jobs(redis) == []
    assert (dit("requeue", "--all").exit_code, dit("requeue", "--all").stdout) == (0, "")


def test_one_that_cannot_be_requeued_does_not_stop_the_others(dit: Callable[..., Result], redis: Redis, die: Callable[..., str]) -> None:
    job_id, unknown = die(), new_id()
    result = dit("requeue", unknown, job_id)
    assert result.exit_code == 1 and waiting(redis) == [job_id]
    assert result.stderr == f"dit: there is no job '{unknown}', or its record has expired; submit it again\n"


@pytest.mark.parametrize("arguments", [[], ["--all", "x"]])
def test_either_ids_or_all_are_asked_for(dit: Callable[..., Result], arguments: list[str]) -> None:
    result = dit("requeue", *arguments)
    assert result.exit_code == 1 and "name the jobs that shall start afresh, or say --all" in result.stderr


@pytest.mark.parametrize(
    ("url", "message", "code"),
    [
        ("redis://127.0.0.1:1/0", "Redis does not answer: ", 1),
        ("nonsense", "DIT_REDIS_URL: Redis URL must specify", 78),
        (None, "there is no Redis to ask: DIT_REDIS_URL is not set, and no `dit up` runs over", 1),
    ],
)
@pytest.mark.parametrize("command", [["dead"], ["requeue", "--all"]])
def test_without_redis_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, command: list[str], url: str | None, message: str, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIT_REDIS_URL", raising=False)
    monkeypatch.setenv("DIT_DATA", str(tmp_path))
    if url:
        monkeypatch.setenv("DIT_REDIS_URL", url)
    result = CliRunner().invoke(app, ["jobs", *command])
    assert result.exit_code == code and result.stderr.startswith(f"dit: {message}") and result.stderr.count("\n") == 1
