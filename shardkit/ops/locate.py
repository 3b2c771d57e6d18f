"""`shardkit locate`: where an id or a shard key lives, and why.

Ids and hashes need the configuration only. The rule of a table, and the entries of a directory,
are read from the servers, where `shardkit migrate apply` and sessions have recorded them.
Called by the command line; changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from shardkit import ids
from shardkit.errors import (
    EndpointUnavailableError,
    InvalidIdError,
    InvalidShardKeyError,
    OperationError,
)
from shardkit.keys import KeyType, canonical, shown
from shardkit.ops.direct import connect
from shardkit.router import Router
from shardkit.strategies import EMBEDDED, Directory, Hash, Rule, hash_shard
from shardkit.topology import Topology, schema_name

__all__ = ["Location", "locate_id", "locate_key"]


@dataclass(frozen=True, slots=True)
class Location:
    """Where something lives.

    Attributes:
        logical_shard: its number.
        schema: its PostgreSQL schema.
        physical: name of the physical shard that holds it.
        endpoints: the servers of that physical shard, the primary first.
        strategy: name of the strategy that placed it.
        why: one sentence.
    """

    logical_shard: int
    schema: str
    physical: str
    endpoints: tuple[str, ...]
    strategy: str
    why: str


def locate_id(topology: Topology, text: str) -> Location:
    """Return where the row of an id lives.

    Raises:
        InvalidIdError: the text is no id.
        InvalidShardKeyError: the id carries a logical shard that this cluster does not have.
    """
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise InvalidIdError(f"{shown(text)} is not an id", hint="an id is a decimal number")
    shard = Router(topology.n_logical_shards).shard(EMBEDDED, int(text))
    parts = ids.parse(int(text))
    return _location(
        topology, shard, "embedded", f"the id carries it; minted {parts.time:%F %T} UTC"
    )


def locate_key(
    topology: Topology, text: str, *, key_type: KeyType | None = None, table: str | None = None
) -> Location:
    """Return where the rows of a shard key live.

    Args:
        topology: the cluster.
        text: the key; bytes in hexadecimal.
        key_type: of the key; None is that of the table, or text when no table is named.
        table: whose rule counts; None for the hash strategy.

    Raises:
        InvalidShardKeyError: the text is no key of that type.
        OperationError: how the table places its rows is not recorded, or a directory has no
            entry for the key.
        EndpointUnavailableError: the server that has to be asked does not answer (retryable).
    """
    rule = Rule(Hash(), key_type or KeyType.TEXT) if table is None else _rule(topology, table)
    if key_type is not None and key_type is not rule.key_type:
        raise InvalidShardKeyError(f"the shard key of {table} is {rule.key_type}, not {key_type}")
    key = rule.key(_value(rule.key_type, text))
    total = topology.n_logical_shards
    of_table = "" if table is None else f" of {table}"
    if not isinstance(rule.strategy, Directory):
        why = f"the {rule.strategy.name} strategy{of_table} names it for this {rule.key_type} key"
        shard = rule.strategy.shard(key, total)
        return _location(topology, shard, rule.strategy.name, why)
    name, encoded = rule.strategy.directory, canonical(key)
    home = hash_shard(encoded, total)
    entry = sql.SQL("SELECT shard FROM {} WHERE directory = {} AND key = {}").format(
        sql.Identifier(schema_name(home), "shardkit_directory"), name, encoded
    )
    row = _ask(topology, topology.shard_map.owner(home), entry)
    if row is None:
        raise OperationError(
            f"directory {name!r} has no entry for {shown(key)}", hint="no row was ever written"
        )
    return _location(topology, row[0], "directory", f"an entry of directory {name!r} names it")


def _rule(topology: Topology, table: str) -> Rule:
    """Return the recorded rule of a table, from the first server that answers."""
    query = sql.SQL("SELECT rule FROM shardkit.placement WHERE table_name = {}").format(
        table.replace("\0", "")
    )
    silent: EndpointUnavailableError | None = None
    for physical in topology.physical:
        try:
            row = _ask(topology, physical, query)
        except EndpointUnavailableError as error:
            silent = error
            continue
        if row is not None:
            return Rule.read(row[0])
    if silent is not None:
        raise silent
    raise OperationError(
        f"how table {shown(table)} places its rows is not recorded",
        hint="set migrations.models and run shardkit migrate apply",
    )


def _ask(topology: Topology, physical: str, query: sql.Composed) -> tuple[Any, ...] | None:
    with connect(topology.physical[physical], application="shardkit locate") as connection:
        try:
            return connection.execute(query).fetchone()
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            return None  # not migrated yet


def _value(key_type: KeyType, text: str) -> object:
    """Return the value that a text on the command line stands for."""
    convert: Callable[[str], object] = str
    if key_type is KeyType.INTEGER and re.fullmatch(r"-?[0-9]{1,19}", text):
        convert = int
    elif key_type is KeyType.BYTES and re.fullmatch(r"([0-9a-fA-F]{2})*", text):
        convert = bytes.fromhex
    return convert(text)


def _location(topology: Topology, shard: int, strategy: str, why: str) -> Location:
    physical = topology.shard_map.owner(shard)
    endpoints = tuple(str(endpoint) for endpoint in topology.physical[physical].endpoints)
    return Location(shard, schema_name(shard), physical, endpoints, strategy, why)
