"""`dit key`: keys of the API, made, listed and revoked."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from app.commands.common import CONFIGURATION_ERROR, fail, read_settings
from app.commands.rows import JsonOption, tell

app = typer.Typer(help="Keys of the API, in the file that DIT_API_KEYS_FILE names.", no_args_is_help=True)


@app.command("create")
def create_key_command(
    name: Annotated[str, typer.Option(help="Whose it is, for people; jobs and limits belong to the key.")],
    scope: Annotated[Literal["generate", "train", "admin"], typer.Option(help="What it may; an admin may everything.")],
    per_minute: Annotated[int | None, typer.Option(min=1, help="Calls a minute; by default without a limit.")] = None,
    in_flight: Annotated[int | None, typer.Option(min=1, help="Jobs that have not ended; by default without a limit.")] = None,
) -> None:
    """Make a key and print it: this once, since only its hash is kept."""
    from app.keys import create_key

    path = _key_file()
    try:
        entry, secret = create_key(path, name, scope, per_minute=per_minute, in_flight=in_flight)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(f"dit: key {entry.id} of {name} is in {path}; nobody can show it again:", err=True)
    typer.echo(secret)


@app.command("list")
def list_keys_command(as_json: JsonOption = False) -> None:
    """Every key, in the order in which they were made; what is kept of a secret is not told."""
    from dataclasses import asdict

    from app.auth import read_keys

    try:
        rows = [{name: value for name, value in asdict(entry).items() if name != "sha256"} for entry in read_keys(_key_file())]
    except ValueError as error:
        fail(str(error))
    table = [{name: "" if value is None else value for name, value in row.items()} for row in rows]
    tell(rows, as_json, none="no key was made", table=table)


@app.command("revoke")
def revoke_key_command(identity: Annotated[str, typer.Argument(metavar="ID", help="As `dit key list` shows it.")]) -> None:
    """Refuse a key from now on; a running API notices at its next call."""
    from app.keys import revoke_key

    try:
        entry = revoke_key(_key_file(), identity)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(f"revoked key {entry.id} of {entry.name}")


def _key_file() -> Path:
    path = read_settings().api_keys_file
    if path is None:
        fail("DIT_API_KEYS_FILE must name the file that holds the keys", CONFIGURATION_ERROR)
    return path
