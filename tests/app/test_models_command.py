"""`dit models`: what it lists, and what it refuses to remove while somebody may need it."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app.cli import app
from app.embedded import EmbeddedServer
from app.usage import Usage, UsageUnknown, checkpoints_in_use, checkpoints_served, find_usage
from model.checkpoint import load
from model.registry import publish, versions
from worker import protocol
from worker.protocol import ModelRecord

NO_REDIS = "redis://127.0.0.1:1/0"  # nothing listens there


def dit(*arguments: object, code: int = 0) -> str:
    """What `dit models …` prints: to stdout where it succeeds, to stderr where it fails."""
    result = CliRunner().invoke(app, ["models", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def refused(*arguments: object) -> str:
    line = dit(*arguments, code=1)
    assert line.startswith("dit: ") and line.count("\n") == 1, line
    return line


def listed(*arguments: object) -> list[dict[str, Any]]:
    return json.loads(dit(*arguments, "--json"))


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, with no Redis to ask."""
    for name in [name for name in os.environ if name.startswith("DIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkpoints"


@pytest.fixture
def with_redis(server: EmbeddedServer, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Redis:
    monkeypatch.setenv("DIT_REDIS_URL", server.url)
    return redis


@pytest.fixture
def hashes(registry: Path, make_checkpoint: Callable[..., Path]) -> list[str]:
    """Of three versions of `tiny`, in the order in which they were published."""
    return [publish(registry, "tiny", make_checkpoint(registry.parent / "runs", name=f"run-{seed}", seed=seed)) for seed in range(3)]


@pytest.fixture
def pin(client: TestClient, serve: Callable[..., ModelRecord], submit: Callable[..., str]) -> Callable[..., str]:
    """`pin(checkpoint, count=1)`: queue jobs while a worker serves this checkpoint, as it does afterwards."""

    def queue(checkpoint: str, count: int = 1) -> str:
        serve(checkpoint=checkpoint)
        return [submit() for _ in range(count)][-1]

    return queue


def latest(registry: Path) -> str:
    return load(registry / "tiny").hash


# --- list --------------------------------------------------------------------------------------------------------------


def test_every_version_is_listed_with_who_needs_it(
    registry: Path, hashes: list[str], with_redis: Redis, pin: Callable[..., str], make_checkpoint: Callable[..., Path]
) -> None:
    make_checkpoint(registry, name="plain", seed=7)
    first, second, third = hashes
    pin(first, count=2)
    pin(second)
    rows = listed()
    assert rows == listed("list")
    assert [(r["model"], r["latest"]) for r in rows] == [("plain", True), ("tiny", True), ("tiny", False), ("tiny", False)]
    assert [(r["hash"], r["version"], r["served"], r["jobs"]) for r in rows[1:]] == [
        (third, third[:12], False, 0),
        (second, second[:12], True, 1),
        (first, first[:12], False, 2),
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", r["published_at"]) and r["error"] is None for r in rows)
    assert [r["size_bytes"] for r in rows[1:]] == [version.size_bytes for version in versions(registry / "tiny")]


def test_the_table_says_the_same(hashes: list[str], with_redis: Redis, pin: Callable[..., str]) -> None:
    pin(hashes[2], count=1)
    header, first, second, third = dit().splitlines()
    assert header.split() == ["model", "version", "latest", "published_at", "size_bytes", "served", "jobs", "error"]
    assert first.split()[:3] == ["tiny", hashes[2][:12], "yes"] and first.split()[-2:] == ["yes", "1"]
    assert second.split()[:2] == ["tiny", hashes[1][:12]] and second.split()[-1] == third.split()[-1] == "0"


@pytest.mark.parametrize("url", [None, NO_REDIS, "nonsense"])
def test_without_redis_it_is_listed_what_there_is_and_said_what_is_unknown(
    hashes: list[str], monkeypatch: pytest.MonkeyPatch, url: str | None
) -> None:
    if url:
        monkeypatch.setenv("DIT_REDIS_URL", url)
    rows = listed()
    assert [row["hash"] for row in rows] == hashes[::-1] and {(row["served"], row["jobs"]) for row in rows} == {(None, None)}
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0 and result.stdout.splitlines()[1].split()[-2:] == ["?", "?"]
    why = "Redis does not answer" if url else "DIT_REDIS_URL is not set, and no `dit up` runs"
    assert result.stderr.startswith(f"dit: what is served and waited for is unknown: {why}")


def test_an_empty_registry_is_listed_as_that(registry: Path) -> None:
    assert dit() == f"no model in {registry}\n" and listed() == []


def test_broken_versions_are_listed_with_what_is_wrong(registry: Path, hashes: list[str]) -> None:
    (registry / "tiny" / hashes[0][:12] / "checkpoint.json").write_text("{}")
    weights = registry / "tiny" / hashes[1][:12] / "dit.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    unreadable, damaged, sound = (identity[:12] for identity in hashes)
    quick, thorough = ({row["version"]: row for row in listed("list", *option)} for option in ([], ["--verify"]))
    assert quick[unreadable]["hash"] is None and "checkpoint.json cannot be read" in quick[unreadable]["error"]
    assert quick[damaged]["error"] is quick[sound]["error"] is thorough[sound]["error"] is None
    changed = f"{weights.relative_to(registry.parent)} was changed after it was written: its sha256 does not fit"
    assert (thorough[damaged]["error"], thorough[unreadable]) == (changed, quick[unreadable])
    assert "cannot be read: its hash is none\n" in dit()


def test_json_before_another_command_is_not_ignored(hashes: list[str]) -> None:
    assert "--json does not go before prune" in refused("--json", "prune", "tiny")
    assert len(listed("list")) == 3


# --- publish and rollback ----------------------------------------------------------------------------------------------


def test_publishing_and_rolling_back_choose_what_is_served(registry: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    folders = [make_checkpoint(tmp_path / "runs", name=str(seed), seed=seed) for seed in range(2)]
    hashes = [load(folder).hash for folder in folders]
    for folder, identity in zip(folders, hashes, strict=True):
        assert dit("publish", folder, "tiny") == f"published {folder} as tiny, version {identity[:12]}\n"
        assert latest(registry) == identity
    assert dit("rollback", "tiny") == f"the latest version of tiny is {hashes[0][:12]}\n"
    assert latest(registry) == hashes[0]
    assert dit("rollback", "tiny", hashes[1][:5]) == f"the latest version of tiny is {hashes[1][:12]}\n"
    assert latest(registry) == hashes[1]


def test_what_cannot_be_done_gives_one_line(registry: Path, hashes: list[str], tmp_path: Path) -> None:
    assert "is not a checkpoint" in refused("publish", tmp_path, "tiny")
    assert "does not start with a dot" in refused("publish", tmp_path / "runs" / "run-0", ".tiny")
    for command in (["rollback", "birds"], ["remove", "birds", "aa"], ["prune", "birds"]):
        assert f"no model 'birds' in {registry}, which has: tiny" in refused(*command)
    assert "stands for 0 versions" in refused("rollback", "tiny", "nothing")
    assert "is the latest version of tiny" in refused("remove", "tiny", hashes[2])
    assert [row["hash"] for row in listed()] == hashes[::-1]


# --- remove and prune --------------------------------------------------------------------------------------------------


def test_a_version_that_nothing_needs_is_removed(registry: Path, hashes: list[str], with_redis: Redis) -> None:
    assert dit("remove", "tiny", hashes[0][:6]) == f"removed version {hashes[0][:12]} of tiny\n"
    assert [version.hash for version in versions(registry / "tiny")] == [hashes[2], hashes[1]]


def test_a_version_stays_until_its_jobs_have_ended(
    hashes: list[str], with_redis: Redis, pin: Callable[..., str], worker: Any, serve: Callable[..., ModelRecord]
) -> None:
    job_id = pin(hashes[0])
    serve(checkpoint=hashes[2])
    assert f"version {hashes[0][:12]} of tiny stays: 1 job waits for it or runs on it" in refused("remove", "tiny", hashes[0])
    worker.take(job_id)
    assert "stays: 1 job" in refused("remove", "tiny", hashes[0], "--force")
    worker.succeed(job_id)
    assert "removed" in dit("remove", "tiny", hashes[0])


def test_a_version_that_a_worker_serves_stays(hashes: list[str], with_redis: Redis, serve: Callable[..., ModelRecord]) -> None:
    """Also without jobs: the next ones are pinned to it."""
    serve(checkpoint=hashes[0])
    assert f"version {hashes[0][:12]} of tiny stays: a worker serves it" in refused("remove", "tiny", hashes[0])
    with_redis.delete(protocol.model_key("tiny"))
    assert "removed" in dit("remove", "tiny", hashes[0])


def test_pruning_removes_what_nothing_needs_and_says_so(
    registry: Path, hashes: list[str], with_redis: Redis, pin: Callable[..., str], serve: Callable[..., ModelRecord]
) -> None:
    pin(hashes[1], count=3)
    serve(checkpoint=hashes[2])
    expected = [f"kept version {hashes[1][:12]}: 3 jobs wait for it or run on it", f"removed version {hashes[0][:12]}"]
    assert dit("prune", "tiny").splitlines() == expected
    assert [version.hash for version in versions(registry / "tiny")] == [hashes[2], hashes[1]]


@pytest.mark.parametrize(("keep", "left"), [(0, 1), (1, 2), (2, 3), (7, 3)])
def test_pruning_keeps_as_many_as_are_asked_for_besides_the_latest(registry: Path, hashes: list[str], keep: int, left: int) -> None:
    printed = dit("prune", "tiny", "--keep", keep)
    assert [version.hash for version in versions(registry / "tiny")] == hashes[::-1][:left]
    assert printed == ("".join(f"removed version {h[:12]}\n" for h in hashes[::-1][left:]) or "nothing to remove of tiny\n")


def test_a_plain_folder_has_nothing_to_prune(registry: Path, make_checkpoint: Callable[..., Path]) -> None:
    make_checkpoint(registry)
    assert dit("prune", "tiny") == "nothing to remove of tiny\n" and len(listed()) == 1


def test_nothing_is_pruned_while_the_latest_is_broken(registry: Path, hashes: list[str]) -> None:
    """The others are all there is to roll back to."""
    (registry / "tiny" / "latest").write_text("gone")
    assert "nothing is removed: no sound version of tiny is the latest" in refused("prune", "tiny")
    (registry / "tiny" / "latest").unlink()
    assert "nothing is removed" in refused("prune", "tiny")
    assert len(listed()) == 3


@pytest.mark.parametrize("command", [["remove", "tiny", "HASH"], ["prune", "tiny"]])
def test_nothing_is_removed_while_redis_is_away_unless_forced(
    registry: Path, hashes: list[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("DIT_REDIS_URL", NO_REDIS)
    command = [hashes[0] if part == "HASH" else part for part in command]
    assert "nothing is removed while jobs may need it (Redis does not answer" in refused(*command)
    assert len(versions(registry / "tiny")) == 3
    assert f"removed version {hashes[0][:12]}" in dit(*command, "--force")


def test_nothing_is_removed_while_jobs_may_wait_in_the_files_of_dit_up(hashes: list[str], tmp_path: Path) -> None:
    """Its queue outlives it, and is served at the next start."""
    (tmp_path / ".dit" / "valkey").mkdir(parents=True)
    assert "jobs may wait in .dit, whose server does not run" in refused("remove", "tiny", hashes[0])
    assert "removed" in dit("remove", "tiny", hashes[0], "--force")


# --- usage -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """The server of a `dit up` over the default data folder."""
    server = EmbeddedServer(tmp_path / ".dit")
    server.start()
    yield server
    server.stop()


def test_the_server_of_a_running_dit_up_is_asked(hashes: list[str], embedded: EmbeddedServer) -> None:
    with Redis.from_url(embedded.url, protocol=2) as client:
        client.hset("dit:job:1", mapping={"status": "running", "checkpoint": hashes[0]})
    assert [row["jobs"] for row in listed()] == [0, 0, 1]
    embedded.stop()
    assert [row["jobs"] for row in listed()] == [None, None, None]
    assert "whose server does not run" in refused("prune", "tiny")


def test_jobs_that_have_not_ended_are_counted_by_their_checkpoint(redis: Redis) -> None:
    """Among more records than one round trip holds; the streams of events beside them are not records."""
    statuses = ("queued", "running", "canceling", "succeeded", "failed", "canceled")
    with redis.pipeline() as pipeline:
        for number in range(2500):
            pipeline.hset(protocol.job_key(str(number)), mapping={"status": statuses[number % 6], "checkpoint": "ab"[number % 2] * 64})
            pipeline.xadd(protocol.events_key(str(number)), {"event": "queued"})
        pipeline.execute()
    alive = [number for number in range(2500) if number % 6 < 3]
    assert checkpoints_in_use(redis) == {letter * 64: sum(n % 2 == i for n in alive) for i, letter in enumerate("ab")}


def test_what_workers_serve_is_told_by_model_and_checkpoint(redis: Redis, serve: Callable[..., ModelRecord]) -> None:
    assert checkpoints_served(redis) == set()
    serve(id="birds", checkpoint="b" * 64)
    serve(id="fish", checkpoint="f" * 64)
    assert checkpoints_served(redis) == {("birds", "b" * 64), ("fish", "f" * 64)}


def test_a_version_is_needed_by_its_worker_or_its_jobs() -> None:
    usage = Usage(jobs={"a" * 64: 1, "b" * 64: 2}, served={("birds", "b" * 64)})
    assert usage.of("birds", "b" * 64) == "a worker serves it"
    assert usage.of("fish", "b" * 64) == "2 jobs wait for it or run on it"
    assert usage.of("fish", "a" * 64) == "1 job waits for it or runs on it" and usage.of("fish", "c" * 64) is None


def test_where_there_was_never_a_queue_nothing_is_needed(tmp_path: Path) -> None:
    assert find_usage(None, tmp_path) is None
    with pytest.raises(UsageUnknown, match="Redis does not answer"):
        find_usage(NO_REDIS, tmp_path)
