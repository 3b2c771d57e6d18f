"""`shardkit lookup`: fill, check and repair what keeps unique columns unique."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shardkit.commands.options import ConfigOption, JsonOption
from shardkit.commands.output import console
from shardkit.errors import ConfigurationError

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Fill, check and repair what keeps unique columns unique."
)

ModelsOption = Annotated[
    str | None,
    typer.Option("--models", help="The models, as module:Base; instead of migrations.models."),
]
LookupOption = Annotated[
    str | None, typer.Option("--lookup", help="One column, as table.column; else every one.")
]
BatchOption = Annotated[int, typer.Option(min=1, max=10_000, help="Rows read at a time.")]
PauseOption = Annotated[
    float, typer.Option(min=0, max=60, help="Seconds between two reads of a physical shard.")
]
FromOption = Annotated[
    int, typer.Option("--from-shard", min=0, max=8191, help="Leave out logical shards below.")
]


@app.command()
def backfill(
    config: ConfigOption = None,
    *,
    models: ModelsOption = None,
    lookup: LookupOption = None,
    batch: BatchOption = 500,
    pause: PauseOption = 0.0,
    from_shard: FromOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Take in the rows that were there before their column was declared unique.

    Runs beside those who write; safe to interrupt and to run again. Rows that have one value are
    listed, and all of them are found by it.
    """
    _run("backfill", config, models, lookup, (batch, pause, from_shard), as_json=as_json)


@app.command()
def check(
    config: ConfigOption = None,
    *,
    models: ModelsOption = None,
    lookup: LookupOption = None,
    batch: BatchOption = 500,
    pause: PauseOption = 0.0,
    from_shard: FromOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare every row with what its value names, and the other way round; changes nothing."""
    _run("check", config, models, lookup, (batch, pause, from_shard), as_json=as_json)


@app.command()
def repair(
    config: ConfigOption = None,
    *,
    models: ModelsOption = None,
    lookup: LookupOption = None,
    batch: BatchOption = 500,
    pause: PauseOption = 0.0,
    from_shard: FromOption = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as check.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add what is missing and remove what is stale; safe to interrupt and to run again."""
    kind = "check" if dry_run else "repair"
    _run(kind, config, models, lookup, (batch, pause, from_shard), as_json=as_json)


def _run(
    kind: Any,
    config: Any,
    models: str | None,
    wanted: str | None,
    pace: tuple[int, float, int],
    *,
    as_json: bool,
) -> None:
    from shardkit.cluster import Cluster
    from shardkit.config import default_file, load
    from shardkit.ops import lookup as ops
    from shardkit.ops.migrate import load_metadata

    file = config or default_file()
    settings, topology = load(file)
    models = models or settings.migrations.models
    if models is None:
        raise ConfigurationError(
            f"{file}: migrations.models is not set",
            hint='add [migrations] models = "module:Base", or give --models',
        )
    if os.getcwd() not in sys.path:  # noqa: PTH109  sys.path holds text
        sys.path.insert(0, os.getcwd())  # noqa: PTH109  the package may be the one at hand
    lookups = ops.lookups_in(load_metadata(models), wanted)
    limits = ops.Limits(*pace)
    out = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    reports = []
    with (
        Cluster(topology, pool=settings.pool) as cluster,
        Progress(*columns, console=out, disable=as_json or not out.is_terminal) as bar,
    ):
        for lookup in lookups:
            n_shards = max(0, topology.n_logical_shards - limits.from_shard)
            task = bar.add_task(lookup.name, total=n_shards)
            reports.append(
                ops.run(
                    cluster,
                    lookup,
                    kind,
                    limits=limits,
                    on_shard=lambda _, task=task: bar.advance(task),  # type: ignore[misc]
                )
            )
    if as_json:
        json.dump([_as_json(report) for report in reports], sys.stdout, indent=2)
        print()
    else:
        for report in reports:
            _print(report)
    for report in reports:
        if report.error:
            raise report.error


def _print(report: Any) -> None:
    print(
        f"{report.lookup}: {report.n_rows:,} rows, {report.n_missing:,} missing, "
        f"{report.n_added:,} added; {report.n_pairs:,} pairs, {report.n_stale:,} stale, "
        f"{report.n_removed:,} removed; {report.n_busy:,} busy"
    )
    for row_ids in sorted(report.duplicates):
        print(f"  one value: {', '.join(map(str, row_ids))}")
    for row_id in sorted(report.unkept):
        print(f"  cannot be kept unique: {row_id}")


def _as_json(report: Any) -> dict[str, Any]:
    # An id is a string in JSON: JavaScript numbers end at 2^53.
    return {
        "lookup": report.lookup,
        "rows": report.n_rows,
        "missing": report.n_missing,
        "added": report.n_added,
        "pairs": report.n_pairs,
        "stale": report.n_stale,
        "removed": report.n_removed,
        "busy": report.n_busy,
        "duplicates": [[str(row_id) for row_id in group] for group in sorted(report.duplicates)],
        "unkept": [str(row_id) for row_id in sorted(report.unkept)],
    }
