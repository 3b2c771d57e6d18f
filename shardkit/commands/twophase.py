"""`shardkit twophase`: transactions over several physical shards that wait for their end."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from shardkit.cluster import Cluster
from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.commands.output import console
from shardkit.config import default_file
from shardkit.errors import TryAgainError
from shardkit.twophase import IN_DOUBT_AFTER, InDoubt, Resolution, in_doubt, resolve

__all__ = ["app"]

app = typer.Typer(
    name="twophase",
    help="Commits over several physical shards: what is in doubt, and its end.",
    no_args_is_help=True,
)

OlderThan = Annotated[
    float,
    typer.Option("--older-than", min=0.0, help="Seconds since it was prepared; 0 takes all."),
]


@app.command("status")
def status(*, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show what is prepared on each server and neither committed nor rolled back."""
    with Cluster.from_file(config or default_file()) as cluster:
        found, silent = in_doubt(cluster.connections, cluster.topology.physical)
    _report(Resolution((), tuple(found), silent), as_json=as_json)


@app.command("resolve")
def resolve_(
    *,
    older_than: OlderThan = IN_DOUBT_AFTER,
    dry_run: DryRunOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End what is in doubt, each as its coordinator decided, or by a rollback."""
    with Cluster.from_file(config or default_file()) as cluster:
        servers, physical = cluster.connections, tuple(cluster.topology.physical)
        if dry_run:
            found, silent = in_doubt(servers, physical)
            old = tuple(part for part in found if part.seconds >= older_than)
            done = Resolution((), old, silent)
        else:
            done = resolve(servers, physical, older_than=older_than)
    _report(done, as_json=as_json)


def _report(done: Resolution, *, as_json: bool) -> None:
    if as_json:
        json.dump(_plain(done), sys.stdout, indent=2)
        print()
    else:
        table = Table("transaction", "coordinator", "participant", "state")
        for settled in done.settled:
            ended = "committed" if settled.outcome == "commit" else "rolled back"
            table.add_row(settled.gid.transaction, settled.gid.coordinator,
                settled.gid.participant, ended)  # fmt: skip
        for part in done.waiting:
            table.add_row(part.gid.transaction, part.gid.coordinator, part.gid.participant,
                f"in doubt for {part.seconds:.1f} s")  # fmt: skip
        if table.row_count:
            console().print(table)
        elif not done.silent:
            print("nothing is in doubt")
    if done.silent:
        raise TryAgainError(
            f"no answer from {', '.join(sorted(done.silent))}",
            hint=f"what is prepared there stays so: {next(iter(done.silent.values()))}",
        )


def _plain(done: Resolution) -> dict[str, Any]:
    def part(doubt: InDoubt) -> dict[str, Any]:
        return {**_names(doubt), "seconds": round(doubt.seconds, 3)}

    def _names(item: Any) -> dict[str, str]:
        gid = item.gid
        return {
            "transaction": gid.transaction,
            "coordinator": gid.coordinator,
            "participant": gid.participant,
        }

    return {
        "settled": [{**_names(item), "outcome": item.outcome} for item in done.settled],
        "in_doubt": [part(doubt) for doubt in done.waiting],
        "silent": {name: str(error) for name, error in sorted(done.silent.items())},
    }
