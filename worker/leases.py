"""A job under a lease: what the worker knows of it, and what it renews."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from redis import Redis
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job
from rq.utils import now, utcformat
from rq.worker import BaseWorker

from worker import protocol, scripts
from worker.patience import impatient_client
from worker.protocol import WORKER_TTL_S, ModelRecord
from worker.results import Order


@dataclass(eq=False)
class Lease:
    """A job this worker runs."""

    job: Job
    execution: Execution
    order: Order
    images: list[dict[str, Any]] = field(default_factory=list)  # that Redis knows of
    kept_at: float = 0.0  # monotonic; when their lives were last counted anew
    writing: int = 0  # pictures on their way into the image store
    drawn: bool = False  # no more pictures will come
    step: int = 0  # that was told last

    def __post_init__(self) -> None:
        executions = ExecutionRegistry(job_id=self.job.id, connection=self.job.connection)
        self.keys = (self.job.started_job_registry.key, self.execution.key, executions.key, self.job.key)
        self.about = {"job_id": self.job.id, "request_id": self.order.request_id}  # for the log


class Promises:
    """Renewed in one step, by a client of their own: the heart must not wait for what the loop waits for."""

    def __init__(self, connection: Redis) -> None:
        self._beat = impatient_client(connection).register_script(scripts.BEAT)

    def renew(self, worker: BaseWorker, records: Sequence[ModelRecord], leases: Sequence[Lease], trouble: str = "") -> bool:
        """`trouble`: what keeps it from taking jobs. False if the server has forgotten the worker. Raises RedisError."""
        keys = [worker.key, worker.executions_key, protocol.MODELS_KEY, *(protocol.model_key(record.id) for record in records)]
        moment = now()
        arguments: list[Any] = [WORKER_TTL_S, worker.get_state(), utcformat(moment), moment.timestamp(), trouble, len(records)]
        for record in records:
            arguments += [record.id, record.dump()]
        for lease in leases:
            keys += lease.keys
            arguments += [lease.job.id, lease.execution.id]
        return bool(self._beat(keys, arguments))
