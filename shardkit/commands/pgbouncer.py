"""`shardkit pgbouncer`: PgBouncer's files from the topology as it is now."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.config import default_file, load
from shardkit.errors import ConfigurationError
from shardkit.secret import Secret

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="PgBouncer's files from the topology as it is now.")


@app.callback()
def group() -> None:
    """PgBouncer's files from the topology as it is now."""


@app.command()
def render(
    config: ConfigOption = None,
    *,
    output: Annotated[
        Path, typer.Option(help="Folder; each physical shard gets one in it.")
    ] = Path("pgbouncer"),
    physical: Annotated[
        list[str] | None, typer.Option(help="Only this physical shard; may be repeated.")
    ] = None,
    owner: Annotated[
        str | None, typer.Option(help="User who runs PgBouncer and so reads userlist.txt.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 when a file differs.")
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write pgbouncer.ini and userlist.txt of every physical shard; reload PgBouncer afterwards.

    Names lead to the server that has the role now. The files of a run that changes nothing are
    left alone.
    """
    from shardkit.ops import poolers

    file = config or default_file()
    settings, topology = load(file)
    unknown = sorted(set(physical or ()) - topology.physical.keys())
    if unknown:
        raise ConfigurationError(
            f"no physical shard {', '.join(unknown)}",
            hint=f"there are {', '.join(topology.physical)}",
        )
    logins = {}
    if password := Secret(os.environ.get("SHARDKIT_POOLER_PASSWORD", "")):
        logins[settings.pgbouncer.auth_user] = password
    folder = output.absolute()
    found = [
        each
        for each in poolers.render(settings, topology, folder=folder, logins=logins)
        if not physical or each.physical in physical
    ]
    changes = {each.physical: poolers.changed(each, folder) for each in found}
    if not (check or dry_run):
        for each in found:
            poolers.write(each, folder, owner=owner)
    if as_json:
        document = {
            each.physical: {
                "folder": str(folder / each.physical),
                "changed": changes[each.physical],
                "written": bool(changes[each.physical]) and not (check or dry_run),
                "silent": list(each.silent),
                "databases": {
                    database.name: {
                        "host": database.host,
                        "port": database.port,
                        "dbname": database.dbname,
                        "read_only": database.is_read_only,
                        "pool_size": database.size,
                    }
                    for database in each.databases
                },
            }
            for each in found
        }
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        for each in found:
            names = changes[each.physical]
            told = f"{', '.join(names)} differ" if names else "as it is"
            print(f"{each.physical}: {told}")
            for address in each.silent:
                print(f"  {address} does not answer; taken for what {file} says", file=sys.stderr)
    if check and any(changes.values()):
        raise typer.Exit(1)
