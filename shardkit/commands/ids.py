"""`shardkit ids`: read the ids of rows."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from shardkit.commands.options import JsonOption
from shardkit.errors import InvalidIdError
from shardkit.ids import IdParts, parse

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Read the ids of rows.")


@app.callback()
def ids() -> None:
    """Read the ids of rows."""


@app.command("parse")
def parse_ids(
    id: Annotated[list[str], typer.Argument(metavar="ID...", help="Decimal ids, as in a URL.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Show when ids were minted, on which logical shard, and their sequence."""
    parts = [(text, _parse(text)) for text in id]
    if as_json:
        # An id is a string in JSON: JavaScript numbers end at 2^53.
        rows = [
            {
                "id": text,
                "time": part.time.isoformat(timespec="milliseconds"),
                "logical_shard": part.logical_shard,
                "sequence": part.sequence,
            }
            for text, part in parts
        ]
        json.dump(rows, sys.stdout, indent=2)
        print()
        return
    table = Table("id", "time (UTC)", "logical shard", "sequence", box=None)
    for text, part in parts:
        time = part.time.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")
        table.add_row(text, time, str(part.logical_shard), str(part.sequence))
    Console().print(table)


def _parse(text: str) -> IdParts:
    if not (text.isascii() and text.isdigit()):
        raise InvalidIdError(f"{text!r} is not an id", hint="an id is a positive decimal number")
    return parse(int(text))
