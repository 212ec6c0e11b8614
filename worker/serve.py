"""`dit worker`: load checkpoints, warm the device, tell Redis what is served, and work until told to stop."""

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
from redis import Redis
from redis.exceptions import AuthenticationError, RedisError

from model.checkpoint import CheckpointConfig
from model.samplers import available_samplers, available_spacings, max_steps
from worker.connect import connect
from worker.device import choose_device, choose_dtype, use_device
from worker.engine import Engine
from worker.load import Loader
from worker.models import Shelf
from worker.patience import impatient_client
from worker.protocol import ModelRecord
from worker.rq_worker import DiTWorker
from worker.runner import Runner
from worker.stores import REDIS, open_store
from worker.writer import Writer

log = logging.getLogger("dit.worker")

_MEMORY_SHARE = 0.6  # of what is free at the start: for weights


def describe(model: str, config: CheckpointConfig, checkpoint: str, runner: Runner | None, loader: Loader) -> ModelRecord:
    """What the API is told; `max_rows` is 0 while the model is not resident."""
    samplers = available_samplers(config.objective, config.architecture.learn_sigma)
    return ModelRecord(
        id=model,
        checkpoint=checkpoint,
        labels=[list(names) for names in config.labels],
        image_size=config.image_size,
        image_channels=config.image_channels,
        objective=config.objective.kind,
        samplers=samplers,
        spacings=available_spacings(config.objective),
        default_spacings={name: spacing for name in samplers if (spacing := config.spacing_of(name))},
        max_steps=max_steps(config.objective),
        defaults=config.defaults,
        quality=config.quality,
        metrics={name: value for name, value in config.metrics.items() if isinstance(value, int | float)},
        device=str(loader.device),
        dtype=str(loader.dtype).removeprefix("torch."),
        max_rows=runner.max_rows if runner else 0,
        block_cache=loader.block_cache,
        rows_per_s=round(runner.rows_per_s, 3) if runner else 0.0,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses on the device, or, for the CPU, that the system could give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration):
        return 8 << 30  # no Linux: a guess that holds any one model


def trace_to(file: TextIO) -> Callable[[dict[str, Any]], None]:
    """One JSON line a tick; see docs/engine.md."""

    def write(entry: dict[str, Any]) -> None:
        file.write(json.dumps(entry) + "\n")
        file.flush()

    return write


def serve(
    *,
    redis_url: str,
    redis_password: str | None = None,
    registry: Path,
    models: list[str] | None,
    device: str = "auto",
    dtype: str = "auto",
    max_rows: int | None = None,
    compile: bool = True,
    reproducible: bool = False,
    block_cache: bool = False,
    drain_s: float,
    hang_s: float | None = None,
    trace: Path | None = None,
    pulse: Path | None = None,
    image_store: str = REDIS,
    result_ttl_s: int = 86_400,
) -> None:
    """Runs until SIGTERM or SIGINT. CheckpointError or ValueError before anything is served.

    `pulse`: the file for `dit health worker`. `image_store`: as DIT_IMAGE_STORE. `result_ttl_s`: see Sweeper.
    """
    if pulse:
        pulse.unlink(missing_ok=True)  # a worker's of before, which would be believed while this one loads
    redis = connect(redis_url, password=redis_password, protocol=2)
    _knock(redis)
    writer = Writer(open_store(image_store))
    writer.open()
    where = choose_device(device)
    use_device(where)
    loader = Loader(
        where, choose_dtype(dtype, where), max_rows=max_rows, compile=compile, reproducible=reproducible, block_cache=block_cache
    )

    def tell(model: str, config: CheckpointConfig, checkpoint: str, runner: Runner | None) -> ModelRecord:
        return describe(model, config, checkpoint, runner, loader)

    shelf = Shelf(registry, models, loader, tell, budget_bytes=int(_MEMORY_SHARE * free_bytes(where)))
    with trace.open("w") if trace else nullcontext() as file:
        engine = Engine(shelf, trace_to(file) if file else None)
        worker = DiTWorker(engine, redis, drain_s=drain_s, hang_s=hang_s, pulse=pulse, writer=writer, result_ttl_s=result_ttl_s)
        log.info("serving %s", ", ".join(f"{record.id} ({record.checkpoint[:12]})" for record in shelf.records()))
        worker.work(logging_level="WARNING")


def _knock(redis: Redis) -> None:
    """A wrong password is told now, and not after minutes of loading. A Redis that is away may come."""
    try:
        with impatient_client(redis) as client:
            client.ping()
    except AuthenticationError as error:
        raise ValueError(f"Redis does not let this worker in: {error}") from error
    except (RedisError, OSError) as error:
        log.warning("Redis: %s; it may come while the models are loaded", error)
