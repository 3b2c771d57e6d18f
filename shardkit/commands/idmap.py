"""`shardkit idmap`: fill a map from ids to ids in Redis, look one up, check all of it."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.config import default_file, load
from shardkit.errors import ConfigurationError, DamagedMapError

if TYPE_CHECKING:
    from shardkit.idmap import IdMap

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Packed maps from ids to ids in Redis.")

NameArgument = Annotated[str, typer.Argument(help="The map's name.")]
UrlOption = Annotated[
    str | None,
    typer.Option("--redis", help="redis://…; else `[services] redis` of the configuration."),
]
ClusterOption = Annotated[
    bool, typer.Option("--cluster", help="The address is one of a Redis Cluster's servers.")
]
WidthOption = Annotated[
    int,
    typer.Option(min=2, max=8, help="Bytes of most values: 3 hold those below 16,777,215."),
]


@app.command("load")
def load_command(
    name: NameArgument,
    file: Annotated[
        Path, typer.Argument(help="An id and a value a line, sorted by id; - for standard input.")
    ],
    config: ConfigOption = None,
    *,
    redis: UrlOption = None,
    cluster: ClusterOption = False,
    width: WidthOption = 3,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Store entries from a file, beside programs that use the map; again does no harm."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from shardkit.ops import idmap as ops

    is_stdin = str(file) == "-"
    if not is_stdin and not file.is_file():
        raise ConfigurationError(f"{file}: there is no such file", hint="- reads standard input")
    with nullcontext(sys.stdin) if is_stdin else file.open(errors="replace") as lines:
        entries = ops.pairs(lines, "standard input" if is_stdin else str(file))
        if dry_run:
            counted = ops.count(entries)
            print(
                json.dumps({**asdict(counted), "dry_run": True})
                if as_json
                else f"{counted.entries:,} entries would be stored, values of up to "
                f"{counted.widest} bytes"
                + ("" if counted.is_sorted else "; not sorted by id: it will be slow")
            )
            return
        target = _opened(name, config, redis, width, is_cluster=cluster)
        columns = (SpinnerColumn(), TextColumn("{task.completed:,} entries"), TimeElapsedColumn())
        with Progress(*columns, disable=as_json or not sys.stderr.isatty()) as bar:
            task = bar.add_task("load", total=None)
            done = ops.load(
                target, entries, progress=lambda now: bar.update(task, completed=now.entries)
            )
    if as_json:
        print(json.dumps(done._asdict() | {"dry_run": False}))
    else:
        print(f"{done.entries:,} entries are in {name}, up to id {done.last_id}")


@app.command("get")
def get_command(
    name: NameArgument,
    id: Annotated[int, typer.Argument(help="The id.", min=0)],
    config: ConfigOption = None,
    *,
    redis: UrlOption = None,
    cluster: ClusterOption = False,
    width: WidthOption = 3,
    as_json: JsonOption = False,
) -> None:
    """Print the value of an id."""
    value = _opened(name, config, redis, width, is_cluster=cluster).get(id)
    if as_json:
        print(json.dumps({"id": str(id), "value": None if value is None else str(value)}))
    else:
        print(f"{id} has no value" if value is None else value)


@app.command("check")
def check_command(
    name: NameArgument,
    config: ConfigOption = None,
    *,
    redis: UrlOption = None,
    cluster: ClusterOption = False,
    width: WidthOption = 3,
    as_json: JsonOption = False,
) -> None:
    """Read a whole map: how many entries, how they are packed, and whether any block is damaged."""
    from shardkit.ops import idmap as ops

    found = ops.check(_opened(name, config, redis, width, is_cluster=cluster))
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in found.blocks.items() if n)
        share = f", {found.allocated_bytes / found.entries:.2f} an entry" if found.entries else ""
        print(f"{found.entries:,} entries in blocks: {kinds or 'none'}")
        print(f"{found.allocated_bytes:,} bytes{share}; values of up to {found.widest} bytes")
        for key, what in found.damaged.items():
            print(f"damaged: {key}: {what}")
        if found.may_evict:
            print("maxmemory-policy lets Redis throw blocks away: set it to noeviction")
    if found.damaged:
        raise DamagedMapError(
            f"{len(found.damaged)} keys of the map {name!r} are damaged",
            hint="delete them and load their ids again",
        )


def _opened(
    name: str, config: Path | None, url: str | None, width: int, *, is_cluster: bool
) -> IdMap:
    from shardkit.idmap import IdMap
    from shardkit.ops import idmap as ops

    if url is None:
        file = config or default_file()
        settings, _ = load(file)
        url = settings.services.get("redis")
        if url is None:
            raise ConfigurationError(
                f"{file}: services.redis is not set", hint="give --redis redis://host:6379/0"
            )
    client: Any = ops.connect(url, is_cluster=is_cluster)
    return IdMap(client, name, width=width)
