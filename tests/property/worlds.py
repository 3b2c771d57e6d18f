"""Worlds: a schema, its rows, and a shard map, each twice: sharded, and on one plain server.

A world has databases of its own on the servers of the embedded cluster: one for each physical
shard, and one with all rows in one schema. Built once, read by any number of statements.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from sqlalchemy import Column, Engine, create_engine, inspect, text
from sqlalchemy.orm import Session

from shardkit import AsyncCluster, Cluster
from shardkit.async_session import AsyncReadSession
from shardkit.config import load
from shardkit.ids import compose
from shardkit.local import LocalCluster
from shardkit.models import sharding_of
from shardkit.router import Router
from shardkit.session import ReadSession
from shardkit.shapes import base_table
from shardkit.testing import create_tables
from shardkit.tokens import ASK_PRIMARIES
from shardkit.topology import PhysicalShard, ShardMap, Topology, schema_name
from tests.fixtures.sharded import admin
from tests.property.schemas import POOLS, Schema, made

__all__ = ["World", "opened"]

CODES = ("ana", "bo", "pt")


@dataclass(frozen=True)
class World:
    """One schema with rows and shard map, and sessions on both of its forms.

    Attributes:
        name: tells it apart in reports.
        schema: the models.
        topology: the shard map.
        values: the values that rows have, by table and column name; NULL among them.
        sharded: reads through shardkit.
        single: reads one plain schema.
        single_engine: what `single` reads through.
        awaited: reads through shardkit and asyncio; run by `runner`.
        runner: the event loop of `awaited`.
    """

    name: str
    schema: Schema
    topology: Topology
    values: dict[tuple[str, str], tuple[Any, ...]]
    sharded: ReadSession
    single: Session
    single_engine: Engine
    awaited: AsyncReadSession
    runner: asyncio.Runner

    def pool(self, column: Any) -> tuple[Any, ...]:
        """Return values worth comparing a column with; never empty."""
        table = base_table(column.table)
        assert table is not None, "columns of models are asked for, not those of subqueries"
        return self.values[table.name, column.name] or (None,)

    def __repr__(self) -> str:
        owners = " ".join(self.topology.shard_map.owners)
        return f"World({self.name}: {self.schema.root.__shard_strategy__}, shards on {owners})"


@contextmanager
def opened(local: LocalCluster, seed: int, number: int) -> Iterator[World]:
    """Build a world and open it; the same one for the same numbers.

    Args:
        local: the servers.
        seed: of everything that is random.
        number: of the world among those of the seed.
    """
    chance = random.Random(f"{seed}/{number}")
    name = f"world_{seed}_{number}"
    n_logical = chance.choice([3, 5, 8])
    topology = _topology(local, chance, name, n_logical)
    schema = made(chance, number + 1000 * seed, n_logical)
    create_tables(topology, schema.base.metadata)
    rows = _rows(chance, schema, Router(topology.n_logical_shards))
    _insert(topology, rows)
    values = {
        (table.name, column.name): tuple(
            {repr(row[column.name]): row[column.name] for _, t, row in rows if t is table
             and row.get(column.name) is not None}.values()
        )
        for table in schema.base.metadata.sorted_tables for column in table.c
    }  # fmt: skip
    first = next(iter(topology.physical.values()))
    engine = create_engine(first.admin_url, isolation_level="AUTOCOMMIT").execution_options(
        schema_translate_map={None: "single"}
    )
    engine.dialect.supports_server_side_cursors = False  # nothing is in a transaction here
    _fill_single(engine, schema, rows)
    with ExitStack() as stack:
        stack.callback(engine.dispose)
        runner = stack.enter_context(asyncio.Runner())
        cluster = stack.enter_context(Cluster(topology))
        awaited_cluster = runner.run(_made(topology))
        stack.callback(lambda: runner.run(awaited_cluster.close()))
        awaited = awaited_cluster.reader(after=ASK_PRIMARIES)
        stack.callback(lambda: runner.run(awaited.close()))
        yield World(
            name, schema, topology, values,
            stack.enter_context(cluster.reader(after=ASK_PRIMARIES)),
            stack.enter_context(Session(engine)), engine, awaited, runner,
        )  # fmt: skip


async def _made(topology: Topology) -> AsyncCluster:
    return AsyncCluster(topology)


def _topology(local: LocalCluster, chance: random.Random, name: str, n_logical: int) -> Topology:
    """Make the databases of a world; one to three physical shards, several on one server."""
    _, whole = load(local.config_path)
    servers = list(whole.physical.values())
    physical: dict[str, PhysicalShard] = {}
    for i in range(chance.choice([1, 2, 2, 3])):
        server = servers[i % len(servers)]
        database = f"{name}_{i}"
        owner = server.admin_url.username
        dsn = local.superuser_dsn(local.primary(server.name).name)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)".encode())
            connection.execute(f'CREATE DATABASE {database} OWNER "{owner}"'.encode())
        primary = replace(
            server.primary, physical=f"p{i}", url=server.primary.url.set(database=database)
        )
        physical[f"p{i}"] = PhysicalShard(
            f"p{i}", primary, (), server.admin_url.set(database=database)
        )
    names = list(physical)
    owners = [*names, *chance.choices(names, k=n_logical - len(names))]
    chance.shuffle(owners)
    return Topology(name, physical, ShardMap(tuple(owners), (1,) * n_logical))


# -- rows

Row = tuple[int | None, Any, dict[str, Any]]
"""Logical shard, None for a reference table; table; values by column."""


def _rows(chance: random.Random, schema: Schema, router: Router) -> list[Row]:
    ticks = iter(range(10, 10_000))
    rows: list[Row] = []

    def add(model: Any, shard: int, **keys: Any) -> dict[str, Any]:
        table = inspect(model).local_table
        row = {column.name: _value(chance, column) for column in table.c} | keys
        rows.append((shard, table, row))
        return row

    roots: list[tuple[Any, int]] = []
    if schema.key_pool:
        rule = sharding_of(inspect(schema.root).local_table).rule  # type: ignore[union-attr]
        for key in schema.key_pool:
            roots.append((key, router.shard(rule, key)))
            if chance.random() < 0.85:  # the other keys have no root, only leaves
                add(schema.root, roots[-1][1], root=key)
    else:
        for _ in range(7):
            shard = chance.randrange(router.total)
            roots.append((compose(next(ticks), shard, 0), shard))
            add(schema.root, shard, id=roots[-1][0])
    leaves = [
        add(schema.leaf, shard, **_names(schema.leaf, key, shard, ticks))
        for key, shard in chance.choices(roots, k=14)
    ]
    if "leaf_id" in schema.keys[schema.twig]:
        for leaf in chance.choices(leaves, k=12):
            add(schema.twig, (leaf["id"] >> 10) & 8191, leaf_id=leaf["id"], seat=next(ticks))
    else:
        for key, shard in chance.choices(roots, k=12):
            add(schema.twig, shard, **_names(schema.twig, key, shard, ticks))
    lands = inspect(schema.reference).local_table
    rows += [(None, lands, {"code": code, "size": i}) for i, code in enumerate(CODES)]
    return rows


def _names(model: Any, key: Any, shard: int, ticks: Iterator[int]) -> dict[str, Any]:
    own = {"id": compose(next(ticks), shard, 1)} if "id" in model.__table__.c else {}
    seat = {"seat": next(ticks)} if "seat" in model.__table__.c else {}
    return {"root": key, **own, **seat}


def _value(chance: random.Random, column: Column[Any]) -> Any:
    if column.nullable and chance.random() < 0.3:
        return None
    kind = {"n": "integer", "label": "text"}.get(column.name, column.name.removeprefix("v_"))
    return chance.choice(POOLS[kind][1]) if kind in POOLS else None


def _insert(topology: Topology, rows: Sequence[Row]) -> None:
    for physical in topology.physical.values():
        with admin(physical) as connection:
            for shard, table, row in rows:
                if shard is None:
                    _add(connection, "reference", table.name, row)
                elif topology.shard_map.owner(shard) == physical.name:
                    _add(connection, schema_name(shard), table.name, row)


def _fill_single(engine: Engine, schema: Schema, rows: Sequence[Row]) -> None:
    tables = schema.base.metadata.sorted_tables
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA single"))
        schema.base.metadata.create_all(connection, [t for t in tables if not t.schema])
        raw = connection.connection.driver_connection
        assert raw is not None
        for shard, table, row in rows:
            if shard is not None:
                _add(raw, "single", table.name, row)


def _add(connection: Any, schema: str, table: str, row: dict[str, Any]) -> None:
    marks = ", ".join(["%s"] * len(row))
    connection.execute(
        f"INSERT INTO {schema}.{table} ({', '.join(row)}) VALUES ({marks})".encode(),
        [*row.values()],
    )
