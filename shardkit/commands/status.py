"""`shardkit status`: every endpoint, what it is and how far it lags."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import typer

from shardkit.commands.options import ConfigOption, JsonOption
from shardkit.commands.output import console
from shardkit.config import default_file, load
from shardkit.ops.status import EndpointStatus, is_healthy, read_status

__all__ = ["status"]

_UNKNOWN = "?"


def status(*, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show every endpoint: role, lag in bytes and seconds, breaker, epoch, connections.

    Exits with 1 when one does not answer or is not what the configuration says.
    """
    _, topology = load(config or default_file())
    found = read_status(topology)
    if as_json:
        document = {
            "cluster": topology.name,
            "healthy": is_healthy(found),
            "endpoints": [asdict(each) for each in found],
        }
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        _print(found)
    if not is_healthy(found):
        raise typer.Exit(1)


def _print(found: list[EndpointStatus]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    columns = ("endpoint", "role", "reachable", "lag bytes", "lag s", "breaker", "epoch", "conns")
    for name in columns:
        is_number = name in {"lag bytes", "lag s", "epoch", "conns"}
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for each in found:
        role = each.role
        if each.actual_role not in {None, each.role}:
            role = f"[red]{each.actual_role}, not {each.role}[/red]"
        table.add_row(
            escape(each.endpoint),
            role,
            "yes" if each.is_reachable else f"[red]no: {escape(each.error or '')}[/red]",
            _number(each.lag_bytes, ","),
            _number(each.lag, ".1f"),
            each.breaker,
            _number(each.epoch),
            _number(each.connections),
        )
    console().print(table)


def _number(value: float | None, form: str = "") -> str:
    return _UNKNOWN if value is None else format(value, form)
