"""What operators do with pictures: `python -m app.photos stats|scrub|compact|sweep`.

All of it runs beside the service, from any process of the machine that has the volumes, and may be
interrupted and run again. Printing is here; the work is in `store.compaction` and `sweep`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from app.clock import utc_now
from app.photos import sweep as sweeping
from app.photos.opening import open_blobs
from app.photos.store import compaction
from app.photos.store.volumefile import numbers_in
from app.settings import Settings
from shardkit import Cluster
from shardkit.errors import ConfigurationError, ShardkitError

__all__ = ["cli"]

FAILED, USAGE = 1, 2
WIDTH = 120
"""Columns of a table; figures that are cut off say nothing."""

cli = typer.Typer(no_args_is_help=True, help=__doc__, rich_markup_mode=None, add_completion=False)

Config = Annotated[Path | None, typer.Option(help="the cluster's shardkit.toml")]
AsJson = Annotated[bool, typer.Option("--json", help="print a JSON document")]
Numbers = Annotated[list[int] | None, typer.Argument(help="volumes; all when none is named")]


@cli.command()
def stats(config: Config = None, *, as_json: AsJson = False) -> None:
    """Show how full volumes are, and what a compaction would give back."""
    found = [asdict(each) for each in compaction.stats(_root(_settings(config)))]
    _show(found, as_json=as_json)


@cli.command()
def scrub(volumes: Numbers = None, config: Config = None, *, as_json: AsJson = False) -> None:
    """Read volumes whole and check every needle; exit 1 when one is damaged."""
    root = _root(_settings(config))
    found = [compaction.scrub(root, number) for number in _chosen(root, volumes)]
    _show([asdict(each) for each in found], as_json=as_json)
    if any(each.damaged for each in found):
        raise typer.Exit(FAILED)


@cli.command()
def compact(
    volumes: Numbers = None,
    config: Config = None,
    *,
    dead: Annotated[
        float, typer.Option(min=0, max=1, help="only those with this share of deleted bytes")
    ] = 0.25,
    as_json: AsJson = False,
) -> None:
    """Copy what lives in volumes and free the rest; those in use are sealed and done next time."""
    root = _root(_settings(config))
    chosen = set(_chosen(root, volumes))
    found = []
    for each in compaction.stats(root):
        if each.volume not in chosen or not each.dead_bytes or each.dead_bytes < dead * each.bytes:
            continue
        done = compaction.compact(root, each.volume)
        state = "in use, sealed" if done is None else "compacted"
        freed = 0 if done is None else done.before - done.after
        found.append({"volume": each.volume, "state": state, "freed_bytes": freed})
    _show(found, as_json=as_json)


@cli.command()
def sweep(
    config: Config = None,
    *,
    grace: Annotated[
        float, typer.Option(min=0, help="seconds between the first sight and the removal")
    ] = 3600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="change nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove bytes that no photo shows, at the second sight; exit 1 when a photo has none."""
    settings = _settings(config)

    async def run(cluster: Cluster) -> sweeping.Swept:
        blobs = open_blobs(settings)
        try:
            return await sweeping.sweep(
                cluster,
                blobs,
                settings.media_folder / "orphans.json",
                utc_now(),
                grace=dt.timedelta(seconds=grace),
                dry_run=dry_run,
            )
        finally:
            await blobs.close()

    try:
        with Cluster.from_file(settings.config) as cluster:
            found = asyncio.run(run(cluster))
    except ShardkitError as error:
        raise _failure(error) from None
    _show([asdict(found)], as_json=as_json)
    if found.missing:
        raise typer.Exit(FAILED)


def _settings(config: Path | None) -> Settings:
    try:
        settings = Settings.read(os.environ, config=config)
        Cluster.from_file(settings.config)  # refuse a wrong file in one line; opens nothing
    except (ConfigurationError, ValidationError) as error:
        raise _failure(error) from None
    return settings


def _failure(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    is_usage = isinstance(error, ConfigurationError | ValidationError)
    return typer.Exit(USAGE if is_usage else FAILED)


def _root(settings: Settings) -> Path:
    if settings.blobs != "volumes":
        typer.echo(f"error: pictures are in {settings.blobs}, there are no volumes", err=True)
        raise typer.Exit(USAGE)
    return settings.media_folder


def _chosen(root: Path, volumes: Sequence[int] | None) -> list[int]:
    there = numbers_in(root)
    if unknown := set(volumes or ()) - set(there):
        typer.echo(f"error: no volume {', '.join(map(str, sorted(unknown)))} in {root}", err=True)
        raise typer.Exit(USAGE)
    return list(volumes or there)


def _show(found: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    if not found:
        typer.echo("nothing to do")
        return
    table = Table(box=None)
    for name in found[0]:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for each in found:
        table.add_row(*map(_text, each.values()))
    Console(highlight=False, width=max(Console().width, WIDTH)).print(table)


def _text(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case list():
            return ", ".join(map(str, value)) or "none"
        case _:
            return str(value)


if __name__ == "__main__":
    cli()
