"""JobStore: submit, read, watch, cancel, fetch images. Redis, no FastAPI."""

import asyncio
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from rq import Queue
from rq.job import Job

from app.admission import Admission, Limits, Submission, other_body
from app.logs import REQUEST_ID
from app.pictures import Pictures
from app.problems import Problem
from app.server_sent import read_event
from app.views import job_view, work
from worker import protocol
from worker.protocol import FINAL, GenerationRequest, ModelRecord
from worker.stores import ROOM_BYTES, ImageStore

log = logging.getLogger("dit.api")

Event = tuple[str, str, str]  # stream id, name, JSON
CONNECTION: dict[str, Any] = {
    "protocol": 2,  # one shape of answers, whatever the client library's default becomes
    "socket_timeout": 5.0,  # s; a Redis silent for this long is away
    "max_connections": 2000,  # each caller that waits or watches holds one
}
_BLOCK_S = 2.0  # one blocking read; it must end well before the socket's timeout
_AT_ONCE = 10  # events of one read: all that is in memory for a client that takes them slowly, and a preview may have 100 kB
EVERYBODY = None  # in place of an owner: who may see the jobs of all
_LOOKED_AT = 100  # jobs of a long queue, evenly spread: a millisecond of Redis for each question would be too much
_RUNNING_LOOKED_AT = 25  # of those that run: thousands of workers have ten thousands, and each takes longer to look at

# KEYS the model's queue, its jobs under a lease, rq's set of its workers. ARGV job id. What has to be done before a job that waits starts.
# → {} if it does not wait, else {jobs before it, row evaluations before it, about, workers}. Of jobs that run, what is left counts.
_AHEAD = f"""#!lua flags=no-writes
local position = redis.call('LPOS', KEYS[1], ARGV[1])
if not position then return {{}} end
local ahead, before = 0, position > 0 and redis.call('LRANGE', KEYS[1], 0, position - 1) or {{}}
local every = math.max(1, math.ceil(position / {_LOOKED_AT}))
for i = 1, position, every do
  local work = tonumber(redis.call('HGET', 'dit:job:' .. before[i], 'work')) or 0
  ahead = ahead + work * math.min(every, position - i + 1) -- it stands for those after it
end
local running = redis.call('ZRANGE', KEYS[2], 0, {_RUNNING_LOOKED_AT - 1})
local each = #running > 0 and redis.call('ZCARD', KEYS[2]) / #running -- that one of these stands for
for _, lease in ipairs(running) do
  local work, step, request = unpack(redis.call('HMGET', 'dit:job:' .. string.match(lease, '^[^:]*'), 'work', 'step', 'request'))
  local read, asked = pcall(cjson.decode, request)
  if work and read and type(asked) == 'table' and type(asked.steps) == 'number' then
    ahead = ahead + each * tonumber(work) * math.max(0, 1 - (tonumber(step) or 0) / asked.steps)
  end
end
return {{position, math.ceil(ahead), redis.call('SCARD', KEYS[3])}}
"""


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


@dataclass(frozen=True)
class Key:
    """An Idempotency-Key, and what the request that came with it said."""

    value: str
    fingerprint: str


class Terms(TypedDict, total=False):
    """On which a job is submitted."""

    image_bytes: int  # the most that its pictures can take
    preview_bytes: int  # and its previews, which are kept in Redis
    previews: bool
    owner: str
    in_flight: int | None  # jobs that the owner may have
    key: Key | None


