"""`shardkit move`: logical shards to other physical shards while their clients go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from shardkit.commands.migrate import inputs
from shardkit.commands.moving import Moving, outcome_line, plan_table, status_table
from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption, MigrationsOption
from shardkit.commands.output import console
from shardkit.config import default_file, load, parse_ranges
from shardkit.errors import ConfigurationError, RefusedError, ShardkitError
from shardkit.ops import moves
from shardkit.ops.moves import MovePlan, Options, Outcome, Report, Script
from shardkit.topology import Topology

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Move logical shards to other physical shards, online."
)

_DEFAULTS = Options()

OnReport = Callable[[Report], None]

ShardArgument = Annotated[int, typer.Argument(metavar="SHARD", help="Number of the logical shard.")]
ShardsArgument = Annotated[
    str,
    typer.Argument(metavar="SHARDS", help='Numbers of the logical shards, as "7" or "0-3,9".'),
]
TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="Name of the physical shard where they are to go.")
]
LockOption = Annotated[
    float,
    typer.Option(min=0.01, max=2, help="Seconds a fence queues for its locks; writers wait."),
]
NoticeOption = Annotated[
    float,
    typer.Option(
        min=0,
        help="Seconds at least from the first sign of a move to its fence: clients hear of it, "
        "and connect to the target beforehand.",
    ),
]
LongOption = Annotated[
    float,
    typer.Option(min=1, help="Seconds after which a writing transaction is too long to begin."),
]


@app.command("plan")
def plan_command(
    shards: ShardsArgument,
    target: TargetArgument,
    config: ConfigOption = None,
    *,
    long: LongOption = _DEFAULTS.long,
    as_json: JsonOption = False,
) -> None:
    """Print what start would do, with every check; the same as start --dry-run."""
    _, topology = load(config or default_file())
    _planned(topology, _numbers(shards), target, Options(long=long), as_json=as_json)


@app.command("start")
def start_command(
    shards: ShardsArgument,
    target: TargetArgument,
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    hold: Annotated[
        bool, typer.Option("--hold", help="Stop when all is ready; cutover goes on.")
    ] = False,
    cleans: Annotated[
        bool, typer.Option("--clean", help="Forget the old copy at once; no way back then.")
    ] = False,
    at_once: Annotated[
        int, typer.Option(min=1, max=16, help="Logical shards that are moved at the same time.")
    ] = 2,
    per_server: Annotated[
        int, typer.Option(min=1, max=16, help="Of those, how many may share a server.")
    ] = 1,
    lock_timeout: LockOption = _DEFAULTS.lock_timeout,
    long: LongOption = _DEFAULTS.long,
    notice: NoticeOption = moves.NOTICE,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Move logical shards: copy, follow, compare, hand over; the old copies stay for rollback.

    Safe to interrupt and to kill at any time: resume goes on, abort gives it up.
    """
    numbers = _numbers(shards)
    if dry_run:
        _, topology = load(config or default_file())
        _planned(topology, numbers, target, Options(long=long), as_json=as_json)
        return
    topology, script = _script(config, migrations)
    with Moving(quiet=as_json) as moving:
        options = Options(
            lock_timeout=lock_timeout,
            long=long,
            notice=notice,
            is_held=hold,
            on_report=moving.on_report,
        )
        found = moves.move_many(
            topology,
            [(number, target) for number in numbers],
            script=script,
            options=options,
            at_once=at_once,
            per_server=per_server,
            cleans=cleans and not hold,
            on_end=moving.on_end,
        )
    _ended(list(found.values()), as_json=as_json)


