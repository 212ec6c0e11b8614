"""serving.py's peers: stock rq workers that hold the same model and draw with diffusers or `model.sampling.sample()`. Runs in their
processes too."""

import io
import json
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from _pipeline import Pipeline
from _service import MOST_PICTURES, Request, Service, child
from PIL import Image
from redis import Redis
from rq import Queue, SimpleWorker, get_current_job
from rq.job import Job

from model import sampling
from model.checkpoint import DTYPES, load
from model.dit import DiT
from worker import protocol

BATCH_ROWS = 32
KEPT_S = 3600  # a peer's pictures and records
PADDED = (1, 2, 3, 4, 8, 16, 32)  # pictures of a compiled peer's batch: a graph per number of rows
PEERS = {False: "one at a time", True: "batches of equals"}
LIBRARIES = ("diffusers", "sample()")


def peer_job_id(request: Request) -> str:
    """Tells what `equal_waiting` asks, so that it need not fetch every waiting job. rq allows letters, digits, _ and -."""
    kind = f"{request.steps}-{round(100 * request.guidance_scale)}-{request.sampler.replace('+', 'p')}"
    return f"{kind}_{request.rows}_{uuid.uuid4().hex}"


def equal_waiting(first: str, waiting: Sequence[str], most_rows: int = BATCH_ROWS) -> list[str]:
    """The waiting jobs that can run with `first`, oldest first: of equal steps, guidance and sampler, as many as fit in `most_rows`."""
    kind, rows, _ = first.split("_")
    room, chosen = most_rows - int(rows), []
    for job_id in waiting:
        other, rows, _ = job_id.split("_")
        if other == kind and int(rows) <= room:
            chosen.append(job_id)
            room -= int(rows)
    return chosen


class PeerModel:
    """The model in a peer's worker, as someone would write it who has the library."""

    def __init__(self, checkpoint: str, device: str, dtype: str, library: str, compile: bool, batching: bool) -> None:
        sampling.SMALLEST_BATCH = 1
        self.batching, self.compile = batching, compile
        if compile:
            torch._dynamo.config.recompile_limit = 32
        self.checkpoint, self.pipeline = load(checkpoint, device), None
        if library == LIBRARIES[0]:
            self.pipeline = Pipeline(self.checkpoint, DTYPES[dtype], compile)
            return
        self.checkpoint.dit.to(DTYPES[dtype])
        if self.checkpoint.vae and self.checkpoint.device.type == "cuda":  # on the CPU the decoder stays in float32, as ours does
            self.checkpoint.vae.cast(DTYPES[dtype])
        if compile:
            self.checkpoint.dit = cast(DiT, torch.compile(self.checkpoint.dit, dynamic=False))

    def warm_up(self, samplers: Sequence[str]) -> None:
        """Every number of rows that occurs, with every sampler: those that keep two latents give the network x in other strides."""
        for pictures, guidance, sampler in product(PADDED if self.batching else PADDED[:MOST_PICTURES], (1.0, 2.0), samplers):
            request = Request(0, guidance, 2, sampler, 0, pictures)
            if request.rows <= BATCH_ROWS:
                self.pictures([request])

    def pictures(self, requests: Sequence[Request]) -> list[bytes]:
        """PNGs of requests of equal steps, guidance and sampler."""
        labels: list[int | None] = [r.class_label for r in requests for _ in range(r.num_images)]
        seeds = [r.seed + i for r in requests for i in range(r.num_images)]
        count = len(seeds)
        if self.compile:
            padding = next(size for size in PADDED if size >= count) - count
            labels, seeds = [*labels, *[None] * padding], [*seeds, *[0] * padding]
        one = requests[0]
        setting: dict[str, Any] = {"steps": one.steps, "guidance_scale": one.guidance_scale, "sampler": one.sampler}
        if self.pipeline:
            images = self.pipeline.pictures(labels, seeds, **setting)
        else:
            images = sampling.sample(self.checkpoint, labels, seeds=seeds, **setting)
        return [encode(pixels) for pixels in images[:count].cpu().numpy()]


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def record_key(job_id: str) -> str:
    return f"peer:job:{job_id}"


