"""What a worker writes about a job, each write fenced by its execution: one that has lost its lease changes nothing."""

import json
import time
from typing import Any

from redis import Redis

from worker import protocol
from worker.protocol import CANCELED, FAILED, SUCCEEDED, GenerationRequest


class JobResults:
    """The worker's side of `dit:job:<id>`."""

    def __init__(self, connection: Redis) -> None:
        self.connection: Any = connection  # its answers are bytes here, which its types do not say
        scripts = (protocol.START, protocol.PROGRESS, protocol.FINISH, protocol.REQUEUE)
        self._start, self._progress, self._finish, self._requeue = (connection.register_script(s) for s in scripts)

    def _keys(self, job_id: str) -> list[str]:
        return [protocol.job_key(job_id), protocol.events_key(job_id)]

    def start(self, job_id: str, execution: str) -> str:
        """'run', or why not: 'drop' (it has ended), 'cancel', 'exhausted' (tried too often)."""
        answer = self._start(self._keys(job_id), [execution, time.time(), protocol.MAX_ATTEMPTS])
        return str(answer.decode())

    def request(self, job_id: str, checkpoint: str) -> GenerationRequest:
        """The job's request; ValueError if its version or content is not ours, or it was resolved for another checkpoint than this."""
        version, text, pinned = self.connection.hmget(protocol.job_key(job_id), "version", "request", "checkpoint")
        if version not in (b"%d" % protocol.VERSION, b"%d" % (protocol.VERSION - 1)):
            raise ValueError(f"payload version {version!r} is not understood by this worker (version {protocol.VERSION})")
        if text is None or pinned is None:
            raise ValueError("the job's record lacks its request or its checkpoint")
        if pinned.decode() != checkpoint:
            raise ValueError(
                f"the job is pinned to checkpoint {pinned.decode()[:12]}, but {checkpoint[:12]} is served now; submit it again"
            )
        return GenerationRequest.parse(text.decode())

    def tell(self, job_id: str, execution: str, event: str = "", data: dict[str, Any] | None = None, step: int | None = None) -> str:
        """Publish an event (or none: just ask); answers 'run', 'cancel' or 'lost'."""
        arguments: list[Any] = [execution, "" if step is None else step, event, json.dumps(data or {}), protocol.EVENTS_KEPT]
        return ("lost", "run", "cancel")[int(self._progress(self._keys(job_id), arguments))]

    def store_image(self, job_id: str, execution: str, index: int, png: bytes, ttl_s: int) -> None:
        self.connection.set(protocol.image_key(job_id, execution, index), png, ex=ttl_s)

    def ttl_s(self, job_id: str) -> int:
        return int(self.connection.hget(protocol.job_key(job_id), "result_ttl_s") or 0)

    def succeed(self, job_id: str, execution: str, images: list[dict[str, Any]]) -> bool:
        return self._end(job_id, execution, SUCCEEDED, images, "")

    def fail(self, job_id: str, execution: str, message: str) -> bool:
        return self._end(job_id, execution, FAILED, [], message)

    def cancel(self, job_id: str, execution: str) -> bool:
        return self._end(job_id, execution, CANCELED, [], "")

    def _end(self, job_id: str, execution: str, status: str, images: list[dict[str, Any]], error: str) -> bool:
        done = json.dumps({"status": status, **({"error": error} if error else {})})
        arguments: list[Any] = [execution, status, time.time(), json.dumps(images), error, done]
        return bool(self._finish(self._keys(job_id), arguments))

    def give_back(self, job_id: str, execution: str = "") -> bool:
        """The job waits again; an empty execution stands for whichever had it."""
        return bool(self._requeue(self._keys(job_id), [execution, json.dumps({"retry": True})]))

    def execution(self, job_id: str) -> str:
        return (self.connection.hget(protocol.job_key(job_id), "execution") or b"").decode()
