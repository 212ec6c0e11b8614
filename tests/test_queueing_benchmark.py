"""The simulation of benchmarks/queueing.py, and what benchmarks/redis_load.py reads out of MONITOR; both are scripts and in no package."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from worker import scripts

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def fleet() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("_fleet")


@pytest.fixture(scope="module")
def queueing(fleet: ModuleType) -> ModuleType:
    return importlib.import_module("queueing")


@pytest.fixture(scope="module")
def replay(fleet: ModuleType) -> ModuleType:
    return importlib.import_module("_replay")


@pytest.fixture(scope="module")
def reality(fleet: ModuleType) -> ModuleType:
    return importlib.import_module("_reality")


@pytest.fixture
def curve(fleet: ModuleType) -> Any:
    """A tick takes 10 ms up to 4 rows and 15 ms up to 8; a decode of up to 4 pictures 5 ms."""
    return fleet.Curve("device", "command", 8, 32, {4: 0.010, 8: 0.015}, {2: 0.005, 4: 0.005})


def asked(fleet: ModuleType, at: float = 0.0, pictures: int = 1, steps: int = 10, guided: bool = True) -> Any:
    return fleet.Asked(at, pictures, (guided,) * steps)


def ends(fleet: ModuleType, curve: Any, workers: int, jobs: list[Any]) -> list[float]:
    """Of each job, in the order of their arrival."""
    found = {id(job): end for job, end in fleet.Fleet(curve, workers).run(jobs)}
    assert len(found) == len(jobs), "each ends once"
    return [found[id(job)] for job in jobs]


def test_a_lone_job_takes_its_rounds_and_one_decode(fleet: ModuleType, curve: Any) -> None:
    (end,) = ends(fleet, curve, 1, [asked(fleet, at=1.0)])
    assert end == pytest.approx(1 + fleet.SUBMIT_S + fleet.RING_S + fleet.START_S + 10 * 0.010 + 0.005 + fleet.ENCODE_S)


def test_jobs_that_fit_step_together_and_those_that_do_not_take_turns(fleet: ModuleType, curve: Any) -> None:
    alone = ends(fleet, curve, 1, [asked(fleet)])[0]
    two = ends(fleet, curve, 1, [asked(fleet), asked(fleet)])  # 4 rows
    four = ends(fleet, curve, 1, [asked(fleet) for _ in range(4)])  # 8 rows
    eight = ends(fleet, curve, 1, [asked(fleet) for _ in range(8)])
    assert max(two) == pytest.approx(alone)
    assert max(four) == pytest.approx(alone + 10 * 0.005)
    assert max(eight) > 1.9 * max(four) - 0.01


def test_a_second_worker_takes_what_the_first_has_no_room_for(fleet: ModuleType, curve: Any) -> None:
    jobs = [asked(fleet, at=0.001 * number) for number in range(8)]
    assert max(ends(fleet, curve, 2, jobs)) < 0.6 * max(ends(fleet, curve, 1, jobs))


def test_an_unguided_picture_takes_one_row(fleet: ModuleType, curve: Any) -> None:
    plain = [asked(fleet, pictures=4, guided=False)]
    assert ends(fleet, curve, 1, plain)[0] < ends(fleet, curve, 1, [asked(fleet, pictures=4)])[0]
    assert plain[0].work == 40 and asked(fleet, pictures=4).work == 80


def test_a_device_twice_as_fast_does_twice_the_pictures(fleet: ModuleType, queueing: ModuleType, curve: Any) -> None:
    mix = queueing.Mix(queueing.BUNDLED, 0)
    slow, fast = (fleet.pace(one, mix.waiting)["pictures_per_s"] for one in (curve, curve.faster(2)))
    assert fast == pytest.approx(2 * slow, rel=0.02)


def test_the_mix_is_guided_as_a_worker_plans_it(queueing: ModuleType) -> None:
    jobs = queueing.Mix(queueing.BUNDLED, 0).poisson(2000, jobs_per_s=10.0, turn=1)
    assert jobs[-1].at == pytest.approx(200, rel=0.1)
    assert {job.pictures for job in jobs} == {1, 2, 3, 4}
    assert min(len(job.guided) for job in jobs) >= 10 and sum(all(job.guided) for job in jobs) > 1980, "a scale of 1.00 is rare"


def test_more_workers_bear_more_each(queueing: ModuleType, curve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queueing, "COUNTED", 300)
    search = queueing.Search(curve, queueing.Mix(queueing.BUNDLED, 0))
    rows = queueing.table(search, [3.0], [1, 4])
    one, four = (row["load"]["3"] for row in rows)
    assert 0 < one < four
    assert search.p95(4, round(four / queueing.GRID)) <= 3 < search.p95(4, round(four / queueing.GRID) + 1)


def test_workers_for_a_rate_lie_between_those_that_were_simulated(queueing: ModuleType) -> None:
    rows = [{"workers": 1, "load": {"2": 0.0}}, {"workers": 4, "load": {"2": 0.5}}, {"workers": 16, "load": {"2": 0.75}}]
    assert [queueing.needed(rows, rate, "2") for rate in (0.5, 2.0, 12.0, 12.1)] == [4, 4, 16, None]
    assert queueing.needed(rows, 5.0, "2") == 8, "8 lies half way, and bears 8 x 0.625"


def test_jobs_alone_know_no_waiting(queueing: ModuleType, fleet: ModuleType, curve: Any) -> None:
    mix = queueing.Mix(queueing.BUNDLED, 0)
    longest = max(len(job.guided) for job in mix.waiting(2000)) * 0.015 + 0.02
    told = queueing.alone(curve, mix)
    assert 10 * 0.010 < told["p50"] < told["p95"] < longest


def test_a_trace_says_how_sizes_compare_and_how_fast_the_worker_was(reality: ModuleType) -> None:
    def rounds(since: float, times: float) -> list[dict[str, Any]]:
        """Ten of 4 rows, ten of 8, and ten that decode two pictures besides; a millisecond lies between each two."""
        found, t = [], since
        for bucket, decoded, seconds in [(4, 0, 0.010), (8, 0, 0.015), (8, 2, 0.020)] * 10:
            found.append({"t": t, "seconds": seconds * times, "rows": bucket, "bucket": bucket, "decoded": decoded})
            t += (seconds + 0.001) * times
        return found

    quiet, crowded = rounds(0.0, 1.0), rounds(10.0, 2.0)
    curve = reality.curve_of(quiet, max_rows=8)
    assert curve.step_s == pytest.approx({4: 0.010, 8: 0.015}) and curve.decode_s == pytest.approx({2: 0.005})
    assert curve.between_s == pytest.approx(0.001)
    assert reality.slower(curve, quiet) == pytest.approx(1) and reality.slower(curve, crowded) == pytest.approx(2)


def test_a_curve_is_read_back_and_what_is_none_is_refused(fleet: ModuleType, curve: Any, tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    told = {"device": "device", "command": "command", "max_rows": 8, "slots": 32, "step_s": curve.step_s, "decode_s": curve.decode_s}
    path.write_text(json.dumps(told))
    assert fleet.Curve.read(path) == curve
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"is no curve as benchmarks/curve\.py writes it"):
        fleet.Curve.read(path)
    with pytest.raises(ValueError, match="ends at 8 rows, and a forward may have 16"):
        replace(curve, max_rows=16)
    with pytest.raises(ValueError, match="all above 0"):
        replace(curve, step_s={8: 0.0})


def test_the_curve_of_this_machine_is_there(fleet: ModuleType, queueing: ModuleType) -> None:
    assert fleet.Curve.read(queueing.DEFAULT_CURVE).max_rows >= 4


def test_a_line_of_monitor_is_the_command_that_was_sent(replay: ModuleType) -> None:
    line = r'1700000000.123456 [0 127.0.0.1:40000] "SET" "a \"key\"" "\x89PNG\r\n\\"'
    assert replay.told(line) == ("127.0.0.1:40000", [b"SET", b'a "key"', b"\x89PNG\r\n\\"])
    assert replay.told("OK") == ("", [])


def test_of_a_job_its_own_commands_stay_with_transactions_whole(replay: ModuleType) -> None:
    take, beat = replay._TAKE.decode(), replay._BEAT.decode()
    lines = [
        '1.0 [0 a] "SMEMBERS" "dit:models"',
        '1.0 [0 a] "MGET" "dit:model:m"',
        f'1.0 [0 w] "EVALSHA" "{take}" "idle"',
        '1.1 [0 a] "EVALSHA" "submit" "job-1"',
        '1.1 [0 lua] "HSET" "dit:job:job-1"',
        f'1.2 [0 w] "EVALSHA" "{take}" "idle"',
        '1.3 [0 w] "MULTI"',
        '1.3 [0 other] "GET" "unrelated"',
        '1.3 [0 w] "HSET" "rq:job:job-1" "status"',
        '1.3 [0 w] "EXEC"',
        '1.4 [0 w] "EVAL" "' + scripts.PROGRESS.replace("\n", "\\n").replace('"', '\\"') + '" "dit:job:job-1"',
        f'1.5 [0 h] "EVALSHA" "{beat}" "job-1"',
    ]
    kept = replay.of_job(lines, b"job-1")
    told = ([["SMEMBERS", "dit:models"]], [["MGET", "dit:model:m"]], [["EVALSHA", "submit", "job-1"]], [["EVALSHA", take, "idle"]])
    assert kept == [*map(replay.encoded, told), replay.encoded([["MULTI"], ["HSET", "rq:job:job-1", "status"], ["EXEC"]])]
