"""`shardkit export` and `shardkit import`: one logical shard as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardkit.commands.migrated import print_json
from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.commands.output import console
from shardkit.config import default_file, load

if TYPE_CHECKING:
    from shardkit.backup.shardfile import ShardFile

__all__ = ["export", "import_"]


def export(
    shard: Annotated[int, typer.Argument(min=0, max=8191, help="Number of the logical shard.")],
    config: ConfigOption = None,
    *,
    into: Annotated[Path, typer.Option("--into", help="An empty or new folder.")],
    as_json: JsonOption = False,
) -> None:
    """Write one logical shard to files: its rows as PostgreSQL's COPY has them, and its schema.

    Of one moment, while writers go on. All of it is there, or nothing.
    """
    from shardkit.backup.exporting import export as run

    _, topology = load(config or default_file())
    with _bar(f"logical shard {shard}", quiet=as_json) as told:
        _report(run(topology, shard, into, on_table=told), "exported", as_json=as_json)


def import_(
    folder: Annotated[Path, typer.Argument(help="Of the export.")],
    config: ConfigOption = None,
    *,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read an exported logical shard into the same, empty one of this or another cluster.

    One transaction: all of it is there, or nothing.
    """
    from shardkit.backup.importing import import_shard

    _, topology = load(config or default_file())
    with _bar(str(folder), quiet=as_json) as told:
        done = import_shard(topology, folder, dry_run=dry_run, on_table=told)
    _report(done, "would import" if dry_run else "imported", as_json=as_json)
    if not as_json and not dry_run:
        print("now: shardkit lookup repair, for unique values; shardkit cache flush, for caches")


def _report(found: ShardFile, what: str, *, as_json: bool) -> None:
    if as_json:
        document: dict[str, Any] = {
            "logical_shard": found.logical_shard,
            "cluster": found.cluster,
            "at": found.at.isoformat(),
            "rows": {name: table.rows for name, table in found.tables.items()},
        }
        print_json(document)
    else:
        print(
            f"{what} logical shard {found.logical_shard} of {found.cluster}, {found.n_rows:,} rows "
            f"of {len(found.tables)} tables, as of {found.at:%F %T} UTC"
        )


@contextmanager
def _bar(title: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    from rich.progress import Progress

    out = console(stderr=True)
    with Progress(console=out, disable=quiet or not out.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda _, done, total: bar.update(task, completed=done, total=total)
