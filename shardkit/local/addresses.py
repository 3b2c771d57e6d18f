"""Writes the `shardkit.toml` of an embedded cluster, and only when it would say something new.

Called by `cluster` once every server is up. Addresses and logins are the cluster's; every other
table of the file, and other services, are a person's and are kept.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from shardkit.config import Config, load
from shardkit.local.account import write_file
from shardkit.local.fleet import Fleet, pooled_name
from shardkit.local.services import MemcachedServer, RedisServer
from shardkit.local.settings import PhysicalAddresses, shardkit_toml

__all__ = ["check_config", "write_config"]

_OURS = ("cluster", "admin", "physical", "services")


def check_config(file: Path) -> None:
    """Make sure that a configuration file, if there is one, can be read and so be kept.

    Raises:
        ConfigurationError: it is wrong; a person has edited it.
    """
    if file.exists():
        load(file)


def write_config(fleet: Fleet) -> None:
    """Write the configuration file unless the present one already says the same."""
    file = fleet.layout.config
    present = tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    services = _services(fleet, present)
    kept = {n: t for n, t in present.items() if n not in _OURS and _is_served(n, t, services)}
    if fleet.options.confirm:
        durability = {"mode": "sync", "confirm": fleet.options.confirm}
        kept["durability"] = {**kept.get("durability", {}), **durability}
    text = shardkit_toml(
        logical_shards=fleet.options.logical_shards,
        physical=_physical(fleet),
        services=services,
        passwords=fleet.passwords,
        kept=kept,
    )
    wanted = Config.model_validate(tomllib.loads(text))
    if not present or Config.model_validate(present) != wanted:
        write_file(file, text, 0o600)


def _is_served(name: str, table: dict[str, Any], services: dict[str, str]) -> bool:
    """Tell whether a section does not name a server of ours that runs no more: of `[cache]`."""
    backend = table.get("backend") if name == "cache" and "nodes" not in table else None
    return backend not in {"memcached", "redis"} or backend in services


def _services(fleet: Fleet, present: dict[str, Any]) -> dict[str, str]:
    """Return our services, and those of the present file that never were ours."""
    ours = {
        server.name: server.address
        for server in fleet.servers.values()
        if isinstance(server, RedisServer | MemcachedServer)
    }
    former = fleet.old.servers if fleet.old else {}
    others = {n: a for n, a in present.get("services", {}).items() if n not in former}
    return others | ours


def _physical(fleet: Fleet) -> list[PhysicalAddresses]:
    addresses = []
    for name, logical_shards in fleet.options.placement().items():
        primary, *others = fleet.led(name)
        replicas = {pooled_name(n): server.port for n, server in enumerate(others, start=1)}
        poolers = [(pooler.port, pooler.program.version) for pooler in fleet.poolers(name)]
        pooler = poolers[0] if poolers else None
        addresses.append(PhysicalAddresses(name, logical_shards, primary.port, replicas, pooler))
    return addresses
