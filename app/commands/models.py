"""`dit models`: the registry's versions, published, rolled back and removed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.commands.common import CheckpointArgument, fail, read_settings
from app.commands.rows import JsonOption, iso, tell

if TYPE_CHECKING:
    from app.usage import Usage

app = typer.Typer()

ModelArgument = Annotated[str, typer.Argument(help="A model of the registry.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Also where Redis cannot tell which versions are needed.")]


@app.callback(invoke_without_command=True)
def models_command(context: typer.Context, as_json: JsonOption = False) -> None:
    """Models of the registry and their versions; without a command, lists them."""
    if context.invoked_subcommand is None:
        list_models_command(as_json)
    elif as_json:
        fail(f"--json does not go before {context.invoked_subcommand}")


@app.command("list")
def list_models_command(
    as_json: JsonOption = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, to find what is damaged.")] = False,
) -> None:
    """Every version, the newest first: whether a worker serves it, and how many jobs wait for it or run on it."""

    from app.usage import UsageUnknown, find_usage
    from model.registry import models, versions

    settings = read_settings()
    usage, unknown = None, "DIT_REDIS_URL is not set, and no `dit up` runs"
    try:
        usage = find_usage(settings.redis_url, settings.data, settings.redis_password)
    except UsageUnknown as reason:
        unknown = str(reason)
    if usage is None:
        typer.echo(f"dit: what is served and waited for is unknown: {unknown}", err=True)
    rows = [
        {
            "model": model,
            "version": version.hash[:12] or version.name,
            "hash": version.hash or None,
            "latest": version.is_latest,
            "published_at": None if version.published_at is None else iso(version.published_at),
            "size_bytes": version.size_bytes,
            "served": None if usage is None else (model, version.hash) in usage.served,
            "jobs": None if usage is None else usage.jobs.get(version.hash, 0),
            "error": version.error,
        }
        for model, entry in models(settings.checkpoints).items()
        for version in versions(entry, thorough=verify)
    ]
    table = [{name: value for name, value in row.items() if name != "hash"} | {"error": row["error"] or ""} for row in rows]
    tell(rows, as_json, none=f"no model in {settings.checkpoints.resolve()}", table=table)


@app.command("publish")
def publish_command(
    checkpoint: CheckpointArgument,
    model: Annotated[str, typer.Argument(help="The model's name; made if there is none.")],
) -> None:
    """Copy a checkpoint into the registry as the latest version of a model; workers that serve it take it over."""
    from model.registry import publish

    try:
        identity = publish(read_settings().checkpoints, model, checkpoint)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(f"published {checkpoint} as {model}, version {identity[:12]}")


@app.command("rollback")
def rollback_command(
    model: ModelArgument,
    version: Annotated[
        str | None, typer.Argument(help="The beginning of its hash; by default the one published before the latest.")
    ] = None,
) -> None:
    """Make an older version the latest."""
    from model.registry import roll_back

    try:
        identity = roll_back(_entry(model), version)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(f"the latest version of {model} is {identity[:12]}")


@app.command("remove")
def remove_command(
    model: ModelArgument,
    version: Annotated[str, typer.Argument(help="The beginning of its hash.")],
    force: ForceOption = False,
) -> None:
    """Delete a version that is not the latest and that no job and no worker needs."""
    from model.registry import choose, remove

    try:
        entry = _entry(model)
        chosen, usage = choose(entry, version), _usage(force)
        needed = usage and usage.of(model, chosen.hash)
        if needed:
            fail(f"version {chosen.name} of {model} stays: {needed}")
        typer.echo(f"removed version {remove(entry, chosen.name)} of {model}")
    except (ValueError, OSError) as error:
        fail(str(error))


@app.command("prune")
def prune_command(
    model: ModelArgument,
    keep: Annotated[int, typer.Option(min=0, help="Versions to keep besides the latest, the newest first.")] = 0,
    force: ForceOption = False,
) -> None:
    """Delete every version that is not the latest and that no job and no worker needs."""
    from model.registry import remove, versions

    try:
        entry, usage = _entry(model), _usage(force)
        found = versions(entry)
        if not any(version.is_latest and not version.error for version in found):
            fail(f"nothing is removed: no sound version of {model} is the latest; publish one or roll back first")
        superfluous = [version for version in found if not version.is_latest][keep:]
        for version in superfluous:
            needed = usage and usage.of(model, version.hash)
            typer.echo(f"kept version {version.name}: {needed}" if needed else f"removed version {remove(entry, version.name)}")
    except (ValueError, OSError) as error:
        fail(str(error))
    if not superfluous:
        typer.echo(f"nothing to remove of {model}")


def _entry(model: str) -> Path:
    from model.registry import models

    registry = read_settings().checkpoints
    found = models(registry)
    if model not in found:
        raise ValueError(f"no model {model!r} in {registry.resolve()}, which has: {', '.join(found) or 'none'}")
    return found[model]


def _usage(force: bool) -> "Usage | None":
    """What must not be removed; None if there is no queue, or if that was not to matter."""
    from app.usage import UsageUnknown, find_usage

    settings = read_settings()
    try:
        return find_usage(settings.redis_url, settings.data, settings.redis_password)
    except UsageUnknown as reason:
        if not force:
            fail(f"nothing is removed while jobs may need it ({reason}); --force removes it all the same")
        return None
