"""What a worker writes about a job, each write fenced by its execution: one that has lost its lease changes nothing."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from redis import Redis

from worker import counts, protocol, scripts
from worker.protocol import CANCELED, FAILED, SUCCEEDED, GenerationRequest

_ANSWERS = ("lost", "run", "cancel")  # of scripts.PROGRESS
News = tuple[str, str, str, dict[str, Any], int | None]  # job id, execution, event ('' just asks), its data, step
End = tuple[str, str, list[dict[str, Any]]]  # job id, execution, pictures


_RECORD_FIELDS = ("version", "request", "checkpoint", "result_ttl_s", "previews", "store", "request_id")
Record = Sequence[bytes | None]


@dataclass(frozen=True)
class Order:
    """What a job's record asks of a worker."""

    request: GenerationRequest
    checkpoint: str  # that it is pinned to
    result_ttl_s: int
    previews: bool = False
    store: str = ""  # mark of the image store that its pictures go to; empty: Redis
    request_id: str = ""  # of the HTTP request that submitted it

    @classmethod
    def parse(cls, record: Record) -> Self:
        """ValueError if that is not of our kind."""
        version, text, pinned, ttl_s, previews, store, request_id = record
        if version not in (b"%d" % protocol.VERSION, b"%d" % (protocol.VERSION - 1)):
            raise ValueError(f"payload version {version!r} is not understood by this worker (version {protocol.VERSION})")
        if text is None or pinned is None or ttl_s is None:
            raise ValueError("the job's record lacks its request, its checkpoint or its TTL")
        if not 1 <= int(ttl_s) <= protocol.MAX_RESULT_TTL_S:
            raise ValueError(f"the job's results cannot live for {int(ttl_s)} s")
        request = GenerationRequest.parse(text.decode())
        return cls(request, pinned.decode(), int(ttl_s), previews == b"1", _text(store), _text(request_id))


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


def about(job_id: str, record: Record) -> dict[str, str]:
    """What a line of the log about a job carries."""
    return {"job_id": job_id, "request_id": _text(record[-1])}


class JobResults:
    """The worker's side of `dit:job:<id>`."""

    def __init__(self, connection: Redis) -> None:
        self.connection: Any = connection  # its answers are bytes here, which its types do not say
        self._give_back = connection.register_script(scripts.GIVE_BACK)

    def _keys(self, job_id: str) -> list[str]:
        return [protocol.job_key(job_id), protocol.events_key(job_id)]

    def start(self, job_id: str, execution: str) -> str:
        """'run' or 'alone', or why not: 'drop' (it has ended), 'cancel', 'exhausted' (tried too often), 'elsewhere' (it runs)."""
        return self.start_in(self.connection.pipeline(), job_id, execution)[0]

    def start_in(self, pipeline: Any, job_id: str, execution: str) -> tuple[str, Record]:
        """The same after what waits in the pipeline, and what `Order.parse` reads of the job."""
        pipeline.hmget(protocol.job_key(job_id), *_RECORD_FIELDS)
        # The whole text, since redis-py asks for each script of a pipeline first whether the server knows it.
        pipeline.eval(scripts.START, 2, *self._keys(job_id), job_id, execution, time.time(), protocol.EVENTS_KEPT)
        *_, record, verdict = pipeline.execute()
        return verdict.decode(), record

    def tell(self, job_id: str, execution: str, event: str = "", data: dict[str, Any] | None = None, step: int | None = None) -> str:
        """Publish an event (or none: just ask); answers 'run', 'cancel' or 'lost'."""
        return self.tell_all([(job_id, execution, event, data or {}, step)])[0][0]

    def tell_all(self, news: Sequence[News], pipeline: Any = None, ends: Sequence[End] = ()) -> tuple[list[str], list[bool]]:
        """The same for many jobs in one round trip, after what waits in the pipeline, and then successes, each as `succeed` answers."""
        pipeline = pipeline if pipeline is not None else self.connection.pipeline(transaction=False)
        for job_id, execution, event, data, step in news:
            arguments = (execution, "" if step is None else step, event, json.dumps(data), protocol.EVENTS_KEPT)
            pipeline.eval(scripts.PROGRESS, 2, *self._keys(job_id), *arguments)
        for job_id, execution, images in ends:
            self._end(pipeline, job_id, execution, SUCCEEDED, images)
        answers = [int(answer) for answer in pipeline.execute()[-len(news) - len(ends) :]]
        return [_ANSWERS[answer] for answer in answers[: len(news)]], [bool(answer) for answer in answers[len(news) :]]

    def store_image(self, job_id: str, execution: str, index: int, png: bytes, ttl_s: int, pipeline: Any = None) -> None:
        """Twice: the same bytes. Those of an execution that has lost the job are read by nobody and live for the TTL."""
        client = pipeline if pipeline is not None else self.connection
        client.set(protocol.image_key(job_id, execution, index), png, ex=ttl_s)

    def keep_images(self, job_id: str, execution: str, images: list[dict[str, Any]], ttl_s: int, pipeline: Any) -> None:
        """Those of a job live as long as the last of them."""
        for image in images:
            pipeline.expire(protocol.image_key(job_id, execution, image["index"]), ttl_s)

    def succeed(self, job_id: str, execution: str, images: list[dict[str, Any]]) -> bool:
        return self._end(self.connection, job_id, execution, SUCCEEDED, images) == 1

    def fail(self, job_id: str, execution: str, message: str, *, kind: str = counts.REFUSED, dead: bool = False) -> bool:
        """`kind` is one of counts.FAILURES. `dead`: every attempt ended with its worker, so the job goes on the list of such."""
        return self._end(self.connection, job_id, execution, FAILED, [], message, kind, dead) == 1

    def cancel(self, job_id: str, execution: str) -> bool:
        return self._end(self.connection, job_id, execution, CANCELED, []) == 1

    def _end(
        self,
        client: Any,
        job_id: str,
        execution: str,
        status: str,
        images: list[dict[str, Any]],
        error: str = "",
        kind: str = "",
        dead: bool = False,
    ) -> Any:
        """0: another execution owns the job."""
        done = json.dumps({"status": status, **({"error": error} if error else {})})
        arguments: list[Any] = [job_id, execution, status, time.time(), json.dumps(images), error, done, "dead" if dead else "", kind]
        return client.eval(scripts.FINISH, 2, *self._keys(job_id), *arguments)

    def give_back(self, job_id: str, execution: str) -> bool:
        """The job waits again, at the front of its queue. False: another execution owns it."""
        return bool(self._give_back(self._keys(job_id), [job_id, execution, json.dumps({"retry": True})]))
