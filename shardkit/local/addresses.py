"""Writes the `shardkit.toml` of an embedded cluster, and only when it would say something new.

Called by `cluster` once every server is up. What a person changed under `[pool]` is kept.
"""

from __future__ import annotations

import tomllib

from shardkit.config import Config, load
from shardkit.errors import ConfigurationError
from shardkit.local.account import write_file
from shardkit.local.fleet import Fleet
from shardkit.local.services import MemcachedServer, PgBouncerServer, RedisServer
from shardkit.local.settings import PhysicalAddresses, shardkit_toml
from shardkit.topology import Role

__all__ = ["write_config"]


def write_config(fleet: Fleet) -> None:
    """Write the configuration file unless the present one already says the same."""
    file = fleet.layout.config
    try:
        present: Config | None = load(file)[0]
    except ConfigurationError:
        present = None
    text = shardkit_toml(
        logical_shards=fleet.options.logical_shards,
        physical=_physical(fleet),
        services={
            server.name: server.address
            for server in fleet.servers.values()
            if isinstance(server, RedisServer | MemcachedServer | PgBouncerServer)
        },
        passwords=fleet.passwords,
        pool=present.pool if present else None,
    )
    if present is None or present != Config.model_validate(tomllib.loads(text)):
        write_file(file, text, 0o600)


def _physical(fleet: Fleet) -> list[PhysicalAddresses]:
    addresses = []
    for name, logical_shards in fleet.options.placement().items():
        members = fleet.members(name)
        primary = next(server for server in members if server.role is Role.PRIMARY)
        replicas = tuple(server.port for server in members if server.role is Role.REPLICA)
        addresses.append(PhysicalAddresses(name, logical_shards, primary.port, replicas))
    return addresses
