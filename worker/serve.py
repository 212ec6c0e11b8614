"""`dit worker`: load a checkpoint once, warm the device, tell Redis what is served, and work until told to stop."""

import logging
from pathlib import Path

import torch
from redis import Redis
from torch._dynamo.exc import BackendCompilerFailed

from model.checkpoint import DTYPES, Checkpoint, CheckpointError, load
from model.samplers import available_samplers, available_spacings, max_steps
from worker.engine import Engine
from worker.protocol import ModelRecord
from worker.rq_worker import DiTWorker
from worker.runner import DECODE_BUCKETS, SMALLEST_DECODE, SMALLEST_FORWARD, Runner, affordable, can_compile

log = logging.getLogger("dit.worker")

ROWS_CPU, ROWS_CUDA = 32, 128
TICK_S = 2.0  # that a forward on the CPU may take, where the smallest one does not take longer


def find_model(registry: Path, name: str | None) -> tuple[str, Path]:
    """The model's id and folder in the registry; CheckpointError says what there is."""
    models = sorted(p.name for p in registry.iterdir() if p.is_dir() and not p.name.startswith(".")) if registry.is_dir() else []
    if name is None and len(models) == 1:
        name = models[0]
    if name is None or name not in models:
        asked = f"no model {name!r}" if name else "DIT_MODEL must choose a model, since there is not just one"
        raise CheckpointError(f"{asked} in {registry.resolve()}, which has: {', '.join(models) or 'none'}")
    return name, registry / name


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"DIT_DEVICE={name}: {str(error).splitlines()[0]}") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the processor has it, else float32."""
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise ValueError(f"DIT_DTYPE={name}: must be auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def describe(model: str, checkpoint: Checkpoint, runner: Runner) -> ModelRecord:
    config = checkpoint.config
    samplers = available_samplers(config.objective, config.architecture.learn_sigma)
    return ModelRecord(
        id=model,
        checkpoint=checkpoint.hash,
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
        device=str(checkpoint.device),
        dtype=str(next(checkpoint.dit.parameters()).dtype).removeprefix("torch."),
        max_rows=runner.max_rows,
    )


def _warm_runner(checkpoint: Checkpoint, max_rows: int, max_decode: int, compile: bool) -> Runner:
    """A compiler that fails costs speed, and a small memory the width of a batch, but not the service.

    Raises ValueError if the smallest batches do not fit the device's memory.
    """
    while True:
        runner = Runner(checkpoint, max_rows=max_rows, max_decode=max_decode, compile=compile)
        log.info("%s", "compiling and warming up (the first time takes a minute)" if compile else "warming up")
        try:
            runner.warm_up()
            return runner
        except torch.OutOfMemoryError as error:
            if max_rows <= SMALLEST_FORWARD and max_decode <= SMALLEST_DECODE:
                raise ValueError(f"the model does not fit the device: {str(error).splitlines()[0]}") from error
            log.warning("out of memory with %d rows to a forward and %d images to a decode; trying half", max_rows, max_decode)
            max_rows, max_decode = max(SMALLEST_FORWARD, max_rows // 2), max(SMALLEST_DECODE, max_decode // 2)
        except BackendCompilerFailed as error:
            log.warning("compiling failed, so the model runs uncompiled, more slowly: %s", str(error).strip().splitlines()[-1])
            compile = False
        del runner
        torch._dynamo.reset()
        torch.cuda.empty_cache()  # does nothing where there is no CUDA


def serve(
    *,
    redis_url: str,
    registry: Path,
    model: str | None,
    device: str = "auto",
    dtype: str = "auto",
    max_rows: int | None = None,
    compile: bool = True,
) -> None:
    """Runs until SIGTERM or SIGINT. Raises CheckpointError or ValueError before anything is served."""
    name, folder = find_model(registry, model)
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    log.info("loading %s on %s in %s", folder, where, str(kind).removeprefix("torch."))
    checkpoint = load(folder, where)
    checkpoint.dit.to(kind)
    if checkpoint.vae:  # decoding is a small part of the work: on the CPU in float32, which spares a grey level
        checkpoint.vae.cast(kind if where.type == "cuda" else torch.float32)
    if compile and not can_compile(where):
        log.warning("no C++ compiler was found, so the model runs uncompiled, more slowly")
        compile = False
    rows, decode = ROWS_CUDA, DECODE_BUCKETS[-1]
    if where.type == "cpu" and checkpoint.vae:
        rows, decode = affordable(checkpoint, TICK_S, ROWS_CPU)
    rows = max_rows or rows
    log.info("at most %d rows to a forward and %d images to a decode", rows, decode)
    runner = _warm_runner(checkpoint, rows, decode, compile)
    worker = DiTWorker(Engine(runner), describe(name, checkpoint, runner), Redis.from_url(redis_url, protocol=2))
    log.info("serving %s, checkpoint %s", name, checkpoint.hash[:12])
    worker.work(logging_level="WARNING")
