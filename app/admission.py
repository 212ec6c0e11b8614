"""How a job comes to be: every limit is looked at, and all of the job written, in one step of Redis.

Whoever dies in the middle leaves nothing behind, and a thousand submissions at once find as much room as one after the other.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.client import Pipeline
from redis.exceptions import ResponseError
from rq import Queue, Retry
from rq.job import Job
from rq.serializers import JSONSerializer

from app.problems import Problem, refusal
from worker import protocol
from worker.protocol import GenerationRequest

_RQ_RETRIES = 1_000_000  # never the limit: our own counts attempts, and rq's, which `rq info` applies too, would end jobs behind our back
_PICTURE_EXTRA_BYTES = 4096  # what a PNG has besides its pixels: the request inside it, headers

# KEYS the model's queue, its gate, and, if its pictures go into an image store, the jobs there and the sum of their bytes. ARGV job id,
# owner, bytes reserved in Redis, jobs that may wait, jobs that the owner may have in flight ('' for
# any number), bytes that may be reserved in all, seconds that results live, key of the Idempotency-Key ('' for none), fingerprint of the
# body, bytes in the image store, bytes that may be reserved there in all, then the commands that make the job: for each the number of its
# words, and they.
# → {'queued', jobs before it}, {'same', job id}, {'another body'}, {'draining'}, {'queue', waiting}, {'in flight', count}, {'bytes' or
# 'stored', used, seconds until some may be free}. A refusal writes nothing of the job.
SUBMIT = (
    "#!lua\n"
    + protocol.FORGET
    + f"local DRAINING = '{protocol.DRAINING}'"
    + """
local id, owner, bytes, now = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(redis.call('TIME')[1])
local idempotency = ARGV[8]
if idempotency ~= '' then
  local body, job = unpack(redis.call('HMGET', idempotency, 'body', 'job'))
  if body then
    if body == ARGV[9] then return {'same', job} end
    return {'another body'}
  end
end
if redis.call('GET', KEYS[2]) == DRAINING then return {'draining'} end
forget(now, 100)
local waiting = redis.call('LLEN', KEYS[1])
if waiting >= tonumber(ARGV[4]) then return {'queue', waiting} end
local active = 'dit:active:' .. owner
if ARGV[5] ~= '' then
  for _, other in ipairs(redis.call('SMEMBERS', active)) do
    local status = redis.call('HGET', 'dit:job:' .. other, 'status')
    if not status or status == 'succeeded' or status == 'failed' or status == 'canceled' then redis.call('SREM', active, other) end
  end
  local count = redis.call('SCARD', active)
  if count >= tonumber(ARGV[5]) then return {'in flight', count} end
end
local function full(verdict, sum, jobs, more, limit)
  local used = tonumber(redis.call('GET', sum)) or 0
  if used + more <= tonumber(limit) then return nil end
  local first = redis.call('ZRANGE', jobs, 0, 0, 'WITHSCORES')
  return {verdict, used, math.ceil(math.max(1, (tonumber(first[2]) or now) - now))}
end
local no_room = full('bytes', 'dit:bytes', 'dit:books', bytes, ARGV[6])
if KEYS[3] and not no_room then no_room = full('stored', KEYS[4], KEYS[3], tonumber(ARGV[10]), ARGV[11]) end
if no_room then return no_room end
local at = 13
for _ = 1, tonumber(ARGV[12]) do
  local last = at + tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, last))
  at = last + 1
end
redis.call('ZADD', 'dit:jobs', 0, id)
if owner ~= '' then redis.call('ZADD', 'dit:jobs:' .. owner, 0, id) end
if ARGV[5] ~= '' then redis.call('SADD', active, id) end
redis.call('ZADD', 'dit:books', now + tonumber(ARGV[7]), id .. '|' .. owner .. '|' .. bytes)
redis.call('INCRBY', 'dit:bytes', bytes)
if KEYS[3] then
  redis.call('ZADD', KEYS[3], now + tonumber(ARGV[7]), id .. '|' .. ARGV[10])
  redis.call('INCRBY', KEYS[4], ARGV[10])
end
if idempotency ~= '' then
  redis.call('HSET', idempotency, 'body', ARGV[9], 'job', id)
  redis.call('EXPIRE', idempotency, ARGV[7])
