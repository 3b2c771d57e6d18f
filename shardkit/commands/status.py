"""`shardkit status`: every endpoint, what it is and how far it lags."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from shardkit.commands.options import ConfigOption, JsonOption
from shardkit.commands.output import console
from shardkit.config import CacheConfig, default_file, load
from shardkit.ops.durability import DurabilityStatus, read_durability
from shardkit.ops.status import EndpointStatus, is_healthy, read_status

if TYPE_CHECKING:  # the `cache` extra
    from shardkit.ops.cachestatus import CacheStatus

__all__ = ["status"]

_UNKNOWN = "?"


def status(*, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show every endpoint: role, lag in bytes and seconds, breaker, epoch, connections.

    With durability mode sync also which standbys confirm commits, how many commits wait for them,
    and when commits went unconfirmed. And every server of the cache, with what it holds and was
    asked. Exits with 1 when an endpoint does not answer or is not what the configuration says, and
    when commits wait or go unconfirmed; a cache is not needed.
    """
    settings, topology = load(config or default_file())
    found = read_status(topology)
    durability = read_durability(settings, topology)
    is_well = is_healthy(found) and all(each.is_well for each in durability)
    caches = _caches(settings.found_cache)
    if as_json:
        document = {
            "cluster": topology.name,
            "healthy": is_well,
            "endpoints": [asdict(each) for each in found],
            "durability": [each.plain() for each in durability],
            "cache": [asdict(each) for each in caches],
        }
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        _print(found)
        for each in durability:
            _print_durability(each)
        if caches:
            _print_caches(caches)
    if not is_well:
        raise typer.Exit(1)


def _caches(config: CacheConfig) -> list[CacheStatus]:
    if not config.nodes:  # and then the `cache` extra may not be there
        return []
    from shardkit.ops.cachestatus import read_cache_status

    return read_cache_status(config)


def _print_caches(found: list[CacheStatus]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("cache", "backend", "reachable"):
        table.add_column(name, overflow="fold")
    for name in ("entries", "reads", "evictions"):
        table.add_column(name, justify="right")
    for each in found:
        table.add_row(
            escape(each.server),
            f"{each.backend}, gutter" if each.is_gutter else each.backend,
            "yes" if each.is_reachable else f"[red]no: {escape(each.error or '')}[/red]",
            *(_number(n, ",") for n in (each.entries, each.reads, each.evictions)),
        )
    console().print(table)


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


def _print_durability(found: DurabilityStatus) -> None:
    from rich.markup import escape

    for text in found.lines():
        line = escape(f"{found.physical}: {text}")
        console().print(line if found.is_well else f"[red]{line}[/red]", soft_wrap=True)


def _number(value: float | None, form: str = "") -> str:
    return _UNKNOWN if value is None else format(value, form)
