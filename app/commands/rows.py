"""How a command lists things: `--json`, or a table for people."""

from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="A list of objects.")]


def iso(seconds: float) -> str:
    """A time of the clock, in UTC."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def tell(rows: list[dict[str, Any]], as_json: bool, *, none: str, table: list[dict[str, Any]] | None = None) -> None:
    """A list of objects, or a table (of `table`, where that differs), or `none` for no rows."""
    import json

    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        _print_table(rows if table is None else table)
    else:
        typer.echo(none)


def _print_table(rows: list[dict[str, Any]]) -> None:
    """A column per key; what is None is not known."""

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else ""
        return "?" if value is None else str(value)

    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(map(str.ljust, line, widths)).rstrip())
