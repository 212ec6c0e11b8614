"""What serving.py and overhead.py share: `dit up` as a child process, requests drawn from a seed, a queue kept full, the worker's trace.

A side is an rq queue with a worker behind it, ours or a peer's. Times are Unix seconds of this host, on which every process runs; the
trace has the monotonic clock, which they share too.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import httpx2
import numpy as np
import torch
from redis import Redis

from app.embedded import socket_path
from training.runlog import commit, hardware
from worker import protocol
from worker.protocol import ModelRecord

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "checkpoints" / "fashion-mnist"
START_TIMEOUT_S = 900.0  # a first start compiles
END_TIMEOUT_S = 600.0  # for jobs that run when a measurement ends
STOP_TIMEOUT_S = 90.0  # for a process
MIXES = ("fine", "coarse")
STEPS, GUIDANCE, MOST_PICTURES = (10, 20, 30, 40, 50), (1.0, 2.0, 3.0, 4.0, 5.0), 4  # the coarse mix; the fine one lies between the ends


@dataclass(frozen=True)
class Request:
    """The body of a `POST /generate`."""

    class_label: int
    guidance_scale: float
    steps: int
    sampler: str
    seed: int
    num_images: int

    @property
    def rows(self) -> int:
        """Rows of one evaluation of all its pictures: two each while guided."""
        return self.num_images * (1 if self.guidance_scale == 1 else 2)


def draw_requests(seed: Sequence[int], mix: str, samplers: Sequence[str], classes: int) -> Iterator[Request]:
    """Requests without end, the same for the same seed. `coarse` takes steps and guidance from five values each, so that some are equal."""
    random = np.random.default_rng(list(seed))
    while True:
        if mix == "coarse":
            steps, guidance = int(random.choice(STEPS)), float(random.choice(GUIDANCE))
        else:
            steps = int(random.integers(STEPS[0], STEPS[-1] + 1))
            guidance = round(float(random.uniform(GUIDANCE[0], GUIDANCE[-1])), 2)
        yield Request(
            class_label=int(random.integers(classes)),
            guidance_scale=guidance,
            steps=steps,
            sampler=str(random.choice(samplers)),
            seed=int(random.integers(2**32)),
            num_images=int(random.integers(1, MOST_PICTURES + 1)),
        )


class Side(Protocol):
    """A queue and the worker behind it. A job's record is a hash that has at least the fields of `Outcome`."""

    name: str
    redis: Redis
    queue_key: str

    async def submit(self, request: Request) -> str | None:
        """Queue a job; its id, or None if it was refused."""

    async def clear(self) -> None:
        """Take back the jobs that wait; their status becomes `canceled`."""

    def record_key(self, job_id: str) -> str: ...


@dataclass(frozen=True)
class Sent:
    request: Request
    scheduled: float
    job_id: str | None


@dataclass(frozen=True)
class Outcome:
    """What became of a request; 0.0 for what has not come to pass."""

    request: Request
    scheduled: float
    status: str = "refused"
    created_at: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0

    @property
    def final(self) -> bool:
        return self.status in ("refused", *protocol.FINAL)


def read_outcomes(side: Side, sent: Sequence[Sent]) -> list[Outcome]:
    with side.redis.pipeline(transaction=False) as pipeline:
        for one in sent:
            pipeline.hmget(side.record_key(one.job_id or ""), "status", "created_at", "started_at", "finished_at")
        records: list[Any] = pipeline.execute()

    def outcome(one: Sent, record: list[bytes | None]) -> Outcome:
        if one.job_id is None:
            return Outcome(one.request, one.scheduled)
        status, *times = record
        return Outcome(one.request, one.scheduled, (status or b"queued").decode(), *(float(time or 0) for time in times))

    return [outcome(one, record) for one, record in zip(sent, records, strict=True)]


