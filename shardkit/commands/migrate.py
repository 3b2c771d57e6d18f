"""`shardkit migrate`: bring every logical shard to the newest revision."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.commands.output import console
from shardkit.config import default_file, format_ranges, load
from shardkit.errors import ConfigurationError, TryAgainError
from shardkit.ops import migrate as ops
from shardkit.ops.revisions import Revision
from shardkit.topology import Topology

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Bring every logical shard to the newest revision.")

MigrationsOption = Annotated[
    str | None,
    typer.Option(
        "--migrations",
        help="Where the revisions are: package:folder or a path; instead of migrations.location.",
    ),
]
ModelsOption = Annotated[
    str | None,
    typer.Option(
        "--models",
        help="The models, as module:Base, to record how they place rows; instead of "
        "migrations.models.",
    ),
]
DEFAULTS = ops.Limits()


@app.command("apply")
def apply_command(
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    models: ModelsOption = None,
    lock_timeout: Annotated[
        float, typer.Option(min=0.01, max=10, help="Seconds to queue for a lock.")
    ] = DEFAULTS.lock_timeout,
    lock_attempts: Annotated[
        int, typer.Option(min=1, max=1000, help="Attempts per logical shard to get its locks.")
    ] = DEFAULTS.lock_attempts,
    statement_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds one statement may run.")
    ] = DEFAULTS.statement_timeout,
    connections: Annotated[
        int, typer.Option(min=1, max=32, help="Transactions at once per physical shard.")
    ] = DEFAULTS.connections,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Create missing logical shards and apply pending revisions to all of them.

    Safe to interrupt, to kill and to run again: a rerun continues.
    """
    topology, revisions, rules, cached = _inputs(config, migrations, models)
    if dry_run:
        _print_plan(ops.plan(topology, revisions, rules=rules), as_json=as_json)
        return
    limits = ops.Limits(
        lock_timeout=lock_timeout,
        lock_attempts=lock_attempts,
        statement_timeout=statement_timeout,
        connections=connections,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    out = console(stderr=True)
    with Progress(*columns, console=out, disable=as_json or not out.is_terminal) as bar:
        tasks = {}

        def on_plan(plan: ops.MigrationPlan) -> None:
            for part in plan.physical:
                tasks[part.physical] = bar.add_task(part.physical, total=len(part.work))

        outcome = ops.apply(
            topology,
            revisions,
            rules=rules,
            cached=cached,
            limits=limits,
            on_plan=on_plan,
            on_done=lambda physical, _logical_shard: bar.advance(tasks[physical]),
        )
    if as_json:
        _print_json(_outcome_json(outcome))
    else:
        _print_outcome(outcome)
    if outcome.error:
        raise outcome.error


@app.command("plan")
def plan_command(
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    models: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what apply would do, with the SQL; the same as apply --dry-run."""
    topology, revisions, rules, _ = _inputs(config, migrations, models)
    _print_plan(ops.plan(topology, revisions, rules=rules), as_json=as_json)


@app.command("status")
def status_command(
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    models: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how many logical shards are at which revision, and which lag behind."""
    topology, revisions, rules, _ = _inputs(config, migrations, models)
    found = ops.status(topology, revisions, rules=rules)
    if as_json:
        _print_json(_status_json(found))
    else:
        table = Table(
            "physical shard", "logical shards", "revision", "pending", "laggards", box=None
        )
        for entry in found.physical:
            if entry.error:
                table.add_row(entry.physical, "?", f"unknown: {entry.error.message}")
                continue
            at = ", ".join(f"{rev or 'none'}: {n}" for rev, n in (entry.at or {}).items())
            pending = ", ".join(f"{rev}: {n}" for rev, n in (entry.pending or {}).items())
            laggards = format_ranges(entry.laggards)
            table.add_row(
                entry.physical, str(entry.n_logical_shards), at, pending or "-", laggards or "-"
            )
        console().print(table)
        if unrecorded := sorted({name for entry in found.physical for name in entry.unrecorded}):
            print(f"not recorded how they place their rows: {', '.join(unrecorded)}")
    if errors := [entry.error for entry in found.physical if entry.error]:
        raise errors[0]


def _inputs(
    given: Path | None, migrations: str | None, models: str | None
) -> tuple[Topology, tuple[Revision, ...], ops.Rules | None, ops.Cached | None]:
    config = given or default_file()
    settings, topology = load(config)
    location = migrations or settings.migrations.location
    if location is None:
        raise ConfigurationError(
            f"{config}: migrations.location is not set",
            hint='add [migrations] location = "package:folder", or give --migrations',
        )
    if os.getcwd() not in sys.path:  # noqa: PTH109  sys.path holds text
        sys.path.insert(0, os.getcwd())  # noqa: PTH109  the package may be the one at hand
    folder = Path() if migrations else config.parent
    models = models or settings.migrations.models
    rules = ops.load_rules(models) if models else None
    cached = ops.load_cached(models) if models else None
    return topology, ops.load_revisions(location, folder=folder), rules, cached


def _print_plan(plan: ops.MigrationPlan, *, as_json: bool) -> None:
    if as_json:
        _print_json(_plan_json(plan))
        return
    out = console()
    for revision in plan.pending:
        out.print(f"-- {revision.id} {revision.summary}", style="bold", markup=False)
        for statement in revision.statements:
            out.print(f"{statement};", markup=False)
    for part in plan.physical:
        out.print(f"{part.physical}: {_summary(part)}", markup=False)


def _summary(part: ops.PhysicalPlan) -> str:
    if part.error:
        return f"left alone: {part.error}"
    new = [work.logical_shard for work in part.work if work.is_new]
    used = [work.logical_shard for work in part.work if not work.is_new]
    parts = [
        f"create {format_ranges(new)}" if new else "",
        f"migrate {format_ranges(used)}" if used else "",
        "complete the admin schema" if part.admin else "",
        f"record how {', '.join(sorted(part.rules))} place their rows" if part.rules else "",
        f"{part.n_current} current" if part.n_current else "",
        *(f"wait for {number}: {why}" for number, why in part.waiting.items()),
    ]
    return "; ".join(text for text in parts if text) or "nothing placed here"


def _print_outcome(outcome: ops.MigrationOutcome) -> None:
    out = console()
    for part in outcome.plan.physical:
        done = outcome.done.get(part.physical, ())
        if part.physical in outcome.failed:
            text = f"failed after {len(done)} of {len(part.work)} logical shards"
        elif not part.work and not part.waiting:
            text = f"nothing to do, {part.n_current} logical shards current"
        else:
            text = f"{len(done)} of {len(part.work) + len(part.waiting)} logical shards migrated"
        out.print(f"{part.physical}: {text}", markup=False)


def _plan_json(plan: ops.MigrationPlan) -> dict[str, Any]:
    return {
        "pending": [
            {"revision": r.id, "summary": r.summary, "statements": r.statements}
            for r in plan.pending
        ],
        "physical": {
            part.physical: {
                "admin": part.admin,
                "rules": part.rules,
                "create": [w.logical_shard for w in part.work if w.is_new],
                "migrate": {
                    w.logical_shard: [r.id for r in w.revisions] for w in part.work if not w.is_new
                },
                "current": part.n_current,
                "waiting": part.waiting,
                "error": str(part.error) if part.error else None,
            }
            for part in plan.physical
        },
    }


def _outcome_json(outcome: ops.MigrationOutcome) -> dict[str, Any]:
    return {
        "done": outcome.done,
        "failed": {name: str(error) for name, error in outcome.failed.items()},
        "laggards": {number: str(error) for number, error in outcome.laggards.items()},
        "retryable": isinstance(outcome.error, TryAgainError),
    }


def _status_json(found: ops.MigrationStatus) -> dict[str, Any]:
    return {
        "head": found.head,
        "current": found.is_current,
        "physical": {
            entry.physical: {
                "logical_shards": entry.n_logical_shards,
                "at": entry.at,
                "pending": entry.pending,
                "laggards": entry.laggards,
                "unrecorded": entry.unrecorded,
                "error": str(entry.error) if entry.error else None,
            }
            for entry in found.physical
        },
    }


def _print_json(document: dict[str, Any]) -> None:
    json.dump(document, sys.stdout, indent=2)
    print()
