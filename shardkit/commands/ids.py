"""`shardkit ids`: read the ids of rows, and mint some."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.table import Table

from shardkit.commands.options import ConfigOption, JsonOption
from shardkit.commands.output import console
from shardkit.errors import InvalidIdError
from shardkit.ids import IdParts, parse
from shardkit.minting import MAX_MINT

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Read the ids of rows, and mint some.")


@app.callback()
def ids() -> None:
    """Read the ids of rows, and mint some."""


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
    console().print(table)


@app.command("mint")
def mint_ids(
    config: ConfigOption = None,
    *,
    logical_shard: Annotated[int, typer.Option(help="The logical shard the ids will carry.")],
    count: Annotated[int, typer.Option(min=1, max=MAX_MINT, help="How many.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Mint ids of a logical shard, one a line, through a lease from its own database."""
    from shardkit.cluster import Cluster
    from shardkit.config import default_file

    with Cluster.from_file(config or default_file()) as cluster:
        minted = cluster.connections.ids.mint({logical_shard: count})[logical_shard]
    texts = [str(new) for new in minted]
    if as_json:
        json.dump({"logical_shard": logical_shard, "ids": texts}, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(texts))


def _parse(text: str) -> IdParts:
    if not (text.isascii() and text.isdigit()):
        raise InvalidIdError(f"{text!r} is not an id", hint="an id is a positive decimal number")
    return parse(int(text))