async def settle(side: Side, sent: Sequence[Sent], limit_s: float) -> list[Outcome]:
    """The outcome of each, once all have ended or `limit_s` has passed. It asks for those still open, and seldom."""
    deadline, known = time.monotonic() + limit_s, dict(enumerate(read_outcomes(side, sent)))
    while (pending := [i for i, outcome in known.items() if not outcome.final]) and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
        known |= zip(pending, read_outcomes(side, [sent[i] for i in pending]), strict=True)
    return list(known.values())


async def keep_full(side: Side, requests: Iterator[Request], depth: int, seconds: float) -> tuple[list[Outcome], int]:
    """A closed loop: for `seconds`, about `depth` jobs wait. → outcomes, and how often the queue was found empty after its first filling.

    The jobs that wait at the end are taken back, those that run end. RuntimeError if one of them does not.
    """
    sent: list[Sent] = []
    empty, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        waiting = int(side.redis.llen(side.queue_key))
        empty += waiting == 0 and bool(sent)
        batch = [next(requests) for _ in range(depth - waiting)]
        now = time.time()
        ids = await asyncio.gather(*(side.submit(request) for request in batch))
        sent += [Sent(request, now, job_id) for request, job_id in zip(batch, ids, strict=True)]
        await asyncio.sleep(0.02)
    await side.clear()
    outcomes = await settle(side, sent, END_TIMEOUT_S)
    if not all(outcome.final for outcome in outcomes):
        raise RuntimeError(f"{side.name}: a job did not end within {END_TIMEOUT_S:g} s")
    return outcomes, empty


def per_second(outcomes: Sequence[Outcome], start: float, end: float, amount: Callable[[Request], float]) -> float:
    """Amount done a second from `start` to `end`. A job that ran across an edge counts by the share of its run that lay inside."""
    total = 0.0
    for outcome in outcomes:
        if outcome.status == protocol.SUCCEEDED:
            inside = min(outcome.finished_at, end) - max(outcome.started_at, start)
            total += amount(outcome.request) * max(0.0, inside) / max(outcome.finished_at - outcome.started_at, 1e-9)
    return total / (end - start)


def percentiles(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """p50, p95 and p99 by nearest rank: each is one of the values. Empty for no values."""
    ranks = {f"p{q}": np.percentile(values, q, method="inverted_cdf") for q in (50, 95, 99)} if len(values) else {}
    return {name: round(float(value), digits) for name, value in ranks.items()}


@dataclass(frozen=True)
class Tick:
    """A line of the worker's trace: start (monotonic, s), duration, rows of the forward used, and as padded; 0 rows: it only decoded."""

    t: float
    seconds: float
    rows: int
    bucket: int


def read_trace(path: Path) -> list[Tick]:
    """The ticks of a DIT_TRACE; none if the worker writes no trace. Read it after the worker's end, which writes out what it holds back."""
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]  # the last one of a killed worker may be cut
    return [Tick(tick["t"], tick["seconds"], tick["rows"], tick["bucket"]) for tick in whole]


def device_use(ticks: Sequence[Tick], start: float, end: float) -> dict[str, float]:
    """From the ticks that start in [start, end]: rows of a forward, their share of the padded rows, and the engine's busy share of the
    time between the first tick's start and the last one's end. Empty without ticks."""
    inside = [tick for tick in ticks if start <= tick.t <= end]
    forwards = [tick for tick in inside if tick.rows]
    if not forwards:
        return {}
    rows = sum(tick.rows for tick in forwards)
    wall = max(tick.t + tick.seconds for tick in inside) - inside[0].t
    return {
        "rows": round(rows / len(forwards), 2),
        "rows_share_of_padded": round(rows / sum(tick.bucket for tick in forwards), 3),
        "busy_share": round(sum(tick.seconds for tick in inside) / wall, 4),
    }


