"""What several commands share: how one fails, options, the settings, and the Redis that it asks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from redis import Redis

    from app.settings import Settings

CONFIGURATION_ERROR = 78  # see app.local: the supervisor does not start such a child again

CheckpointArgument = Annotated[Path, typer.Argument(help="A checkpoint folder, or a registry entry with versions.")]
DataOption = Annotated[
    Path, typer.Option("--data", help="Folder of training data: one sub-folder of images per class, or IDX, CIFAR, *.tar, *.parquet files.")
]


def fail(message: str, code: int = 1) -> NoReturn:
    """One clear line on stderr, and an exit code."""
    typer.echo(f"dit: {message}", err=True)
    raise typer.Exit(code)


def read_settings() -> "Settings":
    """Those of the environment; where one is wrong, the command ends with what is allowed."""
    from app.settings import load_settings

    try:
        return load_settings()
    except ValueError as error:
        fail(str(error), CONFIGURATION_ERROR)


@contextmanager
def redis_to_ask() -> "Iterator[Redis]":
    """The Redis that there is to ask; one that does not answer ends the command with one line."""
    from redis.exceptions import RedisError

    from app.usage import open_redis

    settings = read_settings()
    try:
        client = open_redis(settings.redis_url, settings.data, settings.redis_password)
    except ValueError as error:
        fail(f"DIT_REDIS_URL: {error}", CONFIGURATION_ERROR)
    if client is None:
        fail(f"there is no Redis to ask: DIT_REDIS_URL is not set, and no `dit up` runs over {settings.data.resolve()}")
    try:
        with client:
            yield client
    except (RedisError, OSError) as error:
        fail(f"Redis does not answer: {error}")
