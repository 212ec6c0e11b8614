"""`dit up --model` on a folder for DiTPipeline: imported, served, and stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from model.checkpoint import Checkpoint
from model.export import export_diffusers

START_TIMEOUT_S = 240.0


@pytest.fixture
def exported(build_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> Path:
    export_diffusers(build_checkpoint("diffusion", image_channels=3, frequency_shift=1), tmp_path / "exported")
    return tmp_path / "exported"


def environment(folder: Path, port: int) -> dict[str, str]:
    shell = {name: value for name, value in os.environ.items() if not name.startswith("DIT_")}
    ours = {"DIT_DATA": str(folder / "data"), "DIT_PORT": str(port), "DIT_COMPILE": "false", "DIT_MAX_ROWS": "8", "OMP_NUM_THREADS": "1"}
    return {**shell, **ours}


def picture(port: int) -> bytes:
    body = json.dumps({"class_label": "house cat", "steps": 4, "seed": 7}).encode()
    headers = {"Prefer": "wait=60", "Accept": "image/png", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", body, headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=90) as answer:
        return bytes(answer.read())


def test_a_diffusers_folder_is_served_directly(tmp_path: Path, exported: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "app.cli", "up", "--model", str(exported)]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            command, env=environment(tmp_path, port), cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while f"ready: http://127.0.0.1:{port}" not in (tmp_path / "out").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.1)
        assert picture(port).startswith(b"\x89PNG")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.terminate()  # it stops its children, which have groups of their own
            process.wait(60)
    said = (tmp_path / "out").read_text()
    assert f"dit: importing {exported}" in said and "divided by 127" in said and "Traceback" not in said
