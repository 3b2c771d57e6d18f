"""`shardkit rebalance`: which logical shards to move where, and moving them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardkit.commands.options import (
    ConfigOption,
    DryRunOption,
    JsonOption,
    MigrationsOption,
)
from shardkit.commands.output import console
from shardkit.config import RebalanceConfig, default_file, load, parse_ranges

if TYPE_CHECKING:
    from shardkit.config import Config
    from shardkit.errors import ShardkitError
    from shardkit.ops.moves import Outcome
    from shardkit.ops.rebalance.apply import Remaining
    from shardkit.ops.rebalance.facts import Constraints, Plan, PlannedMove, Situation

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Even out size and load over physical shards.")

DrainOption = Annotated[
    list[str] | None, typer.Option("--drain", help="A physical shard to empty; repeatable.")
]
WeightOption = Annotated[
    list[str] | None,
    typer.Option("--weight", help="NAME=NUMBER: its capacity beside the others; repeatable."),
]
PinOption = Annotated[
    list[str] | None,
    typer.Option("--pin", help="NAME=RANGES: logical shards that belong there; repeatable."),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(min=0.0, max=10.0, help="Part of its share that a server may be off; else 0.1."),
]
LoadToleranceOption = Annotated[
    float | None, typer.Option(min=0.0, max=10.0, help="The same of the load; else 0.25.")
]
SecondsOption = Annotated[
    float,
    typer.Option(min=0.0, max=86_400.0, help="For how long load is watched; 0 leaves it out."),
]
MovesOption = Annotated[int | None, typer.Option(min=0, help="Moves that the plan may have.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write the plan for `apply`.")]
SvgOption = Annotated[Path | None, typer.Option("--svg", help="Write a picture of the plan.")]

_BAR = 24
"""Characters of the longest bar."""


@app.command("plan")
def plan_command(
    config: ConfigOption = None,
    *,
    drain: DrainOption = None,
    weight: WeightOption = None,
    pin: PinOption = None,
    tolerance: ToleranceOption = None,
    load_tolerance: LoadToleranceOption = None,
    seconds: SecondsOption = 10.0,
    max_moves: MovesOption = None,
    out: OutOption = None,
    svg: SvgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure every logical shard and show the moves that even them out; moves nothing."""
    from shardkit.ops.rebalance import picture, planfile
    from shardkit.ops.rebalance.measure import measure
    from shardkit.ops.rebalance.planner import plan
    from shardkit.ops.rebalance.problem import problem_of

    settings, topology = load(config or default_file())
    wanted = _constraints(
        settings,
        drain=drain or [],
        weight=weight or [],
        pin=pin or [],
        tolerance=tolerance,
        load_tolerance=load_tolerance,
        max_moves=max_moves,
    )
    notes = console(stderr=True, markup=False)
    situation = measure(
        topology,
        seconds=seconds,
        # What cannot be met is said before anybody waits.
        on_measured=lambda found: problem_of(found, wanted),
        on_wait=lambda s: notes.print(f"counting reads and writes for {s:g} s"),
    )
    found = plan(situation, wanted)
    if out is not None:
        made = datetime.now(UTC).isoformat(timespec="seconds")
        planfile.write(out, situation, wanted, found, made=made)
    if svg is not None:
        text = picture.svg(found, cluster=topology.name, tolerance=wanted.tolerance)
        planfile.write_text(svg, text)
    if as_json:
        json.dump(_document(situation, wanted, found), sys.stdout, indent=2)
        print()
        return
    _print(wanted, found)
    if out is not None and found.moves:
        console(markup=False).print(f"plan in {out}; run: shardkit rebalance apply {out}")


