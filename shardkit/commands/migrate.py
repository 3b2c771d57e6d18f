"""`shardkit migrate`: bring every logical shard to the newest revision."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from sqlalchemy import MetaData

from shardkit.commands.migrated import (
    interrupted_json,
    outcome_json,
    print_json,
    print_outcome,
    print_plan,
    status_json,
)
from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption, MigrationsOption
from shardkit.commands.output import console, printable
from shardkit.commands.progress import Watching
from shardkit.config import default_file, format_ranges, load
from shardkit.errors import ConfigurationError
from shardkit.ops import migrate as ops
from shardkit.ops import waves as rollout
from shardkit.ops.revisions import Revision
from shardkit.topology import Topology

__all__ = [
    "MigrationsOption",
    "ModelsOption",
    "WaveOption",
    "app",
    "inputs",
    "models_of",
    "source",
]

app = typer.Typer(no_args_is_help=True, help="Bring every logical shard to the newest revision.")

ModelsOption = Annotated[
    str | None,
    typer.Option(
        "--models",
        help="The models, as module:Base, to record how they place rows; instead of "
        "migrations.models.",
    ),
]
WaveOption = Annotated[
    str | None,
    typer.Option(
        "--wave",
        help='Roll out in waves: per cent of the logical shards, as "canary,1,10,50,100", or "all" '
        f"for one; unasked, that from {rollout.SMALLEST} logical shards on.",
    ),
]


class Phase(StrEnum):
    """How far to go."""

    PRE = "pre"
    POST = "post"


PhaseOption = Annotated[
    Phase | None,
    typer.Option(
        "--phase",
        help="pre: before the new code runs, stop at the first post revision; post: all of them.",
    ),
]
DEFAULTS = ops.Limits()
LONG = 1.0
"""Seconds of `--lock-timeout` above which users are warned: their own users wait as long."""


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
    max_lag: Annotated[
        int | None,
        typer.Option(
            min=0, help="Bytes of log a replica may be behind; the run waits, then halts."
        ),
    ] = DEFAULTS.max_lag_bytes,
    backfill_rate: Annotated[
        float | None,
        typer.Option(min=1, help="Rows a second that backfills go through on each physical shard."),
    ] = DEFAULTS.backfill_rate,
    wave: WaveOption = None,
    phase: PhaseOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Create missing logical shards and apply pending revisions to all of them.

    Safe to interrupt, to kill and to run again: a rerun continues.
    """
    percentages = rollout.parse(wave) if wave else None
    topology, revisions, rules, cached = inputs(config, migrations, models)
    if dry_run:
        planned = ops.plan(topology, revisions, rules=rules, phase=phase)
        print_plan(planned, percentages, as_json=as_json)
        return
    limits = ops.Limits(
        lock_timeout=lock_timeout,
        lock_attempts=lock_attempts,
        statement_timeout=statement_timeout,
        connections=connections,
        max_lag_bytes=max_lag,
        backfill_rate=backfill_rate,
    )
    if lock_timeout > LONG:
        typer.echo(
            f"warning: each attempt may hold up those who use a table for {lock_timeout:g} s",
            err=True,
        )
    with Watching(quiet=as_json) as watching:
        try:
            outcome = ops.apply(
                topology,
                revisions,
                rules=rules,
                cached=cached,
                limits=limits,
                on_plan=watching.on_plan,
                on_done=watching.on_done,
                on_rows=watching.on_rows,
                waves=percentages,
                smallest=rollout.SMALLEST if percentages is None else 0,
                on_wave=watching.on_wave,
                phase=phase,
            )
        except KeyboardInterrupt:
            watching.interrupted()
            if as_json:
                print_json(interrupted_json(watching.left))
            raise
    if as_json:
        print_json(outcome_json(outcome))
    else:
        print_outcome(outcome)
    if outcome.error:
        raise outcome.error


@app.command("plan")
def plan_command(
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    models: ModelsOption = None,
    wave: WaveOption = None,
    phase: PhaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what apply would do, with the SQL and its dangers; the same as apply --dry-run."""
    percentages = rollout.parse(wave) if wave else None
    topology, revisions, rules, _ = inputs(config, migrations, models)
    planned = ops.plan(topology, revisions, rules=rules, phase=phase)
    print_plan(planned, percentages, as_json=as_json)


@app.command("status")
def status_command(
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    models: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how many logical shards are at which revision, and which lag behind."""
    topology, revisions, rules, _ = inputs(config, migrations, models)
    found = ops.status(topology, revisions, rules=rules)
    if as_json:
        print_json(status_json(found))
    else:
        table = Table(
            "physical shard", "logical shards", "revision", "pending", "laggards", box=None
        )
        for entry in found.physical:
            if entry.error:
                table.add_row(entry.physical, "?", printable(f"unknown: {entry.error.message}"))
                continue
            at = ", ".join(f"{rev or 'none'}: {n}" for rev, n in (entry.at or {}).items())
            begun = {rev: f" ({n} begun)" for rev, n in (entry.begun or {}).items()}
            pending = ", ".join(
                f"{rev}: {n}{begun.get(rev, '')}" for rev, n in (entry.pending or {}).items()
            )
            laggards = format_ranges(entry.laggards)
            table.add_row(
                entry.physical, str(entry.n_logical_shards), at, pending or "-", laggards or "-"
            )
        console().print(table)
        if unrecorded := sorted({name for entry in found.physical for name in entry.unrecorded}):
            print(f"not recorded how they place their rows: {', '.join(unrecorded)}")
    if errors := [entry.error for entry in found.physical if entry.error]:
        raise errors[0]


def inputs(
    given: Path | None, migrations: str | None, models: str | None
) -> tuple[Topology, tuple[Revision, ...], ops.Rules | None, ops.Cached | None]:
    """Return what the options and the configuration name.

    Raises:
        ConfigurationError: something is not there.
        MigrationError: a revision cannot be used.
    """
    settings, topology = load(given or default_file())
    location, folder = source(given, migrations)
    if os.getcwd() not in sys.path:  # noqa: PTH109  sys.path holds text
        sys.path.insert(0, os.getcwd())  # noqa: PTH109  the package may be the one at hand
    models = models or settings.migrations.models
    rules = ops.load_rules(models) if models else None
    cached = ops.load_cached(models) if models else None
    return topology, ops.load_revisions(location, folder=folder), rules, cached


def source(given: Path | None, migrations: str | None) -> tuple[str, Path]:
    """Return where the revisions are, and what a path to them is relative to.

    Raises:
        ConfigurationError: nobody says where they are.
    """
    config = given or default_file()
    settings, _ = load(config)
    location = migrations or settings.migrations.location
    if location is None:
        raise ConfigurationError(
            f"{config}: migrations.location is not set",
            hint='add [migrations] location = "package:folder", or give --migrations',
        )
    return location, Path() if migrations else config.parent


def models_of(given: Path | None, models: str | None) -> MetaData | None:
    """Return the metadata of the models, or None when none are named."""
    settings, _ = load(given or default_file())
    location = models or settings.migrations.models
    return ops.load_metadata(location) if location else None
