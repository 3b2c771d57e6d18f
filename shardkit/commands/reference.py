"""`shardkit reference`: are reference tables the same on every physical shard, and make them so."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import typer
from rich.table import Table

from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.commands.output import console
from shardkit.config import default_file, load
from shardkit.errors import OperationError, TryAgainError
from shardkit.ops import reference as ops

__all__ = ["app"]

app = typer.Typer(
    name="reference", help="Reference tables: the same everywhere?", no_args_is_help=True
)


@app.command("check")
def check(*, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Compare every reference table with the home's; fails when one differs."""
    _, topology = load(config or default_file())
    found = ops.check(topology)
    _report(found, as_json=as_json)
    if found.differences:
        raise OperationError(
            f"{len(found.differences)} tables differ from those of {found.home}",
            hint="run shardkit reference repair",
        )


@app.command("repair")
def repair(
    *, dry_run: DryRunOption = False, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Make every reference table the same as the home's, in one transaction per server."""
    _, topology = load(config or default_file())
    _report(ops.check(topology) if dry_run else ops.repair(topology), as_json=as_json)


def _report(found: ops.ReferenceCheck, *, as_json: bool) -> None:
    if as_json:
        plain = {
            "home": found.home,
            "tables": dict(found.tables),
            "differences": [asdict(difference) for difference in found.differences],
            "failed": {name: str(error) for name, error in found.failed.items()},
            "repaired": dict(found.repaired),
        }
        json.dump(plain, sys.stdout, indent=2)
        print()
    elif not found.differences:
        print(f"{len(found.tables)} tables, as on {found.home}")
    else:
        table = Table("physical shard", "table", "rows", f"rows on {found.home}")
        for item in found.differences:
            rows = ("other columns" if n is None else str(n) for n in (item.rows, item.expected))
            table.add_row(item.physical, item.table, *rows)
        console().print(table)
        for physical, n_rows in found.repaired.items():
            print(f"{physical}: {n_rows} rows put or removed")
    if found.failed:
        name, error = next(iter(found.failed.items()))
        kind = TryAgainError if error.retryable else type(error)
        raise kind(f"physical shard {name!r}: {error.message}", hint=error.hint)
