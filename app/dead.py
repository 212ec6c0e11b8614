"""Jobs that were given up because their workers died: a list of them, and the way back into the queue."""

import json
import re
from dataclasses import dataclass
from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from app.admission import enqueue
from worker import protocol
from worker.protocol import DEAD_KEY, GenerationRequest

_FORGOTTEN = ("error", "started_at", "finished_at", "images", "execution")  # of a job that starts afresh


@dataclass(frozen=True)
class DeadJob:
    """What there is to know before it is tried again."""

    id: str
    owner: str  # the id of a key, as `dit key list` shows it; empty where there are none
    model: str
    class_labels: list[int | None]
    attempts: int
    ended_at: float  # Unix seconds
    error: str


def dead_jobs(redis: Redis) -> list[DeadJob]:
    """The newest first. Ids whose record has expired are forgotten on the way."""
    connection: Any = redis  # its answers are bytes here, which its types do not say
    ended = {job_id.decode(): score for job_id, score in connection.zrange(DEAD_KEY, 0, -1, desc=True, withscores=True)}
    with connection.pipeline(transaction=False) as pipeline:
        for job_id in ended:
            pipeline.hmget(protocol.job_key(job_id), "model", "request", "attempts", "error", "owner")
        records = dict(zip(ended, pipeline.execute(), strict=True))
    expired = [job_id for job_id, record in records.items() if record[1] is None]
    if expired:
        connection.zrem(DEAD_KEY, *expired)
    return [_dead_job(job_id, ended[job_id], *record) for job_id, record in records.items() if job_id not in expired]


def _dead_job(job_id: str, ended_at: float, *record: bytes | None) -> DeadJob:
    """Of a damaged record what can be read: all the others shall be listed too."""
    model, request, attempts, error, owner = ((value or b"").decode(errors="replace") for value in record)
    try:
        labels = list(GenerationRequest.parse(request).class_labels)
    except ValueError:
        labels = []
    return DeadJob(job_id, owner, model, labels, int(attempts) if re.fullmatch("[0-9]{1,9}", attempts) else 0, ended_at, error)


def requeue(redis: Redis, job_id: str) -> None:
    """Start a dead job afresh, with all its attempts. ValueError if it has expired, is not dead (any more), or its record is damaged.

    It was accepted once: neither the bound of its queue, nor that of its owner's jobs in flight, nor a closed gate stands in its way, and
    from now on it counts towards both bounds. The bytes of its pictures are in the books until it expires. Record, events, the owner's
    jobs in flight and the rq job change in one transaction, which ends without effect if another was quicker.
    """
    keys = (protocol.job_key(job_id), protocol.events_key(job_id), DEAD_KEY)
    redis.transaction(lambda pipeline: _requeue(pipeline, redis, job_id), *keys)


def _requeue(pipeline: Any, redis: Redis, job_id: str) -> None:
    """Reads under the watch of a transaction, then says what belongs to it."""
    request, ttl_s, owner = _dead_request(pipeline, job_id)
    key, events = protocol.job_key(job_id), protocol.events_key(job_id)
    last = pipeline.xrevrange(events, count=1)
    queue = Queue(protocol.queue_name(request.model), connection=redis, serializer=JSONSerializer)
    pipeline.multi()
    queue.failed_job_registry.remove(job_id, pipeline=pipeline)
    pipeline.delete(f"{Job.redis_job_namespace_prefix}{job_id}")  # the rq job that failed, with the time at which it would expire
    enqueue(pipeline, queue, job_id, request, ttl_s)
    pipeline.hset(key, mapping={"status": protocol.QUEUED, "attempts": 0, "step": 0})
    pipeline.hdel(key, *_FORGOTTEN)
    pipeline.persist(key)
    if last:
        pipeline.xdel(events, last[0][0])  # its 'done': whoever reads the events stops there
    pipeline.xadd(events, {"event": "queued", "data": json.dumps({"retry": True})})
    pipeline.persist(events)
    pipeline.zrem(DEAD_KEY, job_id)
    if owner:  # whose next submission may have found that this one had ended
        pipeline.sadd(protocol.active_key(owner), job_id)


def _dead_request(pipeline: Any, job_id: str) -> tuple[GenerationRequest, int, str]:
    """What a dead job was asked for, how many seconds its result lives, and whose it is. ValueError if it is not dead."""
    is_dead = pipeline.zscore(DEAD_KEY, job_id) is not None  # asked first, so that the status told is the one it has since
    status, text, ttl_s, owner = pipeline.hmget(protocol.job_key(job_id), "status", "request", "result_ttl_s", "owner")
    if status is None:
        raise ValueError(f"there is no job {job_id[:60]!a}, or its record has expired; submit it again")
    if not is_dead:
        raise ValueError(f"job {job_id} is {status.decode()}, and not among the dead")
    if text is None or ttl_s is None:
        raise ValueError(f"the record of job {job_id} lacks its request or its TTL")
    return GenerationRequest.parse(text.decode()), int(ttl_s), (owner or b"").decode()