_model: PeerModel | None = None  # rq gives a job's function nothing but its arguments


def run_job(request: dict[str, Any]) -> None:
    """What rq calls."""
    job = get_current_job()
    assert job and _model
    started, taken = time.time(), {job.id: Request(**request)}
    if _model.batching:
        taken |= take_equal(Queue(job.origin, connection=job.connection), job.id)
    images = iter(_model.pictures(list(taken.values())))
    with job.connection.pipeline(transaction=False) as pipeline:
        for job_id, one in taken.items():
            for i in range(one.num_images):
                pipeline.set(f"peer:image:{job_id}:{i}", next(images), ex=KEPT_S)
        pipeline.execute()
        for job_id in taken:
            times = {"started_at": started, "finished_at": time.time()}
            pipeline.hset(record_key(job_id), mapping={"status": protocol.SUCCEEDED, **times})
        pipeline.execute()


def take_equal(queue: Queue, first: str) -> dict[str, Request]:
    connection = queue.connection
    chosen = equal_waiting(first, [job_id.decode() for job_id in connection.lrange(queue.key, 0, -1)])
    jobs = Job.fetch_many([job_id for job_id in chosen if connection.lrem(queue.key, 1, job_id)], connection)
    if jobs:
        connection.delete(*(job.key for job in jobs))
    return {job.id: Request(**job.args[0]) for job in jobs}


def work() -> None:
    """A peer's process."""
    global _model
    options = json.loads(sys.argv[1])
    _model = PeerModel(**options["model"])
    _model.warm_up(options["samplers"])
    connection = Redis.from_url(options["redis_url"], protocol=2)
    connection.set(f"peer:ready:{options['queue']}", 1)
    SimpleWorker([Queue(options["queue"], connection=connection)], connection=connection).work(logging_level="WARNING")


class Peer:
    """A peer's worker as a side."""

    def __init__(self, service: Service, *, library: str, batching: bool, compile: bool) -> None:
        form = "compiled" if compile else "eager"
        self.kind = f"{PEERS[batching]}, {library}"
        self.name, self.redis, self.record_key = f"{self.kind}, {form}", service.redis, record_key
        self.queue = Queue(f"{'batching' if batching else 'single'}-{library.rstrip('()')}-{form}", connection=service.redis)
        self.queue_key, self.batching, self.log = self.queue.key, batching, service.folder / f"{self.queue.name}.log"
        model = {"checkpoint": str(service.checkpoint), "library": library, "batching": batching, "compile": compile}
        self.options = {
            "model": {**model, "device": service.model["device"], "dtype": service.model["dtype"]},
            "samplers": service.model["samplers"],
            "redis_url": service.redis_url,
            "queue": self.queue.name,
        }

    def ready(self) -> bool:
        return bool(self.redis.exists(f"peer:ready:{self.queue.name}"))

    async def submit(self, request: Request) -> str | None:
        kept = {"result_ttl": 60, "job_timeout": KEPT_S}
        return str(self.queue.enqueue("_peer.run_job", asdict(request), job_id=peer_job_id(request), **kept).id)

    async def clear(self) -> None:
        for job_id in self.queue.job_ids:
            if self.redis.lrem(self.queue_key, 1, job_id):
                self.redis.delete(Job.key_for(job_id))
                self.redis.hset(record_key(job_id), "status", protocol.CANCELED)


@contextmanager
def running_peer(service: Service, *, library: str, batching: bool, compile: bool) -> Iterator[Peer]:
    """Its worker in a process of its own."""
    peer = Peer(service, library=library, batching=batching, compile=compile)
    command = [sys.executable, "-c", "import _peer; _peer.work()", json.dumps(peer.options)]
    here = Path(__file__).resolve().parent  # rq imports the function from where Python starts
    with child(command, service.environment, here, peer.log, peer.ready, signal.SIGTERM):  # it ends its job first
        yield peer