@app.command("resume")
def resume_command(
    shard: ShardArgument,
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    hold: Annotated[
        bool, typer.Option("--hold", help="Stop when all is ready; cutover goes on.")
    ] = False,
    lock_timeout: LockOption = _DEFAULTS.lock_timeout,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Go on with a move, or an abort, whose mover died or was stopped."""
    topology, script = _script(config, migrations)

    def one(number: int, on_report: OnReport) -> Outcome:
        options = Options(lock_timeout=lock_timeout, is_held=hold, on_report=on_report)
        return moves.resume(topology, number, script=script, options=options)

    _each(topology, [shard], one, dry_run=dry_run, as_json=as_json)


@app.command("cutover")
def cutover_command(
    shard: ShardArgument,
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    lock_timeout: LockOption = _DEFAULTS.lock_timeout,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Hand over a logical shard that start --hold has made ready; compares it again first."""
    resume_command(
        shard,
        config,
        migrations=migrations,
        hold=False,
        lock_timeout=lock_timeout,
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command("abort")
def abort_command(
    shard: ShardArgument,
    config: ConfigOption = None,
    *,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give a move up that has not handed over: nothing is left on the target."""
    _, topology = load(config or default_file())

    def one(number: int, on_report: OnReport) -> Outcome:
        return moves.abort(topology, number, options=Options(on_report=on_report))

    _each(topology, [shard], one, dry_run=dry_run, as_json=as_json)


@app.command("rollback")
def rollback_command(
    shard: ShardArgument,
    config: ConfigOption = None,
    *,
    lock_timeout: LockOption = _DEFAULTS.lock_timeout,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Move a logical shard back, without copying: the old copy was kept current."""
    _, topology = load(config or default_file())

    def one(number: int, on_report: OnReport) -> Outcome:
        options = Options(lock_timeout=lock_timeout, on_report=on_report)
        return moves.rollback(topology, number, options=options)

    _each(topology, [shard], one, dry_run=dry_run, as_json=as_json)


@app.command("clean")
def clean_command(
    shards: ShardsArgument,
    config: ConfigOption = None,
    *,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Drop the old copy of logical shards that were moved; there is no way back then."""
    _, topology = load(config or default_file())

    def one(number: int, on_report: OnReport) -> Outcome:
        return moves.clean(topology, number, options=Options(on_report=on_report))

    _each(topology, _numbers(shards), one, dry_run=dry_run, as_json=as_json)


@app.command("verify")
def verify_command(
    shard: ShardArgument, config: ConfigOption = None, *, as_json: JsonOption = False
) -> None:
    """Compare both copies of a logical shard that is being moved, or was and is not cleaned."""
    _, topology = load(config or default_file())
    with Moving(quiet=as_json) as moving:
        found = moves.verify(topology, shard, on_report=moving.on_report)
    if as_json:
        print(json.dumps(asdict(found), indent=2, default=str))
    else:
        print(f"{found.n_rows:,} rows compared; {found.told()}")
    if not found.is_clean:
        raise typer.Exit(1)


@app.command("status")
def status_command(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Show the moves that are not over: how far each is, and what to do."""
    _, topology = load(config or default_file())
    known, silent = moves.status(topology)
    if as_json:
        print(json.dumps({"moves": [_known(each) for each in known], "silent": silent}, indent=2))
    else:
        console().print(status_table(known))
        for name, why in silent.items():
            print(f"{name} does not answer: {why}")


def _each(
    topology: Topology,
    numbers: Sequence[int],
    one: Callable[[int, OnReport], Outcome],
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Do something about moves that were begun, or show them; one that fails stops no other."""
    if dry_run:
        for number in numbers:
            _shown(topology, number, as_json=as_json)
        return
    found: list[Outcome | ShardkitError] = []
    with Moving(quiet=as_json) as moving:
        for number in numbers:
            try:
                found.append(one(number, moving.on_report))
            except ShardkitError as error:
                found.append(error)
    _ended(found, as_json=as_json)


def _numbers(text: str) -> list[int]:
    try:
        return list(parse_ranges(text))
    except ValueError as error:
        raise ConfigurationError(
            f"{text!r} names no logical shards", hint='write "7" or "0-3,9"'
        ) from error


def _script(config: Path | None, migrations: str | None) -> tuple[Topology, Script]:
    topology, revisions, _, _ = inputs(config, migrations, None)
    return topology, moves.revised(revisions)


def _planned(
    topology: Topology, numbers: Sequence[int], target: str, options: Options, *, as_json: bool
) -> None:
    found: list[MovePlan] = [
        moves.plan(topology, number, target, options=options) for number in numbers
    ]
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
    else:
        for each in found:
            console().print(plan_table(each))
            print(f"steps: {', '.join(each.steps)}")
    for each in found:
        for check in each.problems:
            raise RefusedError(
                f"{check.name}: {check.problem}", hint=check.hint, logical_shard=each.logical_shard
            )


def _shown(topology: Topology, shard: int, *, as_json: bool) -> None:
    known, _ = moves.status(topology)
    found = [each for each in known if each.logical_shard == shard]
    if not found:
        raise RefusedError("it is not being moved", logical_shard=shard)
    if as_json:
        print(json.dumps([_known(each) for each in found], indent=2))
    else:
        console().print(status_table(found))


def _known(found: Any) -> dict[str, Any]:
    return {
        "logical_shard": found.logical_shard,
        "move": found.move_id,
        "attempt": found.attempt,
        "source": found.source,
        "target": found.target,
        "goal": found.journal.goal,
        "step": found.step,
        "is_handed_over": found.is_handed_over,
        "rows": {name: asdict(row) for name, row in found.rows.items()},
    }


def _ended(found: Sequence[Outcome | ShardkitError], *, as_json: bool) -> None:
    done = [each for each in found if isinstance(each, Outcome)]
    failed = [each for each in found if isinstance(each, ShardkitError)]
    if as_json:
        text = {
            "moves": [asdict(each) for each in done],
            "failed": [
                {
                    "logical_shard": each.logical_shard,
                    "kind": type(each).__name__,
                    "message": each.message,
                    "hint": each.hint,
                }
                for each in failed
            ],
        }
        print(json.dumps(text, indent=2))
    else:
        table = Table("logical shard", "from", "to", "", box=None)
        for each in done:
            table.add_row(str(each.logical_shard), each.source, each.target, outcome_line(each))
        if done:
            console().print(table)
    if failed:
        raise failed[0]
