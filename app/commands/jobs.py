"""`dit jobs`: those that were given up."""

from typing import Annotated

import typer

from app.commands.common import fail, redis_to_ask
from app.commands.rows import JsonOption, iso, tell

app = typer.Typer(help="Jobs that were given up.", no_args_is_help=True)


@app.command("dead")
def dead_command(as_json: JsonOption = False) -> None:
    """Jobs that were given up since their workers died, the newest first."""
    from dataclasses import asdict

    from app.dead import dead_jobs

    with redis_to_ask() as redis:
        rows = [{**asdict(job), "ended_at": iso(job.ended_at)} for job in dead_jobs(redis)]
    tell(rows, as_json, none="no job was given up")


@app.command("requeue")
def requeue_command(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]…")] = None,
    all_of_them: Annotated[bool, typer.Option("--all", help="Every job that `dit jobs dead` lists.")] = False,
) -> None:
    """Start given up jobs afresh, with all their attempts."""
    from app.dead import dead_jobs, requeue

    if bool(ids) == all_of_them:
        fail("name the jobs that shall start afresh, or say --all")
    refused = False
    with redis_to_ask() as redis:
        for job_id in ids or [job.id for job in dead_jobs(redis)]:
            try:
                requeue(redis, job_id)
                typer.echo(f"job {job_id} waits again")
            except ValueError as error:
                typer.echo(f"dit: {error}", err=True)
                refused = True
    if refused:
        raise typer.Exit(1)
