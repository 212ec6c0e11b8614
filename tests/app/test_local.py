"""The supervisor's small parts; tests/e2e/test_supervisor.py runs the whole."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from redis import Redis

from app import local
from app.embedded import EmbeddedServer
from worker import protocol


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def ready_address() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_readiness_is_asked_for_directly_whatever_proxy_is_set(ready_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert local._is_ready(ready_address)


def test_what_does_not_answer_is_not_ready(ready_address: str) -> None:
    assert not local._is_ready(f"{ready_address}/nothing")
    assert not local._is_ready("http://127.0.0.1:9")


def test_the_models_of_a_run_that_was_killed_are_forgotten(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    server.start()
    with Redis.from_url(server.url, protocol=2) as client:
        client.set(protocol.model_key("tiny"), "{}")
        client.set(protocol.job_key("kept"), "1")
        local._forget_models(server)
        assert client.keys("*") == [protocol.job_key("kept").encode()]
    server.stop()


def test_a_data_folder_is_locked_until_its_holder_ends(tmp_path: Path) -> None:
    with local._lock(tmp_path), pytest.raises(local.StartError, match="another `dit up`"):
        local._lock(tmp_path)
    local._lock(tmp_path).close()


def test_a_child_ends_when_its_supervisor_is_gone() -> None:
    """The middle process stands for `dit up` and is killed; the inner one notices that it has another parent."""
    inner = "from app.local import end_with_supervisor as e; import time; e(); print('up', flush=True); time.sleep(60)"
    middle = (
        "import os, subprocess, sys; "
        f"environment = {{**os.environ, {local.PARENT!r}: str(os.getpid())}}; "
        f"subprocess.run([sys.executable, '-c', {inner!r}], env=environment)"
    )
    with subprocess.Popen([sys.executable, "-c", middle], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout and process.stdout.readline() == b"up\n"
        process.kill()
        assert process.stdout.read() == b""  # ends when the inner process, which holds the other end, has ended


def test_what_a_child_started_ends_with_it() -> None:
    """A worker that is stopped, or dies, while it compiles."""
    for end in ("stopped", "killed"):
        child = local.Child("worker", {})
        child.process = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, process_group=0)
        assert child.process.stdout
        with child.process.stdout as told:
            grandchild = int(told.readline())
            if end == "stopped":
                child.stop()
            else:
                child.process.kill()
                child.process.wait()
                child.check(lambda _: None)
            assert told.read() == b""  # ends when nobody holds the other end
        assert not Path(f"/proc/{grandchild}/exe").exists()


def test_a_child_gets_the_time_it_was_promised_to_end_and_a_second_signal_hurries_it(tmp_path: Path) -> None:
    """One that ends a second after SIGTERM, or at once after another."""
    code = (
        "import signal, sys, time\n"
        "asked = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n"
        "print('up', flush=True)\n"
        "while not asked: time.sleep(0.01)\n"
        "end = time.monotonic() + float(sys.argv[1])\n"
        "while len(asked) < 2 and time.monotonic() < end: time.sleep(0.01)\n"
        "sys.exit(len(asked))"
    )
    for patience_s, drain_s, status in ((60.0, 1.0, 1), (60.0, 1000.0, 2), (0.5, 1000.0, -9)):
        child = local.Child("worker", {}, patience_s)
        child.process = subprocess.Popen([sys.executable, "-c", code, str(drain_s)], stdout=subprocess.PIPE, process_group=0)
        with child.process.stdout as told:
            assert told.readline() == b"up\n"
            hurry = threading.Timer(0.5, child.hurry)
            if status == 2:
                hurry.start()
            child.stop()
        assert child.process.returncode == status
        child.hurry()  # it has ended; nothing happens


def test_a_process_started_by_hand_has_no_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(local.PARENT, raising=False)
    before = threading.active_count()
    local.end_with_supervisor()
    assert threading.active_count() == before
