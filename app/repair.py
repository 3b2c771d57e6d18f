"""Compares what is kept twice and mends it: `python -m app.repair --config shardkit.toml`.

Edges of follows against their other sides, people against what they are found by, captions against
their tags, and every count against what it counts. Reads the
primaries in pages and locks one row at a time, so it runs beside the service, as often as wanted;
it may be interrupted and run again, or begun at a logical shard.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from app import counts
from app.graph import repair
from app.photos import likes
from app.search import repair as search_repair
from app.settings import Settings
from app.tags import repair as tags_repair
from app.workers import relay_of
from shardkit import Cluster
from shardkit.errors import ConfigurationError, ShardkitError

__all__ = ["main", "run"]

FAILED, USAGE = 1, 2
KINDS = (
    repair.MISSING,
    repair.EXTRA,
    search_repair.MISSING,
    search_repair.STRAY,
    tags_repair.WRONG,
    *map(str, counts.COUNTS),
    likes.SLOTS_WRONG,
)


def main(
    config: Annotated[Path | None, typer.Option(help="the cluster's shardkit.toml")] = None,
    *,
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="rows compared at once")] = 500,
    from_shard: Annotated[int, typer.Option(min=0, help="first logical shard to look at")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="change nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON document")] = False,
) -> None:
    """Find follows that are there on one side only and counts that are wrong, and mend them."""
    try:
        settings = Settings.read(os.environ, config=config)
        with Cluster.from_file(settings.config) as cluster:
            found = run(cluster, n=batch, from_shard=from_shard, dry_run=dry_run)
    except (ShardkitError, ValidationError) as error:
        typer.echo(f"error: {error}", err=True)
        is_usage = isinstance(error, ConfigurationError | ValidationError)
        raise typer.Exit(USAGE if is_usage else FAILED) from None
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, "found": found}, indent=2))
        return
    for kind, n in found.items():
        typer.echo(f"{kind:<24}{n:>8}")
    done = "nothing was changed" if dry_run else "mended"
    typer.echo(done if any(found.values()) else "everything agrees")


def run(
    cluster: Cluster, *, n: int = 500, from_shard: int = 0, dry_run: bool = False
) -> dict[str, int]:
    """Compare everything and return what differed, by kind; all kinds are named.

    What is under way is delivered first, so that it does not count, and what was found is
    delivered at the end; other relays may still be at it for a moment.

    Args:
        cluster: whose rows.
        n: rows compared at once.
        from_shard: the first logical shard.
        dry_run: change nothing, deliver nothing.

    Raises:
        EndpointUnavailableError: a primary does not answer (retryable).
        GatherError: several do not (retryable).
    """
    found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    relay = relay_of(cluster)
    if not dry_run:
        relay.drain()
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        shards = range(from_shard, cluster.topology.n_logical_shards)
        for shard in bar.track(shards, description="logical shards"):
            found.update(repair.compare(cluster, shard, n=n, dry_run=dry_run))
            found.update(search_repair.compare(cluster, shard, n=n, dry_run=dry_run))
            found.update(tags_repair.mend(cluster, shard, n=n, dry_run=dry_run))
            found.update(likes.mend(cluster, shard, n=n, dry_run=dry_run))
            found.update(counts.mend(cluster, shard, n=n, dry_run=dry_run))
    if not dry_run:
        relay.drain()
    return dict(found)


if __name__ == "__main__":
    typer.run(main)
