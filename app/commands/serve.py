"""`dit up`, `dit api` and `dit worker`: what runs until it is stopped."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands.common import CONFIGURATION_ERROR, fail, read_settings

if TYPE_CHECKING:
    from app.settings import Settings

app = typer.Typer()


@app.command("up")
def up_command(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint folder, or whatever `dit import` takes; by default what DIT_CHECKPOINTS holds.")
    ] = None,
) -> None:
    """Run everything on this machine: embedded server, worker, API and page."""
    from app.local import StartError, up

    try:
        up(_door_settings(), model)
    except StartError as error:
        fail(str(error))


@app.command("api")
def api_command() -> None:
    """Run the HTTP API alone, over the Redis of DIT_REDIS_URL."""
    import uvicorn

    from app.door import Door, raise_file_limit
    from app.local import end_with_supervisor
    from app.logs import log_to_stderr
    from app.main import create_app

    settings = _door_settings()
    log_to_stderr(settings.log_format)
    end_with_supervisor()
    raise_file_limit()
    try:
        application = create_app(settings)
    except ValueError as error:
        fail(str(error), CONFIGURATION_ERROR)
    how: dict[str, Any] = {"http": Door, "log_config": None, "log_level": "warning", "timeout_graceful_shutdown": 3}
    uvicorn.run(application, host=settings.host, port=settings.port, **how)


@app.command("worker")
def worker_command() -> None:
    """Run one worker over the Redis of DIT_REDIS_URL."""
    from app.local import end_with_supervisor
    from app.logs import log_to_stderr

    settings = read_settings()
    if settings.redis_url is None:
        fail("DIT_REDIS_URL must be set for a worker alone (`dit up` brings a server of its own)", CONFIGURATION_ERROR)
    log_to_stderr(settings.log_format)
    end_with_supervisor()
    from worker.gpus import see_only_ones_own
    from worker.pulse import pulse_path

    if settings.device == "auto":
        see_only_ones_own(settings.data)
    # Before torch is imported, which reads it once: compiled graphs outlive the process, so that a second start is quick.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.data.resolve() / "compiled"))
    from worker.serve import serve

    try:
        serve(
            redis_url=settings.redis_url,
            redis_password=settings.redis_password,
            registry=settings.checkpoints,
            models=settings.models,
            device=settings.device,
            dtype=settings.dtype,
            max_rows=settings.max_rows,
            compile=settings.compile,
            reproducible=settings.reproducible,
            block_cache=settings.block_cache,
            drain_s=settings.drain_seconds,
            hang_s=settings.hang_seconds,
            trace=settings.trace,
            pulse=pulse_path(settings.data),
            image_store=settings.image_store,
            result_ttl_s=settings.result_ttl,
        )
    except ValueError as error:  # CheckpointError is one
        fail(str(error), CONFIGURATION_ERROR)


def _door_settings() -> "Settings":
    """Of a command that opens the port."""
    from app.auth import read_keys
    from app.settings import check_exposure

    settings = read_settings()
    try:
        check_exposure(settings)
    except ValueError as error:
        fail(str(error), CONFIGURATION_ERROR)
    try:
        if settings.api_keys_file is not None:
            read_keys(settings.api_keys_file)
    except ValueError as error:
        fail(f"DIT_API_KEYS_FILE={error}", CONFIGURATION_ERROR)
    return settings