@app.command("apply")
def apply_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `plan --out` has written.")],
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    cleans: Annotated[
        bool, typer.Option("--clean", help="Forget the old copies at once; no way back then.")
    ] = False,
    at_once: Annotated[
        int, typer.Option(min=1, max=16, help="Logical shards that are moved at the same time.")
    ] = 2,
    per_server: Annotated[
        int, typer.Option(min=1, max=16, help="Of those, how many may share a server.")
    ] = 1,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Do what is left of a plan: moves online, one after the other; run it again to go on.

    Refused when the cluster is not any more what the plan was made from.
    """
    from shardkit.commands.migrate import inputs
    from shardkit.commands.moving import Moving
    from shardkit.ops.moves import NOTICE, Options, revised
    from shardkit.ops.rebalance import planfile
    from shardkit.ops.rebalance.apply import apply, left_of

    kept = planfile.read(file)
    if dry_run:
        _, topology = load(config or default_file())
        _show_left(left_of(topology, kept), as_json=as_json)
        return
    topology, revisions, _, _ = inputs(config, migrations, None)
    left = left_of(topology, kept)
    with Moving(quiet=as_json) as moving:
        found = apply(
            topology,
            left,
            script=revised(revisions),
            options=Options(notice=NOTICE, on_report=moving.on_report),
            at_once=at_once,
            per_server=per_server,
            cleans=cleans,
            on_end=moving.on_end,
        )
    _ended(found, n_before=left.n_done, as_json=as_json)


def _show_left(left: Remaining, *, as_json: bool) -> None:
    if as_json:
        document = {
            "moves": [asdict(move) for move in left.moves],
            "begun": sorted(left.begun),
            "done": left.n_done,
        }
        json.dump(document, sys.stdout, indent=2)
        print()
        return
    out = console(markup=False)
    if left.moves:
        out.print(_flows(left.moves))
    begun = f", {len(left.begun)} of them begun" if left.begun else ""
    out.print(f"{len(left.moves)} moves are left{begun}; {left.n_done} are done")


def _ended(found: Mapping[int, Outcome | ShardkitError], *, n_before: int, as_json: bool) -> None:
    from shardkit.errors import ShardkitError

    failed = {n: each for n, each in found.items() if isinstance(each, ShardkitError)}
    if as_json:
        document = {
            "moved": [asdict(e) for e in found.values() if not isinstance(e, ShardkitError)],
            "failed": [
                {
                    "logical_shard": number,
                    "kind": type(error).__name__,
                    "message": error.message,
                    "hint": error.hint,
                }
                for number, error in failed.items()
            ],
            "done_before": n_before,
        }
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        moved = len(found) - len(failed)
        console(markup=False).print(f"{moved} moves done, {n_before} before, {len(failed)} failed")
    for number, error in failed.items():
        error.logical_shard = number
        raise error


def _constraints(
    settings: Config,
    *,
    drain: list[str],
    weight: list[str],
    pin: list[str],
    tolerance: float | None,
    load_tolerance: float | None,
    max_moves: int | None,
) -> Constraints:
    """Return what the options say, and shardkit.toml where they say nothing."""
    from shardkit.ops.rebalance.facts import Constraints

    config: RebalanceConfig = settings.rebalance
    weights = {shard.name: _fraction(shard.weight) for shard in settings.physical}
    for name, text in _pairs("--weight", weight):
        try:
            weights[name] = Fraction(text)
        except (ValueError, ZeroDivisionError):
            weights[name] = Fraction(0)
        if weights[name] <= 0:
            raise _wrong(f"--weight {name}={text}: a weight is a number above 0")
    pins = config.pinned
    for name, text in _pairs("--pin", pin):
        try:
            pins.update(dict.fromkeys(parse_ranges(text), name))
        except ValueError as error:
            raise _wrong(f"--pin {name}={text}: {error}") from None
    return Constraints(
        weights=weights,
        drained=frozenset(drain),
        pins=pins,
        tolerance=_fraction(config.tolerance if tolerance is None else tolerance),
        load_tolerance=_fraction(
            config.load_tolerance if load_tolerance is None else load_tolerance
        ),
        max_moves=max_moves,
    )


def _fraction(value: float) -> Fraction:
    """Return a number as it was written, not as the machine keeps it."""
    return Fraction(repr(value))


def _pairs(option: str, texts: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise _wrong(f"{option} {text}: write NAME=…, such as {option} alpha=2")
        pairs.append((name, value))
    return pairs


def _wrong(message: str) -> Exception:
    from shardkit.errors import ConfigurationError

    return ConfigurationError(message)


def _document(situation: Situation, wanted: Constraints, found: Plan) -> dict[str, Any]:
    return {
        "cluster": situation.cluster,
        "constraints": {
            "weights": {name: float(weight) for name, weight in wanted.weights.items()},
            "drained": sorted(wanted.drained),
            "pins": wanted.pins,
            "tolerance": float(wanted.tolerance),
            "load_tolerance": None
            if wanted.load_tolerance is None
            else float(wanted.load_tolerance),
            "max_moves": wanted.max_moves,
        },
        "seconds": situation.seconds,
        "logical_shards": [asdict(shard) for shard in situation.shards],
        **asdict(found),
        "size_bytes": found.size_bytes,
    }


def _print(wanted: Constraints, found: Plan) -> None:
    from rich.filesize import decimal

    out = console(markup=False)
    out.print(_table(wanted, found))
    out.print()
    if not found.moves:
        out.print("nothing has to move")
    else:
        out.print(_flows(found.moves))
        bound = "no plan moves less" if found.is_optimal else ""
        if found.least_bytes is not None and not bound:
            bound = f"any plan moves {decimal(found.least_bytes)} at least"
        said = f"{len(found.moves)} moves, {decimal(found.size_bytes)}"
        out.print(f"{said}; {bound}" if bound else said)
    if found.excess_after:
        out.print(
            f"{found.excess_after} % of shares stay beyond the tolerance, {found.excess_before} % "
            "are now: logical shards cannot be divided"
        )
    for note in found.notes:
        out.print(f"note: {note}", soft_wrap=True)


def _table(wanted: Constraints, found: Plan) -> Any:
    """Return every physical shard before and after, with bars."""
    from rich.bar import Bar
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("physical shard")
    for name in ("shards", "size", "rows", "of its share", "load"):
        table.add_column(name, justify="right")
    table.add_column("", width=_BAR)
    longest = max([1.5, *(fill.size_share for fill in (*found.before, *found.after))])
    sides = zip(found.before, found.after, strict=True)
    for n, (before, after) in enumerate(sides):
        if n:
            table.add_section()
        for word, fill in ((f"{before.physical} before", before), ("after", after)):
            is_drained = fill.physical in wanted.drained
            off = abs(fill.size_share - 1) > wanted.tolerance
            style = "red" if (bool(fill.shards) if is_drained else off) else "green"
            load = "" if fill.load_share is None else f"{fill.load_share:.0%}"
            share = "drained" if is_drained else f"{fill.size_share:.0%}"
            # What is drained has no share: its bar is as long as its part of all bytes.
            total = sum(f.size_bytes for f in found.before) or 1
            width = fill.size_bytes / total * longest if is_drained else fill.size_share
            table.add_row(
                Text(word, justify="right" if word == "after" else "left"),
                f"{fill.shards:,}",
                decimal(fill.size_bytes),
                f"{fill.rows:,}",
                Text(share, style=style),
                load,
                Bar(longest, 0.0, width, width=_BAR, color=style),
            )
    return table


def _flows(moves: Sequence[PlannedMove]) -> Any:
    """Return the moves, those with the same way together."""
    from rich.filesize import decimal
    from rich.table import Table

    from shardkit.config import format_ranges

    flows: dict[tuple[str, str, str], list[PlannedMove]] = {}
    for move in moves:
        flows.setdefault((move.source, move.target, move.why), []).append(move)
    table = Table(box=None, pad_edge=False)
    for name in ("from", "to", "why"):
        table.add_column(name)
    for name in ("moves", "size"):
        table.add_column(name, justify="right")
    table.add_column("logical shards", overflow="fold")
    for (source, target, why), some in flows.items():
        table.add_row(
            source,
            target,
            why,
            f"{len(some):,}",
            decimal(sum(move.size_bytes for move in some)),
            format_ranges(sorted(move.logical_shard for move in some)),
        )
    return table
