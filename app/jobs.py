"""JobStore: submit, read, watch, cancel, fetch images. Redis, no FastAPI."""

import asyncio
import hashlib
import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.client import Pipeline
from redis.exceptions import OutOfMemoryError, ResponseError
from rq import Queue, Retry
from rq.job import Job
from rq.serializers import JSONSerializer

from app.problems import Problem
from worker import protocol
from worker.protocol import FINAL, GenerationRequest, ModelRecord

Event = tuple[str, str, str]  # stream id, name, JSON
CONNECTION: dict[str, Any] = {
    "protocol": 2,  # one shape of answers, whatever the client library's default becomes
    "socket_timeout": 5.0,  # s; a Redis silent for this long is away
    "max_connections": 2000,  # each caller that waits or watches holds one
}
_BLOCK_S = 2.0  # one blocking read; it must end well before the socket's timeout
_RQ_RETRIES = 1_000_000  # never the limit: our own counts attempts, and rq's, which `rq info` applies too, would end jobs behind our back


def new_id() -> str:
    """A UUIDv7: 48 bits of milliseconds, then random bits, so that an id tells its age."""
    value = int(time.time() * 1000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    return str(uuid.UUID(int=value & ~(0x3 << 62) | 0x2 << 62))


def id_time(job_id: str) -> float | None:
    """Unix seconds inside a UUIDv7, or None for anything else."""
    try:
        value = uuid.UUID(job_id)
    except ValueError:
        return None
    return (value.int >> 80) / 1000 if value.version == 7 and str(value) == job_id else None


def _iso(seconds: bytes | None) -> str | None:
    return datetime.fromtimestamp(float(seconds), UTC).isoformat(timespec="milliseconds") if seconds else None


class JobStore:
    """All that the API knows of jobs and models. The synchronous client is for rq, which has no other."""

    def __init__(self, sync: Redis, connection: AsyncRedis, *, queue_limit: int, result_ttl_s: int) -> None:
        self.sync = sync
        self.redis: Any = connection  # its answers are bytes here, which its types do not say
        self.queue_limit, self.result_ttl_s = queue_limit, result_ttl_s
        self._cancel = connection.register_script(protocol.CANCEL)
        self._queues: dict[str, Queue] = {}  # each asks the server's version once

    async def models(self) -> list[ModelRecord]:
        """The models that workers serve now, by id."""
        names = sorted(name.decode() for name in await self.redis.smembers(protocol.MODELS_KEY))
        values = await self.redis.mget([protocol.model_key(name) for name in names]) if names else []
        return [ModelRecord.parse(value) for value in values if value]

    async def submit(self, request: GenerationRequest, checkpoint: str) -> str:
        """Queue a job and return its id; 429 when the queue is full, 503 when Redis can take nothing."""
        queue_key = f"{Queue.redis_queue_namespace_prefix}{protocol.queue_name(request.model)}"
        waiting = await self.redis.llen(queue_key)
        if waiting >= self.queue_limit:
            raise Problem(429, f"{waiting} jobs wait already, and {self.queue_limit} may; try again later", retry_after_s=10)
        job_id = new_id()
        try:
            await asyncio.to_thread(self._enqueue, job_id, request, checkpoint)
        except ResponseError as error:
            if problem := _refusal(error):
                raise problem from error
            raise
        return job_id

    def _enqueue(self, job_id: str, request: GenerationRequest, checkpoint: str) -> None:
        """The record, its first event, the rq job and a ring for a worker that waits, in one transaction: all of it is there, or nothing.

        It is sent once: where the answer is lost, the client is told 503, and a job that was queued all the same runs and expires.
        """
        queue = self._queues.setdefault(
            request.model, Queue(protocol.queue_name(request.model), connection=self.sync, serializer=JSONSerializer)
        )
        record: dict[Any, Any] = {
            "version": protocol.VERSION,
            "status": protocol.QUEUED,
            "model": request.model,
            "request": request.dump(),
            "checkpoint": checkpoint,
            "result_ttl_s": self.result_ttl_s,
            "created_at": time.time(),
        }
        with self.sync.pipeline() as pipeline:
            enqueue(pipeline, queue, job_id, request, self.result_ttl_s)
            pipeline.hset(protocol.job_key(job_id), mapping=record)
            pipeline.xadd(protocol.events_key(job_id), {"event": "queued", "data": "{}"})
            pipeline.execute()

    async def _record(self, job_id: str) -> dict[bytes, bytes]:
        """The job's hash; 410 for an id that was ours and has expired, 404 for any other."""
        created = id_time(job_id)
        record = await self.redis.hgetall(protocol.job_key(job_id)) if created else {}
        if record:
            return record
        if created and created < time.time() - self.result_ttl_s:
            raise Problem(410, f"job {job_id} has expired; results are kept for {self.result_ttl_s} s")
        raise Problem(404, f"there is no job {job_id[:60]!a}")

    async def get(self, job_id: str) -> dict[str, Any]:
        """The job as `GET /jobs/{id}` shows it."""
        record = await self._record(job_id)
        status = record[b"status"].decode()
        request = GenerationRequest.parse(record[b"request"].decode())
        step = request.steps if status == protocol.SUCCEEDED else int(record.get(b"step", 0))
        queue_key = f"{Queue.redis_queue_namespace_prefix}{protocol.queue_name(request.model)}"
        position = await self.redis.lpos(queue_key, job_id) if status == protocol.QUEUED else None
        images = json.loads(record.get(b"images") or "[]")
        here = f"/jobs/{job_id}"
        return {
            "id": job_id,
            "status": status,
            "queue_position": position,
            "progress": {"step": step, "steps": request.steps},
            "request": public_request(request),
            "images": [{"url": f"{here}/images/{i['index']}", "seed": i["seed"], "sha256": i["sha256"]} for i in images],
            "checkpoint": record[b"checkpoint"].decode(),
            "error": record.get(b"error", b"").decode() or None,
            "created_at": _iso(record[b"created_at"]),
            "started_at": _iso(record.get(b"started_at")),
            "finished_at": _iso(record.get(b"finished_at")),
            "links": {"self": here, "events": f"{here}/events"},
        }

    async def cancel(self, job_id: str) -> str:
        """Returns the status the job had: queued (canceled now), running or canceling (stops at its next step), or a final one."""
        record = await self._record(job_id)
        queue = f"{Queue.redis_queue_namespace_prefix}{protocol.queue_name(record[b'model'].decode())}"
        keys = [protocol.job_key(job_id), protocol.events_key(job_id), queue, f"{Job.redis_job_namespace_prefix}{job_id}"]
        done = json.dumps({"status": protocol.CANCELED})
        status = await self._cancel(keys, [job_id, time.time(), done])
        return str(status.decode())

    async def image(self, job_id: str, index: int) -> tuple[bytes, str]:
        """PNG bytes and sha256; a running job's finished pictures are served too. 404 while there is none."""
        record = await self._record(job_id)
        execution = record.get(b"execution", b"").decode()
        data = await self.redis.get(protocol.image_key(job_id, execution, index)) if execution else None
        if data is None:
            count = GenerationRequest.parse(record[b"request"].decode()).num_images
            state = record[b"status"].decode()
            raise Problem(404, f"job {job_id} has no picture {index}: it is {state} and was asked for {count}, numbered from 0")
        return data, hashlib.sha256(data).hexdigest()

    async def events(self, job_id: str, after: str = "0") -> AsyncIterator[Event | None]:
        """Every event after a stream id, then new ones as they come, to `done`; None now and then, so that the caller can ping."""
        await self._record(job_id)
        while True:
            ended = await self._ended(job_id)  # asked before reading, so that the read then sees all that will ever come
            block = None if ended else int(_BLOCK_S * 1000)
            answer = await self.redis.xread({protocol.events_key(job_id): after}, count=100, block=block)
            if not answer:
                if ended:
                    return
                yield None
                continue
            for stream_id, fields in answer[0][1]:
                after = stream_id.decode()
                yield after, fields[b"event"].decode(), fields[b"data"].decode()
                if fields[b"event"] == b"done":
                    return

    async def wait(self, job_id: str, seconds: float) -> bool:
        """True once the job has ended, False if it has not within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                async for _ in self.events(job_id):
                    pass
        except TimeoutError:
            return False
        return await self._ended(job_id)

    async def _ended(self, job_id: str) -> bool:
        """Whether nothing more will be told of the job: it has ended, or expired."""
        status = await self.redis.hget(protocol.job_key(job_id), "status")
        return status is None or status.decode() in FINAL


def enqueue(pipeline: Pipeline, queue: Queue, job_id: str, request: GenerationRequest, result_ttl_s: int) -> None:
    """Say on the pipeline, first of all since this opens its transaction, that an rq job waits; and ring for a worker that waits too."""
    job = Job.create(
        protocol.OPERATION,
        connection=queue.connection,
        serializer=JSONSerializer,
        id=job_id,
        timeout=-1,  # leases, not rq's timeouts, tell a dead worker; -1 keeps rq from shortening them
        result_ttl=60,
        failure_ttl=result_ttl_s,
        retry=Retry(max=_RQ_RETRIES),
        description=f"{request.num_images} × {request.steps} steps",
    )
    queue.enqueue_job(job, pipeline=pipeline)
    bell = protocol.bell_key(request.model)
    pipeline.lpush(bell, "1")
    pipeline.ltrim(bell, 0, protocol.BELL_RINGS - 1)
    pipeline.expire(bell, protocol.BELL_TTL_S)


def _refusal(error: ResponseError) -> Problem | None:
    """Why a Redis that is there takes nothing."""
    if isinstance(error, OutOfMemoryError):
        return Problem(503, "the queue (Redis) is out of memory; try again when results have expired", retry_after_s=30)
    if "MISCONF" in str(error):
        return Problem(503, "the queue (Redis) cannot write its disk; try again when that is mended", retry_after_s=30)
    return None


def public_request(request: GenerationRequest) -> dict[str, Any]:
    """The resolved request in the words of `POST /generate`, so that it can be posted again."""
    labels = list(request.class_labels)
    alike = len(set(labels)) == 1
    times = {"shift": request.shift} if request.spacing is None else {"spacing": request.spacing, "eta": request.eta}
    return {
        "class_label": labels[0] if alike else labels,
        **({"num_images": len(labels)} if alike else {}),
        "guidance_scale": request.guidance_scale,
        "guidance_interval": list(request.guidance_interval),
        "guidance_channels": request.guidance_channels,
        "guidance_rescale": request.guidance_rescale,
        **({"block_cache": request.block_cache} if request.block_cache > 1 else {}),
        "steps": request.steps,
        "sampler": request.sampler,
        **times,
        "seed": request.seed,
        "model": request.model,
    }