end
return {'queued', waiting}
"""
)


@dataclass(frozen=True)
class Limits:
    """What Redis, and an image store, may be asked to hold."""

    queue: int  # jobs that may wait, of each model
    redis_bytes: int  # that the pictures and previews of all jobs may take in Redis
    store_bytes: int = 0  # that pictures may take in the image store


@dataclass(frozen=True)
class Submission:
    """A job to be: whose it is, and what it would take."""

    job_id: str
    request: GenerationRequest
    record: dict[Any, Any]  # fields of `dit:job:<id>`
    result_ttl_s: int
    redis_bytes: int  # the most that its pictures and previews can take in Redis
    store: str = ""  # mark of the image store that its pictures go to; empty: Redis
    store_bytes: int = 0  # the most that they can take there
    owner: str = ""
    in_flight: int | None = None  # jobs that the owner may have
    idempotency: str = ""  # the Redis key of an Idempotency-Key
    fingerprint: str = ""  # of the body that came with it


def picture_bytes(size: int, channels: int) -> int:
    """The most that a PNG of so many pixels a side takes: noise does not compress."""
    return size * size * channels + size + _PICTURE_EXTRA_BYTES


class Admission:
    """The one way into the queue."""

    def __init__(self, sync: Redis, connection: AsyncRedis, limits: Limits) -> None:
        """The synchronous client is for rq, which has no other: it asks for the server's version, and writes what is never sent."""
        self._sync, self.limits = sync, limits
        self._submit: Any = connection.register_script(SUBMIT)
        self._queues: dict[str, Queue] = {}

    async def submit(self, job: Submission) -> str:
        """The id of the job: this one's, or that of an equal submission before. Problems 409, 422, 429 and 503 say why not.

        It is sent once: where the answer is lost, the client is told 503, and a job that was queued all the same runs and expires.
        """
        for wanted, room in ((job.redis_bytes, self.limits.redis_bytes), (job.store_bytes, self.limits.store_bytes)):
            if wanted > room:
                raise Problem(422, f"its pictures may take {wanted} bytes, and {room} are there for all jobs")
        queue = await self._queue(job.request.model)
        commands = self._commands(job, queue)
        words: list[Any] = [word for command in commands for word in (len(command), *command)]
        limits = [self.limits.queue, "" if job.in_flight is None else job.in_flight, self.limits.redis_bytes, job.result_ttl_s]
        stored = [job.store_bytes, self.limits.store_bytes]
        arguments = [job.job_id, job.owner, job.redis_bytes, *limits, job.idempotency, job.fingerprint, *stored, len(commands), *words]
        keys = [queue.key, protocol.gate_key(job.request.model)]
        if job.store:
            keys += [protocol.kept_key(job.store), protocol.kept_bytes_key(job.store)]
        try:
            verdict, *told = await self._submit(keys, arguments)
        except ResponseError as error:
            if problem := refusal(error):
                raise problem from error
            raise
        return self._answer(job, verdict.decode(), told)

    def _answer(self, job: Submission, verdict: str, told: list[Any]) -> str:
        if verdict == "queued":
            return job.job_id
        if verdict == "same":
            return str(told[0].decode())
        if verdict == "another body":
            raise other_body()
        if verdict == "draining":
            detail = (
                f"the queue of model {job.request.model} is being drained: what waits is worked off, and nothing more is accepted for now"
            )
            raise Problem(503, detail, kind="draining", retry_after_s=60)
        if verdict == "queue":
            detail = f"{told[0]} jobs wait already, and {self.limits.queue} may; try again later"
            raise Problem(429, detail, kind="queue-full", retry_after_s=10)
        if verdict == "in flight":
            detail = f"this key has {told[0]} jobs that have not ended, and {job.in_flight} may be; try again when one has"
            raise Problem(429, detail, kind="too-many-jobs", retry_after_s=5)
        in_store = verdict == "stored"
        room, more = (self.limits.store_bytes, job.store_bytes) if in_store else (self.limits.redis_bytes, job.redis_bytes)
        detail = f"pictures take {told[0]} of {room} bytes, too many for {more} more; they expire in time"
        raise Problem(429, detail, kind="storage-full", retry_after_s=min(int(told[1]), 3600))

    async def _queue(self, model: str) -> Queue:
        """It asks for the server's version once, in a thread, so that nobody waits for that."""
        if model not in self._queues:
            queue = Queue(protocol.queue_name(model), connection=self._sync, serializer=JSONSerializer)
            await asyncio.to_thread(queue.get_redis_server_version)
            self._queues[model] = queue
        return self._queues[model]

    def _commands(self, job: Submission, queue: Queue) -> list[tuple[Any, ...]]:
        """What makes a job, rq's part in rq's own words: written on a pipeline that is never sent."""
        with self._sync.pipeline() as pipeline:
            enqueue(pipeline, queue, job.job_id, job.request, job.result_ttl_s)
            pipeline.hset(protocol.job_key(job.job_id), mapping=job.record)
            pipeline.xadd(protocol.events_key(job.job_id), {"event": "queued", "data": "{}"})
            return [tuple(arguments) for arguments, _ in pipeline.command_stack]


def other_body() -> Problem:
    detail = "this Idempotency-Key came with another body before; a key stands for one request"
    return Problem(422, detail, kind="idempotency-key-reused", errors=[{"field": "Idempotency-Key", "detail": detail}])


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
