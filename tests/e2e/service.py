"""`dit up` in a session of its own, so that everything it leaves behind can be found; and what a user does with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

START_TIMEOUT_S = JOB_TIMEOUT_S = 240.0  # a loaded machine is slow; on an idle one it is seconds
POLL_S = 0.05


def wait_until(holds: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        answer = holds()
        if answer:
            return answer
        time.sleep(POLL_S)
    return pytest.fail(f"{what}: not within {timeout_s:g} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """One `dit up`: the leader of a process session, so that everything it leaves behind can be found."""

    def __init__(self, folder: Path, registry: Path, **variables: str) -> None:
        self.folder, self.port = folder, free_port()
        ours = {
            "DIT_DATA": str(folder / "data"),
            "DIT_PORT": str(self.port),
            "DIT_CHECKPOINTS": str(registry),
            "DIT_COMPILE": "false",
            "DIT_MAX_ROWS": "8",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        shell = {name: value for name, value in os.environ.items() if not name.startswith("DIT_")}
        self.environment = {**shell, **ours, **variables}
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx2.Client(base_url=self.url, timeout=JOB_TIMEOUT_S, trust_env=False)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Service":
        """Start it, or start it again on the same data."""
        with (self.folder / "stdout").open("wb") as out, (self.folder / "stderr").open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "up"],
                env=self.environment,
                cwd=self.folder,  # where there is no file .env
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return self

    def ready(self) -> "Service":
        assert self.process
        line = wait_until(lambda: f"ready: {self.url}\n" in self.stdout or self.process.poll() is not None, START_TIMEOUT_S, "ready")
        assert line and self.process.poll() is None, self.stderr
        return self

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def ended(self, timeout_s: float = 60) -> int:
        """Its exit status, once it has ended by itself."""
        assert self.process
        return self.process.wait(timeout_s)

    def processes(self) -> dict[int, str]:
        """Process id → command of all that live in its session."""
        assert self.process
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # it has just ended
                continue
            if int(session) == self.process.pid and state not in "ZX":
                found[int(entry.name)] = command
        return found

    def child(self, name: str) -> int:
        """The process id of its `app.cli api`, its `app.cli worker` or its `valkey-server`, which may be starting just now."""
        return int(wait_until(lambda: next((pid for pid, command in self.processes().items() if name in command), 0), 60, name))

    def interrupt(self) -> int:
        """Ctrl-C: SIGINT to the process group of the terminal's foreground job; returns the exit status."""
        assert self.process
        os.killpg(self.process.pid, signal.SIGINT)
        return self.ended()

    def kill(self) -> None:
        """SIGKILL to whatever is left of it."""
        for pid in self.processes() if self.process else ():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.process:
            self.process.wait()

    # What a user does.

    def answers(self) -> bool:
        """Whether it is ready for requests; never raises."""
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def generate(self, *, wait: int = 60, **request: Any) -> httpx2.Response:
        return self.client.post("/generate", json=request, headers={"Prefer": f"wait={wait}"} if wait else {})

    def submit(self, **request: Any) -> str:
        answer = self.generate(wait=0, **request)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/jobs/{job_id}").json())

    def end_of(self, job_id: str) -> dict[str, Any]:
        """The job, once it has ended."""
        final = ("succeeded", "failed", "canceled")
        return dict(wait_until(lambda: (job := self.job(job_id))["status"] in final and job, JOB_TIMEOUT_S, f"end of {job_id}"))

    def running(self, job_id: str) -> None:
        """Return in the middle of the job: some steps are done, and not all."""
        job = wait_until(lambda: (job := self.job(job_id))["progress"]["step"] > 0 and job, JOB_TIMEOUT_S, f"start of {job_id}")
        assert job["status"] == "running", job

    def pictures(self, job_id: str) -> list[bytes]:
        """The PNGs of a job, once it has succeeded."""
        job = self.end_of(job_id)
        assert job["status"] == "succeeded", job
        return [self.client.get(image["url"]).content for image in job["images"]]

    def picture(self, **request: Any) -> bytes:
        (png,) = self.pictures(self.submit(**request))
        return png


@contextmanager
def killed_at_the_end(service: Service) -> Iterator[Service]:
    try:
        yield service
    finally:
        service.kill()
        service.client.close()
