"""What a worker's file says of it, and what `dit health worker` makes of that."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError
from rq.worker import WorkerStatus
from typer.testing import CliRunner

from app.cli import app
from worker.pulse import SILENT_S, Pulse, ailment, pulse_path
from worker.rq_worker import DiTWorker


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return pulse_path(tmp_path)


def told(path: Path, **changes: object) -> None:
    now = time.monotonic()
    replace(Pulse(17, ["tiny"], now, now, now, 120.0), **changes).write(path)


def test_a_worker_that_moves_is_heard_and_serves_a_model_is_well(path: Path) -> None:
    told(path)
    assert ailment(path) is None and ailment(path, only_alive=True) is None


def test_without_a_file_or_with_a_damaged_one_it_is_not_well(path: Path) -> None:
    assert "no worker has written" in str(ailment(path))
    path.parent.mkdir()
    for text in ("", "{}", "[1]", '{"pid": 1}'):
        path.write_text(text)
        assert "cannot be read" in str(ailment(path)), text


def test_one_that_says_nothing_or_whose_loop_stands_still_is_not_alive(path: Path) -> None:
    now = time.monotonic()
    for change, message in [
        ({"at": now - SILENT_S - 1}, "has said nothing for 31 s"),
        ({"at": now + 3600}, "has said nothing"),  # left by a worker from before the machine's start
        ({"came_round": now - 121}, "has stood still for 121 s"),
    ]:
        told(path, **change)
        for only_alive in (False, True):
            assert message in str(ailment(path, only_alive=only_alive))


def test_one_that_redis_does_not_hear_or_that_serves_nothing_is_alive_and_not_well(path: Path) -> None:
    for change, message in [
        ({"heard": None}, "Redis has not heard"),
        ({"heard": time.monotonic() - SILENT_S - 1}, "Redis has not heard"),
        ({"models": []}, "serves no model"),
    ]:
        told(path, **change)
        assert message in str(ailment(path)) and ailment(path, only_alive=True) is None


def test_the_command_says_it_with_its_status(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_DATA", str(tmp_path))
    ill = CliRunner().invoke(app, ["health", "worker"])
    assert (ill.exit_code, ill.stderr.startswith("dit: no worker has written")) == (1, True)
    told(path, models=[])
    assert CliRunner().invoke(app, ["health", "worker"]).exit_code == 1
    alive = CliRunner().invoke(app, ["health", "worker", "--alive"])
    assert (alive.exit_code, alive.stdout) == (0, "the worker is well\n")


# What the worker writes.


@pytest.fixture
def beating(worker: DiTWorker, path: Path) -> DiTWorker:
    worker._pulse = path
    worker.heart = worker._new_heart()
    worker.register_birth()
    return worker


def test_each_beat_says_that_redis_has_heard(beating: DiTWorker, path: Path) -> None:
    beating._beat()
    assert ailment(path) is None
    pulse = Pulse(**json.loads(path.read_text()))
    assert (pulse.pid, pulse.models, pulse.may_stand_s) == (beating.pid, ["tiny"], 120.0)


def test_a_beat_that_redis_does_not_hear_says_that_the_worker_is_alive(
    beating: DiTWorker, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(beating, "_renew", away)
    beating.heart.beat()
    assert "Redis has not heard" in str(ailment(path)) and ailment(path, only_alive=True) is None


def test_a_loop_that_stands_still_is_told_while_the_heart_beats(beating: DiTWorker, path: Path) -> None:
    beating.came_round -= 121
    beating._beat()
    assert "has stood still for 121 s" in str(ailment(path))
    beating.set_state(WorkerStatus.SUSPENDED)
    beating._beat()
    assert ailment(path) is None, "who is told to rest does not stand still"


@pytest.mark.usefixtures("in_this_process")
def test_the_loop_comes_round_with_jobs_and_without_and_leaves_no_file(
    worker: DiTWorker, path: Path, jobs: object, make_request: Callable[..., object]
) -> None:
    rounds: list[float] = []
    worker._pulse = path
    jobs.submit(make_request(steps=5))  # type: ignore[attr-defined]
    for tick in range(3):
        worker.engine.before[tick] = lambda: rounds.append(worker.came_round)
    worker.work(burst=True)
    assert len(set(rounds)) == 3 and worker.came_round > rounds[-1]
    assert not path.exists(), "one that has signed off is not there"


def test_a_folder_that_cannot_be_written_costs_the_check_and_nothing_else(
    beating: DiTWorker, path: Path, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.write_text("a file where the folder should be")
    beating._beat()
    assert "cannot be written" in caplog.text and redis.exists("dit:model:tiny")
