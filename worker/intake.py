"""Where jobs come from: the queues of several models, looked at in turn without blocking, and their bells to wait on."""

from collections.abc import Callable, Sequence
from typing import Any

from redis import Redis
from rq.queue import Queue
from rq.suspension import WORKERS_SUSPENDED

from worker import protocol, scripts

LISTEN_S = 1  # for a ring; then the queues are looked at anyway, for jobs that came without one


class Intake:
    """Takes one job at a time. rq's own dequeue loses the job of a worker that dies, when it serves several queues."""

    def __init__(self, connection: Redis, worker: str) -> None:
        self._connection: Any = connection
        self._worker = worker
        self._take = connection.register_script(scripts.TAKE)
        self._next: str | None = None  # the model whose turn it is
        self.suspended = False  # whether `rq suspend` held, when it last looked

    def take(self, models: Sequence[str], wants: Callable[[str], bool], *, idle: bool) -> tuple[str, str] | None:
        """(model, job id) of a job that now is in the intermediate list of its queue; None if there is none for this worker."""
        order = [model for model in self._in_turn(models) if wants(model)]
        self.suspended = False
        if not order:
            return None
        queues = [f"{Queue.redis_queue_namespace_prefix}{protocol.queue_name(model)}" for model in order]
        keys = [
            key
            for model, queue in zip(order, queues, strict=True)
            for key in (queue, f"{queue}:intermediate", protocol.bell_key(model), protocol.gate_key(model))
        ]
        answer = self._take([WORKERS_SUSPENDED, *keys], ["idle" if idle else "busy", self._worker])
        verdict = answer[0] if answer else b""
        self.suspended = verdict == b"suspended"
        if verdict == b"wait":  # until this worker's jobs have ended; then that model comes first
            self._next = order[answer[1]]
        if verdict != b"job":
            return None
        self._next = order[(answer[1] + 1) % len(order)]
        return order[answer[1]], answer[2].decode()

    def _in_turn(self, models: Sequence[str]) -> list[str]:
        first = models.index(self._next) if self._next in models else 0
        return [*models[first:], *models[:first]]

    def listen(self, models: Sequence[str]) -> None:
        """Until a bell rings, or LISTEN_S are over."""
        self._connection.blpop([protocol.bell_key(model) for model in models], LISTEN_S)