class JobStore:
    """All that the API knows of jobs and models. The synchronous client is for rq, which has no other."""

    def __init__(
        self,
        sync: Redis,
        connection: AsyncRedis,
        *,
        queue_limit: int,
        result_ttl_s: int,
        image_bytes: int = ROOM_BYTES["redis"],
        images: ImageStore | None = None,
    ) -> None:
        """`queue_limit`: jobs that may wait, of each model. `images`: where pictures go, or Redis; `image_bytes`: that they may take."""
        self.redis: Any = connection  # its answers are bytes here, which its types do not say
        self.result_ttl_s = result_ttl_s
        self.pictures = Pictures(self.redis, images)
        limits = Limits(queue_limit, ROOM_BYTES["redis"], image_bytes) if images else Limits(queue_limit, image_bytes)
        self.admission = Admission(sync, connection, limits)
        self._cancel, self._ahead = connection.register_script(protocol.CANCEL), connection.register_script(_AHEAD)

    async def models(self) -> list[ModelRecord]:
        """The models that workers serve now, by id."""
        names = sorted(name.decode() for name in await self.redis.smembers(protocol.MODELS_KEY))
        values = await self.redis.mget([protocol.model_key(name) for name in names]) if names else []
        return [record for value in values if value and (record := _model_record(value))]

    async def submit(self, request: GenerationRequest, checkpoint: str, **terms: Unpack[Terms]) -> str:
        """Queue a job and return its id, or that of the job which an equal `key` has made before.

        429 when the queue, the owner's share or the room for pictures is full, 422 for a key that came with another body, 503 when Redis
        can take nothing.
        """
        job = self.submission(new_id(), request, checkpoint, store=await self.pictures.mark(), **terms)
        job_id = await self.admission.submit(job)
        log.info("job %s %s", job_id, "waits" if job_id == job.job_id else "was submitted before", extra={"job_id": job_id})
        return job_id

    def submission(
        self,
        job_id: str,
        request: GenerationRequest,
        checkpoint: str,
        *,
        store: str = "",
        image_bytes: int = 0,
        preview_bytes: int = 0,
        previews: bool = False,
        owner: str = "",
        in_flight: int | None = None,
        key: Key | None = None,
    ) -> Submission:
        """What `submit` hands to the admission. `store`: mark of the image store, empty for Redis."""
        record: dict[Any, Any] = {
            "version": protocol.VERSION,
            "status": protocol.QUEUED,
            "model": request.model,
            "request": request.dump(),
            "checkpoint": checkpoint,
            "result_ttl_s": self.result_ttl_s,
            "owner": owner,
            "previews": int(previews),
            "work": work(request),
            "created_at": time.time(),
        }
        if request_id := REQUEST_ID.get():
            record["request_id"] = request_id
        if store:
            record["store"] = store
        return Submission(
            job_id,
            request,
            record,
            self.result_ttl_s,
            redis_bytes=preview_bytes if store else image_bytes + preview_bytes,
            store=store,
            store_bytes=image_bytes if store else 0,
            owner=owner,
            in_flight=in_flight,
            idempotency=protocol.idempotency_key(owner, _digest(key.value)) if key else "",
            fingerprint=key.fingerprint if key else "",
        )

    async def made_before(self, key: Key, owner: str = "") -> str | None:
        """The job that this key has made; 422 if it came with another body. Asked first, so that a repetition needs no worker."""
        body, job_id = await self.redis.hmget(protocol.idempotency_key(owner, _digest(key.value)), "body", "job")
        if body is None:
            return None
        if body.decode() != key.fingerprint:
            raise other_body()
        return str(job_id.decode())

    async def _record(self, job_id: str, owner: str | None = EVERYBODY) -> dict[bytes, bytes]:
        """The job's hash. Problems as of `_found`."""
        return (await self._found(job_id, owner))[0]

    async def _found(self, job_id: str, owner: str | None) -> tuple[dict[bytes, bytes], dict[str, Any]]:
        """The job's hash, and what is shown of it. 410 for an id that was ours and has expired, 404 for any other, and for a job of
        another owner; 500 for one that cannot be shown: nothing of ours wrote that.
        """
        created = id_time(job_id)
        record = await self.redis.hgetall(protocol.job_key(job_id)) if created else {}
        if record and _may_see(record, owner):
            if (view := _view(job_id, record)) is None:
                raise Problem(500, f"the record of job {job_id} is damaged; the server's log says how")
            return record, view
        if not record and created and created < time.time() - self.result_ttl_s:
            raise Problem(410, f"job {job_id} has expired; results are kept for {self.result_ttl_s} s")
        raise Problem(404, f"there is no job {job_id[:60]!a}")

    async def get(self, job_id: str, owner: str | None = EVERYBODY) -> dict[str, Any]:
        """The job as `GET /jobs/{id}` shows it."""
        record, view = await self._found(job_id, owner)
        if view["status"] == protocol.QUEUED:
            view["queue_position"], view["estimated_wait_s"] = await self._place(job_id, record)
        return view

    async def _place(self, job_id: str, record: dict[bytes, bytes]) -> tuple[int | None, float | None]:
        """Jobs before one that waits, and the seconds that they will take, about: None where nobody measured how fast they go."""
        name = protocol.queue_name(record[b"model"].decode())
        keys = [f"{Queue.redis_queue_namespace_prefix}{name}", f"rq:wip:{name}", f"rq:workers:{name}"]
        told = await self._ahead(keys, [job_id])
        if not told:
            return None, None
        position, ahead, workers = told
        model = await self.redis.get(protocol.model_key(record[b"model"].decode()))
        found = _model_record(model) if model else None
        pace = found.rows_per_s * workers if found else 0.0
        return position, round(ahead / pace, 1) if pace else None

    async def page(self, owner: str | None, limit: int, after: str | None = None) -> tuple[list[dict[str, Any]], str | None]:
        """Up to `limit` jobs, newest first, older than the job `after`; and the id to go on after, None at the end."""
        lists, jobs = protocol.owned_jobs_key(owner or ""), list[dict[str, Any]]()
        while True:
            ids = await self.redis.zrange(lists, f"({after}" if after else "+", "-", desc=True, bylex=True, offset=0, num=limit + 1)
            for job_id, record in zip(ids, await self._records(ids), strict=True):
                if len(jobs) == limit:
                    return jobs, after
                after = job_id.decode()
                if record and _may_see(record, owner) and (view := _view(after, record)):  # else it has expired, and leaves the list soon
                    jobs.append({**view, "queue_position": await self._position(after, record)})
            if len(ids) <= limit:
                return jobs, None

    async def _records(self, ids: Sequence[bytes]) -> list[dict[bytes, bytes]]:
        async with self.redis.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hgetall(protocol.job_key(job_id.decode()))
            return await pipeline.execute()

    async def _position(self, job_id: str, record: dict[bytes, bytes]) -> int | None:
        if record[b"status"].decode() != protocol.QUEUED:
            return None
        return await self.redis.lpos(f"{Queue.redis_queue_namespace_prefix}{protocol.queue_name(record[b'model'].decode())}", job_id)

    async def cancel(self, job_id: str, owner: str | None = EVERYBODY) -> str:
        """Returns the status the job had: queued (canceled now), running or canceling (stops at its next step), or a final one."""
        record = await self._record(job_id, owner)
        queue = f"{Queue.redis_queue_namespace_prefix}{protocol.queue_name(record[b'model'].decode())}"
        keys = [protocol.job_key(job_id), protocol.events_key(job_id), queue, f"{Job.redis_job_namespace_prefix}{job_id}"]
        done = json.dumps({"status": protocol.CANCELED})
        status = await self._cancel(keys, [job_id, time.time(), done])
        return str(status.decode())

    async def image(self, job_id: str, index: int, owner: str | None = EVERYBODY) -> tuple[bytes, str]:
        """PNG bytes and sha256; a running job's finished pictures are served too. 404 while there is none."""
        record = await self._record(job_id, owner)
        (data,) = await self.pictures.read(job_id, record, [index])
        if data is None:
            self._is_not_lost(job_id, record, [index])
            count = GenerationRequest.parse(record[b"request"].decode()).num_images
            state = record[b"status"].decode()
            raise Problem(404, f"job {job_id} has no picture {index}: it is {state} and was asked for {count}, numbered from 0")
        return data, hashlib.sha256(data).hexdigest()

    async def images(self, job_id: str, owner: str | None = EVERYBODY) -> list[bytes]:
        """All PNGs of a job that has succeeded; 409 for one that has not."""
        record = await self._record(job_id, owner)
        status = record[b"status"].decode()
        if status != protocol.SUCCEEDED:
            raise Problem(409, f"job {job_id} has not succeeded: it is {status}", kind="not-succeeded")
        found = await self.pictures.read(job_id, record, indexes := _committed(record))
        self._is_not_lost(job_id, record, [index for index, data in zip(indexes, found, strict=True) if data is None])
        return [data for data in found if data is not None]

    def _is_not_lost(self, job_id: str, record: dict[bytes, bytes], missing: Sequence[int]) -> None:
        """410 if one that is not where it should be was there."""
        if set(missing) & set(_committed(record)):
            log.error("pictures of job %s are gone, and its record is not", job_id, extra={"job_id": job_id})
            raise Problem(410, f"the pictures of job {job_id} have expired; results are kept for {self.result_ttl_s} s")

    async def events(self, job_id: str, after: str = "0", owner: str | None = EVERYBODY) -> AsyncIterator[Event | None]:
        """Every event after a stream id, then new ones as they come, to `done`; None now and then, so that the caller can ping."""
        await self._record(job_id, owner)
        while True:
            ended = await self._ended(job_id)  # asked before reading, so that the read then sees all that will ever come
            block = None if ended else int(_BLOCK_S * 1000)
            answer = await self.redis.xread({protocol.events_key(job_id): after}, count=_AT_ONCE, block=block)
            if not answer:
                if ended:
                    return
                yield None
                continue
            for stream_id, fields in answer[0][1]:
                after = stream_id.decode()
                event = _event(job_id, fields)
                if event is not None:
                    yield after, *event
                    if event[0] == "done":
                        return

    async def wait(self, job_id: str, seconds: float, while_: Callable[[], bool]) -> bool:
        """True once the job has ended, False if it has not within `seconds`, or when `while_`, asked now and then, says no."""
        try:
            async with asyncio.timeout(seconds):
                async for _ in self.events(job_id):
                    if not while_():
                        return False
        except TimeoutError:
            return False
        return await self._ended(job_id)

    async def _ended(self, job_id: str) -> bool:
        """Whether nothing more will be told of the job: it has ended, or expired."""
        status = await self.redis.hget(protocol.job_key(job_id), "status")
        return status is None or status.decode() in FINAL


def _model_record(value: bytes) -> ModelRecord | None:
    """None for a damaged one: the other models are served all the same."""
    try:
        return ModelRecord.parse(value)
    except ValueError as error:
        log.error("the record of a model cannot be read: %s", error)
        return None


def _event(job_id: str, entry: dict[bytes, bytes]) -> tuple[str, str] | None:
    """None for a damaged one: the others are told all the same."""
    try:
        return read_event(entry)
    except ValueError as error:
        log.error("an event of job %s is left out: %s", job_id, error, extra={"job_id": job_id})
        return None


def _view(job_id: str, record: dict[bytes, bytes]) -> dict[str, Any] | None:
    """None for a damaged one: the other jobs are listed all the same."""
    try:
        return job_view(job_id, record)
    except ValueError as error:
        log.error("%s", error, extra={"job_id": job_id})
        return None


def _committed(record: dict[bytes, bytes]) -> list[int]:
    """Indexes of the pictures of a job that has succeeded."""
    return [entry["index"] for entry in json.loads(record.get(b"images") or "[]")]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _may_see(record: dict[bytes, bytes], owner: str | None) -> bool:
    return owner is EVERYBODY or record.get(b"owner", b"") == owner.encode()
