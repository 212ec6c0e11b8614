"""How long a queued job waits until an idle worker has taken it: what queueing.py calls RING_S.

    python benchmarks/ring.py [--jobs 200]

A redis-server of this machine, this process that queues a job and rings as a submission does, and a process beside it that takes jobs as a
worker without work does: by `worker.intake`, without a model. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from _service import end_on_sigterm, facts, free_port, percentiles
from redis import Redis
from redis_load import redis_server

from worker import protocol
from worker.intake import Intake

MODEL, TAKEN = "ring", "taken"
EVERY_S = 0.02
WAIT_S = 60  # for an answer of the process beside this one, which imports much


def take(url: str) -> None:
    """Until it is killed: the job's id, which is when it was queued, and when it was there."""
    redis: Any = Redis.from_url(url, protocol=2, socket_timeout=2 * WAIT_S)
    intake = Intake(redis, "a-worker")
    redis.rpush(TAKEN, "ready")
    while True:
        found = intake.take([MODEL], lambda model: True, idle=True)
        if found:
            redis.rpush(TAKEN, f"{found[1]} {time.time()}")
        else:
            intake.listen([MODEL])


def queue(redis: Any) -> None:
    with redis.pipeline() as pipeline:
        pipeline.rpush(f"rq:queue:{protocol.queue_name(MODEL)}", time.time())
        pipeline.lpush(protocol.bell_key(MODEL), "1")
        pipeline.execute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    options = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as name, redis_server(Path(name), free_port()) as url:
        redis: Any = Redis.from_url(url, protocol=2, socket_timeout=2 * WAIT_S)
        worker = multiprocessing.get_context("spawn").Process(target=take, args=(url,), daemon=True)
        worker.start()
        redis.blpop(TAKEN, WAIT_S)
        waits = []
        for _ in range(options.jobs):
            queue(redis)
            queued, taken = redis.blpop(TAKEN, WAIT_S)[1].split()
            waits.append(1000 * (float(taken) - float(queued)))
            time.sleep(EVERY_S)
        worker.kill()
    print(json.dumps({**facts("ring"), "jobs": options.jobs, "ms": percentiles(waits)}))


if __name__ == "__main__":
    main()
