"""`dit queues`: what waits and runs of each model; paused, drained and resumed."""

from typing import Annotated

import typer

from app.commands.common import fail, redis_to_ask
from app.commands.rows import JsonOption, tell

app = typer.Typer()

ServedArgument = Annotated[str, typer.Argument(help="A model that is served, or was.")]


@app.callback(invoke_without_command=True)
def queues_command(context: typer.Context, as_json: JsonOption = False) -> None:
    """What waits and runs of each model, and whether it is held up; without a command, lists it."""
    from dataclasses import asdict

    from app.queues import look

    if context.invoked_subcommand is not None:
        if as_json:
            fail(f"--json does not go before {context.invoked_subcommand}")
        return
    with redis_to_ask() as redis:
        rows = [{**asdict(queue), "oldest_s": round(queue.oldest_s, 1)} for queue in look(redis)]
    tell(rows, as_json, none="no model was ever served")


@app.command("pause")
def pause_command(model: ServedArgument) -> None:
    """Workers take no more jobs of it; what runs goes on, and jobs are accepted."""
    _set_queue(model, "paused")


@app.command("drain")
def drain_command(model: ServedArgument) -> None:
    """No more jobs of it are accepted; those that wait are worked off."""
    _set_queue(model, "draining")


@app.command("resume")
def resume_command(model: ServedArgument) -> None:
    """As if it had never been paused or drained."""
    _set_queue(model, "open")


def _set_queue(model: str, state: str) -> None:
    from app.queues import set_state

    try:
        with redis_to_ask() as redis:
            set_state(redis, model, state)
    except ValueError as error:
        fail(str(error))
    typer.echo(f"the queue of {model} is {state}")