def facts(name: str) -> dict[str, Any]:
    """What, how, where and when, for the last line."""
    return {
        "benchmark": name,
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_on_sigterm() -> None:
    """SIGTERM ends the script as an exception does, so that it stops what it has started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def log_tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-15:])


@contextmanager
def child(
    command: list[str], environment: dict[str, str], folder: Path, log: Path, ready: Callable[[], bool], stop: signal.Signals
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs as long as the block, the first of its session; the block is entered once it is ready.

    RuntimeError with the end of its log if it never is.
    """
    with log.open("wb") as file:
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, cwd=folder, **options)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} did not get ready:\n{log_tail(log)}")
            time.sleep(0.2)
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()  # the children of a `dit up` notice and end
            process.wait()


class Service:
    """Our side: `dit up`, spoken to over HTTP; its data lie in `folder`. `variables` are more of its environment.

    `submit` and `clear` are for one event loop, which runs inside `async with service.client`.
    """

    name = "ours"

    def __init__(self, folder: Path, checkpoint: Path, device: str, compile: bool, **variables: str) -> None:
        port = free_port()
        self.folder, self.trace, self.log = folder, folder / "trace.jsonl", folder / "up.log"
        self.checkpoint = checkpoint.resolve()
        shell = {name: value for name, value in os.environ.items() if not name.startswith("DIT_")}
        shell.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".dit" / "compiled"))  # where `dit up` has it in this folder
        ours = {
            "DIT_DATA": str(folder / "data"),
            "DIT_PORT": str(port),
            "DIT_CHECKPOINTS": str(self.checkpoint.parent),
            "DIT_MODEL": self.checkpoint.name,
            "DIT_DEVICE": device,
            "DIT_COMPILE": str(compile).lower(),
            "DIT_TRACE": str(self.trace),
        }
        self.environment = {**shell, **ours, **variables}
        self.url = f"http://127.0.0.1:{port}"
        self.redis_url = variables.get("DIT_REDIS_URL", f"unix://{socket_path(folder / 'data')}")
        self.session = 0  # of its processes, while it runs
        self.redis = Redis.from_url(self.redis_url, protocol=2)
        self.queue_key = f"rq:queue:{protocol.queue_name(self.checkpoint.name)}"
        self.model: dict[str, Any] = {}  # what its worker tells of it
        # With as many connections as there are open requests: none shall wait for another's answer.
        self.client = httpx2.AsyncClient(base_url=self.url, timeout=60, trust_env=False, limits=httpx2.Limits(max_connections=None))

    def ready(self) -> bool:
        with httpx2.Client(base_url=self.url, trust_env=False) as client:
            try:
                return client.get("/readyz").status_code == 200
            except httpx2.TransportError:
                return False

    def record_key(self, job_id: str) -> str:
        return protocol.job_key(job_id)

    async def submit(self, request: Request, wait_s: int = 0) -> str | None:
        """With `wait_s`, once the job has ended or that time has passed."""
        headers = {"Prefer": f"wait={wait_s}"} if wait_s else {}
        answer = await self.client.post("/generate", json=asdict(request), headers=headers)
        if answer.status_code == 429:
            return None
        answer.raise_for_status()
        return str(answer.json()["id"])

    async def clear(self) -> None:
        waiting: Any = self.redis.lrange(self.queue_key, 0, -1)
        await asyncio.gather(*(self.client.delete(f"/jobs/{job_id.decode()}") for job_id in waiting))


@contextmanager
def running_service(folder: Path, checkpoint: Path, device: str, *, compile: bool, **variables: str) -> Iterator[Service]:
    service = Service(folder, checkpoint, device, compile, **variables)
    command = [sys.executable, "-m", "app.cli", "up"]
    running = child(command, service.environment, folder, service.log, service.ready, signal.SIGINT)  # in a folder where no file .env is
    with service.redis, running as process:
        service.session = process.pid
        record: Any = service.redis.get(protocol.model_key(service.checkpoint.name))
        service.model = asdict(ModelRecord.parse(record))
        yield service
