"""`shardkit migrate`: bring every logical shard to the newest revision."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import MetaData

from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.commands.output import console, printable
from shardkit.config import default_file, format_ranges, load
from shardkit.errors import ConfigurationError, TryAgainError
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
    "outcome_json",
    "print_json",
    "print_outcome",
    "source",
]

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
    wave: WaveOption = None,
    phase: PhaseOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Create missing logical shards and apply pending revisions to all of them.

    Safe to interrupt, to kill and to run again: a rerun continues.
    """
    percentages = rollout.parse(wave) if wave else None
    topology, revisions, rules = inputs(config, migrations, models)
    if dry_run:
        planned = ops.plan(topology, revisions, rules=rules, phase=phase)
        _print_plan(planned, percentages, as_json=as_json)
        return
    limits = ops.Limits(
        lock_timeout=lock_timeout,
        lock_attempts=lock_attempts,
        statement_timeout=statement_timeout,
        connections=connections,
        max_lag_bytes=max_lag,
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
            limits=limits,
            on_plan=on_plan,
            on_done=lambda physical, _logical_shard: bar.advance(tasks[physical]),
            waves=percentages,
            smallest=rollout.SMALLEST if percentages is None else 0,
            on_wave=lambda each: bar.print(
                f"wave {each.name}: {len(each.logical_shards)} logical shards"
            ),
            phase=phase,
        )
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
    topology, revisions, rules = inputs(config, migrations, models)
    planned = ops.plan(topology, revisions, rules=rules, phase=phase)
    _print_plan(planned, percentages, as_json=as_json)


@app.command("status")
def status_command(
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    models: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how many logical shards are at which revision, and which lag behind."""
    topology, revisions, rules = inputs(config, migrations, models)
    found = ops.status(topology, revisions, rules=rules)
    if as_json:
        print_json(_status_json(found))
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


def inputs(
    given: Path | None, migrations: str | None, models: str | None
) -> tuple[Topology, tuple[Revision, ...], ops.Rules | None]:
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
    return topology, ops.load_revisions(location, folder=folder), rules


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


def _print_plan(
    plan: ops.MigrationPlan, percentages: tuple[float, ...] | None, *, as_json: bool
) -> None:
    smallest = rollout.SMALLEST if percentages is None else 0
    waves = ops.roll_out(plan, percentages or rollout.DEFAULT, smallest=smallest)
    if as_json:
        print_json(_plan_json(plan, waves))
        return
    out = console()
    for revision in plan.pending:
        title = f"-- {revision.id} ({revision.phase}) {revision.summary}"
        out.print(title, style="bold", markup=False)
        for statement in revision.statements:
            out.print(f"{printable(statement)};", markup=False)
        for finding in revision.hazards:
            if finding.when == "advice":
                out.print(f"-- advice: {finding.problem}; {finding.remedy}", markup=False)
    for danger in plan.dangers:
        verdict = f"set aside: {danger.reason}" if danger.reason else "REFUSED"
        out.print(
            f"{verdict}: {danger.revision.id} {danger.finding.problem} "
            f"[{danger.finding.rule}]: {danger.finding.statement}",
            markup=False,
        )
    if len(waves) > 1:
        sizes = ", ".join(f"{wave.name}: {len(wave.logical_shards)}" for wave in waves)
        out.print(f"waves: {sizes}", markup=False)
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


def print_outcome(outcome: ops.MigrationOutcome) -> None:
    """Print what a run did on each physical shard."""
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


def _plan_json(plan: ops.MigrationPlan, waves: tuple[rollout.Wave, ...]) -> dict[str, Any]:
    return {
        "pending": [
            {
                "revision": r.id,
                "phase": r.phase,
                "summary": r.summary,
                "statements": r.statements,
                "advice": [f"{f.problem}: {f.statement}" for f in r.hazards if f.when == "advice"],
            }
            for r in plan.pending
        ],
        "dangers": [
            {
                "revision": danger.revision.id,
                "rule": danger.finding.rule,
                "problem": danger.finding.problem,
                "remedy": danger.finding.remedy,
                "statement": danger.finding.statement,
                "physical": danger.physical,
                "size_bytes": danger.size_bytes,
                "reason": danger.reason,
            }
            for danger in plan.dangers
        ],
        "waves": {wave.name: sorted(wave.logical_shards) for wave in waves},
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


def outcome_json(outcome: ops.MigrationOutcome) -> dict[str, Any]:
    """Return what a run did, for JSON."""
    return {
        "done": outcome.done,
        "failed": {name: str(error) for name, error in outcome.failed.items()},
        "laggards": {number: str(error) for number, error in outcome.laggards.items()},
        "halted": outcome.halted,
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


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document."""
    json.dump(document, sys.stdout, indent=2)
    print()
