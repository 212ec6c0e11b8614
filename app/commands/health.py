"""`dit health`: for the health checks of containers."""

from typing import Annotated

import typer

from app.commands.common import fail, read_settings

app = typer.Typer(help="For health checks: status 0, or 1 and what is wrong.", no_args_is_help=True)


@app.command("api")
def api_health_command() -> None:
    """Whether the API of this machine answers."""
    from app.health import ailment

    settings = read_settings()
    _tell_health("the API", ailment(settings.host, settings.port))


@app.command("worker")
def worker_health_command(
    alive: Annotated[bool, typer.Option("--alive", help="Only whether its loop goes round: what a restart could mend.")] = False,
) -> None:
    """Whether the worker of this host goes round its loop, is known to Redis and serves a model."""
    from worker.pulse import ailment, pulse_path

    _tell_health("the worker", ailment(pulse_path(read_settings().data), only_alive=alive))


def _tell_health(who: str, ailment: str | None) -> None:
    if ailment is not None:
        fail(ailment)
    typer.echo(f"{who} is well")
