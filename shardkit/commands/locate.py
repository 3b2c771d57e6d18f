"""`shardkit locate`: where an id or a shard key lives, and why."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from shardkit.commands.options import ConfigOption, JsonOption
from shardkit.config import default_file, load
from shardkit.keys import KeyType
from shardkit.ops import locate as ops
from shardkit.ops.placed import as_placed

__all__ = ["locate"]


def locate(
    id: Annotated[str | None, typer.Argument(metavar="ID", help="A decimal id.")] = None,
    *,
    key: Annotated[
        str | None, typer.Option("--key", help="A shard key instead; bytes in hexadecimal.")
    ] = None,
    key_type: Annotated[
        KeyType | None,
        typer.Option("--type", help="Type of the key, else that of the table, else text."),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option("--table", help="Table whose recorded strategy counts; else it is hashed."),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where an id or a shard key lives: logical shard, physical shard, servers, and why."""
    if (id is None) == (key is None):
        raise typer.BadParameter("give an ID or --key VALUE, one of them")
    if id is not None and (table is not None or key_type is not None):
        raise typer.BadParameter("--table and --type go with --key; an id says by itself")
    topology = as_placed(load(config or default_file())[1])
    if id is not None:
        found = ops.locate_id(topology, id)
    else:
        assert key is not None, "one of them was given"
        found = ops.locate_key(topology, key, key_type=key_type, table=table)
    if as_json:
        json.dump(asdict(found), sys.stdout, indent=2)
        print()
        return
    print(f"logical shard   {found.logical_shard} ({found.schema})")
    print(f"physical shard  {found.physical}")
    for number, endpoint in enumerate(found.endpoints):
        print(f"{'servers' if not number else '':<16}{endpoint}")
    print(f"why             {found.why}")
