"""Workers on one machine take a GPU each."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker import gpus
from worker.gpus import see_only_ones_own, take_one, visible_gpus


@pytest.fixture(autouse=True)
def let_go(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(gpus, "_held", [])
    yield
    for file in gpus._held:
        file.close()


def test_gpus_are_those_that_cuda_is_told_of_or_those_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus(tmp_path) == []
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus(tmp_path) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    assert visible_gpus(tmp_path) == ["GPU-a", "GPU-b"]


def test_each_takes_one_that_no_other_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [take_one(["0", "1", "2"], tmp_path) for _ in range(3)] == ["0", "1", "2"]
    assert take_one(["0", "1", "2"], tmp_path) is None and "shares the first" in caplog.text


@pytest.mark.parametrize("gpus", [[], ["0"]])
def test_where_there_is_nothing_to_choose_nothing_is_taken(tmp_path: Path, gpus: list[str]) -> None:
    assert take_one(gpus, tmp_path / "folder") is None and not (tmp_path / "folder").exists()


def test_the_one_of_a_worker_that_was_killed_is_free_again(tmp_path: Path) -> None:
    code = "import sys, pathlib, worker.gpus as gpus; print(gpus.take_one('01', pathlib.Path(sys.argv[1])), flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "0\n"
    assert take_one(["0", "1"], tmp_path) == "1"
    other.kill()
    other.communicate()
    assert take_one(["0", "1"], tmp_path) == "0"


def test_cuda_is_told_of_the_one_that_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert take_one(["4", "7"], tmp_path / "gpus") == "4"  # another worker
    see_only_ones_own(tmp_path)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("7", "PCI_BUS_ID")
