"""`shardkit cache`: whether servers answer, emptying one, and whether any shows something old."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.config import default_file, load
from shardkit.errors import ConfigurationError, OperationError

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The cache's servers, and what they show.")


@app.command("status")
def status_command(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Show whether every cache server answers."""
    from shardkit.ops import cache as ops

    settings, _ = load(config or default_file())
    found = ops.node_status(settings.found_cache)
    if as_json:
        print(json.dumps([asdict(node) for node in found]))
    elif not found:
        print(f'[cache] backend = "{settings.cache.backend}" has no servers')
    else:
        table = Table("server", "use", "answers", "", box=None)
        for node in found:
            answers = "no" if node.seconds is None else f"{node.seconds * 1000:.1f} ms"
            remark = "holds old data: shardkit cache flush" if node.must_flush else ""
            table.add_row(node.name, "gutter" if node.is_gutter else "", answers, remark)
        Console(soft_wrap=True).print(table)
    if silent := [node.name for node in found if not node.answers]:
        raise OperationError(
            f"{len(silent)} of {len(found)} cache servers are not read: {', '.join(silent)}",
            hint="start them, or flush those that hold old data; requests go on without them",
        )


@app.command("flush")
def flush_command(
    node: Annotated[str, typer.Argument(help="The server, as `shardkit cache status` says it.")],
    config: ConfigOption = None,
    *,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Empty one cache server, for every process; reads of its rows go to the database once."""
    from shardkit.ops import cache as ops

    settings, _ = load(config or default_file())
    done = ops.flush(settings.found_cache, node, dry_run=dry_run)
    if as_json:
        print(json.dumps({"node": node, "flushed": done and not dry_run, "dry_run": dry_run}))
    else:
        print(f"{node} {'would be' if dry_run else 'is'} emptied" if done else f"{node}: no answer")
    if not done:
        raise OperationError(f"{node} does not answer", hint="start it, then flush it again")


@app.command("audit")
def audit_command(
    config: ConfigOption = None,
    *,
    models: Annotated[
        str | None,
        typer.Option("--models", help="The models, as module:Base; instead of migrations.models."),
    ] = None,
    rows: Annotated[
        int,
        typer.Option(min=1, max=1_000_000, help="Commits sampled at most, and rows, about."),
    ] = 1000,
    watch: Annotated[
        float, typer.Option(min=0, max=86_400, help="Seconds that commits are watched; 0 for none.")
    ] = 5.0,
    after: Annotated[
        list[float] | None,
        typer.Option(min=0, max=3600, help="Seconds after that, repeatable; 0.25, 1 and 5."),
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(
            "--metrics",
            "--metrics-file",
            help="Write the counts of each server there, for Prometheus to collect.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read what was committed from every cache server, and compare with the database.

    Commits as they are seen in the outboxes, with the lists and counts that they change, and rows
    that were written lately; at 0.25, 1 and 5 seconds after that. Writes nothing. Ends with 1 when
    a server shows something older than what had been committed.
    """
    from shardkit.ops import cacheaudit as ops
    from shardkit.ops.cachesamples import plans_in
    from shardkit.ops.placed import as_placed

    file = config or default_file()
    settings, topology = load(file)
    location = models or settings.migrations.models
    if location is None:
        raise ConfigurationError(
            f"{file}: migrations.models is not set",
            hint='add [migrations] models = "module:Base", or give --models',
        )
    if os.getcwd() not in sys.path:  # noqa: PTH109  sys.path holds text
        sys.path.insert(0, os.getcwd())  # noqa: PTH109  the package may be the one at hand
    plans, delays = plans_in(location), after or ops.DELAYS
    report = ops.audit(
        as_placed(topology), settings.found_cache, plans, rows=rows, watch=watch, delays=delays
    )
    if metrics is not None:
        ops.write_metrics(report, metrics)
    if as_json:
        print(json.dumps({**asdict(report), "bound": report.bound}))
    else:
        print(
            f"{report.commits:,} changes committed meanwhile and {report.rows:,} rows, "
            f"{report.checked:,} reads: {report.consistent:,} consistent, "
            f"{report.cached:,} from an entry, {report.unanswered:,} unanswered"
        )
        if report.bound is not None:
            print(f"no read was old: at most {report.bound:.1e} of all are, at 95 % confidence")
        if report.violations:
            table = Table("server", "table", "row", "committed", "shown", "after", box=None)
            for each in report.violations[:50]:
                row, found = ", ".join(each.identity), str(each.found or "no row")
                values = (each.node, each.table, row, str(each.committed), found)
                table.add_row(*values, f"{each.after:g} s")
            Console(soft_wrap=True).print(table)
    if report.violations:
        raise OperationError(
            f"{len(report.violations)} reads were shown something old",
            hint="is a relay running? `shardkit cache flush` empties a server",
        )
