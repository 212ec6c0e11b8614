"""Schemathesis over the OpenAPI document of a running service, with an operator and a user who keep it going meanwhile."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx2

from app.keys import create_key
from tests.chaos.redis_server import RedisServer
from tests.e2e.service import JOB_TIMEOUT_S, START_TIMEOUT_S, Service, free_port, killed_at_the_end, wait_until

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
LONG = 300  # steps of all pictures of a job that is canceled; others may end, however long it takes
PATIENCE_S = 0.5  # that a long job gets
USERS: dict[str, tuple[str, dict[str, int]]] = {  # two whose jobs are their own, and one who may close queues
    "alice": ("generate", {"per_minute": 1_000_000, "in_flight": 4}),
    "bob": ("generate", {}),
    "operator": ("admin", {}),
}


@dataclass(frozen=True)
class Outcome:
    """What Schemathesis found."""

    passed: bool
    report: str
    cases: int
    counts: dict[str, int]  # answers, by operation and status

    @property
    def in_vain(self) -> set[str]:
        """The operations that were never asked for what there is: that a job has ended (409) is told of a job."""
        reached = {name.rpartition(" ")[0] for name in self.counts if name.endswith((" 200", " 202", " 409"))}
        return {name.rpartition(" ")[0] for name in self.counts} - reached


def fuzz(url: str, folder: Path, *options: str, configuration: str = "") -> Outcome:
    """Run it with all that schemathesis.toml says, and this besides."""
    (folder / "schemathesis.toml").write_text((HERE / "schemathesis.toml").read_text() + configuration)
    program = Path(sys.executable).with_name("schemathesis")
    command = [program, "--config-file", "schemathesis.toml", "run", f"{url}/openapi.json", "--no-color", *options]
    counts = folder / "counts.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FUZZ_COUNTS": str(counts), "no_proxy": "127.0.0.1"}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    cases = re.search(r"^  (\d+) generated", done.stdout, re.MULTILINE)
    assert cases and counts.exists(), done.stdout
    return Outcome(done.returncode == 0, done.stdout, int(cases[1]), json.loads(counts.read_text()))


@contextmanager
def served() -> Iterator[Service]:
    """`dit up` on the bundled checkpoint, over a redis-server of its own. The id in the API's examples has expired (410), on any day."""
    with tempfile.TemporaryDirectory(prefix="dit-fuzz-") as folder:
        redis = RedisServer(Path(folder) / "redis")
        redis.start()
        try:
            settings = {"DIT_REDIS_URL": redis.url, "DIT_RESULT_TTL": "3600"}
            with killed_at_the_end(Service(Path(folder), ROOT / "checkpoints", **settings)) as service:
                yield service.start().ready()
        finally:
            redis.kill()


@contextmanager
def kept_going(service: Service) -> Iterator[None]:
    """An operator opens every queue that the fuzzer closes, and a user cancels what takes long, as 64 pictures of 1000 steps do."""
    end = threading.Event()

    def tend() -> None:
        with httpx2.Client(base_url=service.url, timeout=JOB_TIMEOUT_S, trust_env=False) as client:
            while not end.wait(0.1):
                _open_queues(client)
                _cancel_long_jobs(client)

    with ThreadPoolExecutor(1) as pool:
        keeper = pool.submit(tend)
        try:
            yield
        finally:
            end.set()
        keeper.result()  # raises what went wrong there


def _open_queues(client: httpx2.Client) -> None:
    for queue in client.get("/queues").json()["queues"]:
        if queue["state"] != "open":
            client.post(f"/queues/{queue['model']}/resume")


def _cancel_long_jobs(client: httpx2.Client) -> None:
    for job in client.get("/jobs", params={"limit": 100}).json()["jobs"]:
        request = job["request"]
        pictures = request["num_images"] if "num_images" in request else len(request["class_label"])
        age_s = (datetime.now(UTC) - datetime.fromisoformat(job["created_at"])).total_seconds()
        if job["status"] in ("queued", "running") and request["steps"] * pictures > LONG and age_s > PATIENCE_S:
            client.delete(f"/jobs/{job['id']}")


@contextmanager
def asking_for_keys(service: Service, folder: Path) -> Iterator[tuple[str, str]]:
    """A second API over the same Redis, which asks for keys: its address, and the configuration that has them."""
    keys, port = folder / "keys.json", free_port()
    users = [{"name": name, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {key}"}]} for name, key in _keys(keys).items()]
    (folder / "users.json").write_text(json.dumps({"auth": users}))
    environment = {**service.environment, "DIT_API_KEYS_FILE": str(keys), "DIT_PORT": str(port)}
    with (folder / "api.log").open("wb") as log:
        api = subprocess.Popen([sys.executable, "-m", "app.cli", "api"], env=environment, cwd=folder, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _answers(url), START_TIMEOUT_S, "the API with keys")
        yield url, '\n[auth.wfc]\npath = "users.json"\npeers = ["alice", "bob"]\n'
    finally:
        api.terminate()
        api.wait()


def _keys(path: Path) -> dict[str, str]:
    return {name: create_key(path, name, scope, **limits)[1] for name, (scope, limits) in USERS.items()}


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False
