"""`shardkit failover`: another server of a physical shard becomes its primary."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.config import Config, default_file, load
from shardkit.errors import ConfigurationError
from shardkit.topology import Topology

__all__ = ["app"]


class _Named(TyperGroup):
    """A group whose first word may be the name of a physical shard: `shardkit failover alpha`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Have what is no command be the argument of `now`."""
        if args and args[0] not in self.commands and args[0] not in {"--help", "-h"}:
            args = ["now", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Named,
    name="failover",
    no_args_is_help=True,
    help="Another server of a physical shard becomes its primary: `shardkit failover alpha`.",
)

Physical = Annotated[str, typer.Argument(help="Name of the physical shard.")]
Wait = Annotated[float, typer.Option("--timeout", help="Seconds for all of it.", min=1.0)]


@app.command("now", hidden=True)
def now(
    physical: Physical,
    *,
    to: Annotated[
        str | None, typer.Option("--to", help="host:port of the new primary; else the best.")
    ] = None,
    planned: Annotated[
        bool, typer.Option("--planned", help="The primary lives: a switchover without any loss.")
    ] = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on though too few standbys answer.")
    ] = False,
    timeout: Wait = 60.0,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make another server of a physical shard its primary, now."""
    from shardkit.ops import failover

    settings, topology = _loaded(config, [physical])
    if dry_run:
        view, action = failover.plan(
            settings, topology, physical, to=to, is_planned=planned, accepts_loss=accept_loss
        )
        _planned(physical, view, action, as_json=as_json)
        return
    done = failover.fail_over(
        settings, topology, physical, to=to, is_planned=planned, accepts_loss=accept_loss,
        timeout=timeout, progress=_silent if as_json else _tell,
    )  # fmt: skip
    _done(done, as_json=as_json)


@app.command("adopt")
def adopt(
    physical: Physical,
    *,
    server: Annotated[
        str | None, typer.Option("--server", help="host:port, where several were promoted.")
    ] = None,
    timeout: Wait = 60.0,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Register a server that somebody else has promoted, so that clients use it."""
    from shardkit.ops import failover

    settings, topology = _loaded(config, [physical])
    done = failover.adopt(
        settings, topology, physical, server=server, timeout=timeout,
        progress=_silent if as_json else _tell,
    )  # fmt: skip
    _done(done, as_json=as_json)


@app.command("watch")
def watch(
    *,
    physical: Annotated[
        list[str] | None, typer.Option("--physical", help="Only this one; may be repeated.")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look on, and fail over where a primary is lost; until it is stopped."""
    from shardkit.ops import failover

    settings, topology = _loaded(config, physical or [])
    failover.watch(
        settings, topology, physical=physical or [], progress=_tell_json if as_json else _tell
    )


@app.command("lost")
def lost(
    physical: Physical,
    *,
    data: Annotated[Path, typer.Option(help="Data folder of the old primary.", exists=True)],
    old: Annotated[
        str, typer.Option("--old", help="How to connect to it, started to follow nobody.")
    ],
    pg_waldump: Annotated[Path, typer.Option(help="That program, of the server's version.")],
    timeline: Annotated[int, typer.Option(help="Of the old primary; pg_controldata tells.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the rows that only the old primary has, before it is made anew."""
    from shardkit.ops import failover

    _, topology = _loaded(config, [physical])
    rows = failover.list_lost(
        topology, physical, data=data, old=old, pg_waldump=pg_waldump, timeline=timeline
    )
    if as_json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=2, default=str)
        print()
        return
    for row in rows:
        when = f" at {row.committed}" if row.committed else ""
        print(f"logical shard {row.logical_shard}: {row.table} {dict(row.key)} {row.kind}{when}")
    print(f"{len(rows)} rows")


def _loaded(config: Path | None, names: Sequence[str]) -> tuple[Config, Topology]:
    settings, topology = load(config or default_file())
    for name in names:
        if name not in topology.physical:
            raise ConfigurationError(
                f"no physical shard {name!r}", hint=f"there are {', '.join(topology.physical)}"
            )
    return settings, topology


def _silent(_physical: str, _action: Any) -> None:
    """Say nothing: standard output is for one document."""


def _tell(physical: str, action: Any) -> None:
    from shardkit.ops.failover.words import words

    print(f"{physical}: {words(action)}", flush=True)


def _tell_json(physical: str, action: Any) -> None:
    from shardkit.ops.failover.words import plain

    print(json.dumps({"physical": physical, **plain(action)}), flush=True)


def _done(done: Any, *, as_json: bool) -> None:
    from shardkit.ops.failover.words import plain

    if as_json:
        steps = [plain(action) for action in done.steps]
        _print_json({"physical": done.physical, "primary": done.primary, "steps": steps})
    else:
        print(f"{done.physical}: {done.primary} is the primary")


def _planned(physical: str, view: Any, action: Any, *, as_json: bool) -> None:
    from shardkit.ops.failover.words import plain, words

    servers = [asdict(node) for node in view.nodes]
    if as_json:
        _print_json({"physical": physical, "next": plain(action), "servers": servers})
        return
    for server in servers:
        role = (
            "no answer" if not server["answers"]
            else "standby" if server["in_recovery"]
            else "primary"
        )  # fmt: skip
        print(f"{server['name']}: {role}, timeline {server['timeline']}, at {server['position']}")
    print(f"next: {words(action)}")


def _print_json(found: dict[str, Any]) -> None:
    json.dump(found, sys.stdout, indent=2)
    print()
