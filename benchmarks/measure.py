"""What the benchmarks share: interleaved timing, a report, and clusters to measure on."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table
from sqlalchemy import MetaData

from shardkit.local import LocalCluster, LocalOptions
from shardkit.testing import create_tables
from shardkit.topology import Endpoint, PhysicalShard, Role, ShardMap, Topology, schema_name

__all__ = ["database", "interleaved", "paired", "report", "servers", "tables"]

Arm = Callable[[], object]


def interleaved(
    arms: Mapping[str, Arm],
    *,
    rounds: int,
    warm_up: int = 10,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each arm, run in turns so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(warm_up):
        for run in arms.values():
            run()
    gc.collect()
    for _ in range(rounds):
        for name, run in arms.items():
            start = timer()
            run()
            times[name].append(timer() - start)
    return {name: statistics.median(measured) for name, measured in times.items()}


def paired(
    arms: Mapping[str, Arm], *, rounds: int, warm_up: int = 10
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return wall seconds, and seconds of this process's CPU, of each round of each arm.

    The arms run in turns, every other round in the other order: who comes first pays for what
    others have left in the processor's caches.
    """
    walls: dict[str, list[float]] = {name: [] for name in arms}
    cpus: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(warm_up):
        for run in arms.values():
            run()
    gc.collect()
    names = list(arms)
    for _ in range(rounds):
        names.reverse()
        for name in names:
            cpu, start = time.process_time(), time.perf_counter()
            arms[name]()
            walls[name].append(time.perf_counter() - start)
            cpus[name].append(time.process_time() - cpu)
    return walls, cpus


def report(
    subject: str,
    figures: Mapping[str, float],
    *,
    peers: Sequence[str],
    medians: Mapping[str, float],
    targets: Mapping[str, str],
    as_json: bool,
) -> None:
    """Print the figures, each beside its target, and the medians they come from."""
    if as_json:
        rounded = {name: round(value, 4) for name, value in figures.items()}
        print(json.dumps({"subject": subject, "figures": rounded, "peers": list(peers)}))
        return
    console = Console()
    table = Table("figure", "measured", "target", "", title=subject, box=None)
    for name, value in figures.items():
        target = targets.get(name, "")
        table.add_row(name, f"{value:.2f}", target, _verdict(value, target))
    console.print(table)
    raw = Table("arm", "median", box=None)
    for name, seconds in medians.items():
        raw.add_row(
            name, f"{seconds * 1e6:,.0f} µs" if seconds > 1e-5 else f"{seconds * 1e9:,.1f} ns"
        )
    console.print(raw)


def _verdict(value: float, target: str) -> str:
    if not target:
        return ""
    sign, bound = target.split()
    met = value <= float(bound) if sign == "≤" else value >= float(bound)
    return "met" if met else "missed"


@contextmanager
def servers(**options: Any) -> Iterator[LocalCluster]:
    """Run two primaries without replicas or caches, gone afterwards."""
    shape = {"replicas": 0, "redis": False, "memcached": False, "pgbouncer": False, "fsync": False}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # the servers run under an account of their own
        with LocalCluster(Path(folder) / "cluster", LocalOptions(**{**shape, **options})) as local:
            yield local


def database(
    local: LocalCluster, topology: Topology, name: str, *, logical_shards: int, metadata: MetaData
) -> Topology:
    """Make a database of its own on every server, with its own number of logical shards."""
    physical = {}
    for shard in topology.physical.values():
        dsn = local.superuser_dsn(local.primary(shard.name).name)
        with psycopg.connect(dsn, autocommit=True) as superuser:
            superuser.execute(
                sql.SQL("CREATE DATABASE {} OWNER {}").format(
                    sql.Identifier(name), sql.Identifier(str(shard.admin_url.username))
                )
            )
        primary = Endpoint(shard.name, Role.PRIMARY, shard.primary.url.set(database=name))
        admin = shard.admin_url.set(database=name)
        physical[shard.name] = PhysicalShard(shard.name, primary, (), admin)
    names = list(physical)
    owners = tuple(names[n * len(names) // logical_shards] for n in range(logical_shards))
    made = Topology(topology.name, physical, ShardMap(owners, (1,) * logical_shards))
    create_tables(made, metadata)
    return made


@contextmanager
def tables(topology: Topology, metadata: MetaData) -> Iterator[None]:
    """Have the tables of models in every logical shard, and nothing of them afterwards."""
    create_tables(topology, metadata)
    try:
        yield
    finally:
        for shard in topology.physical.values():
            with connect(shard, admin=True) as connection:
                for number in topology.shard_map.owned_by(shard.name):
                    for table in metadata.sorted_tables:
                        for kind, name in (
                            ("TABLE", table.name),
                            ("FUNCTION", f"shardkit_changed_{table.name}"),
                        ):
                            connection.execute(
                                sql.SQL("DROP {} IF EXISTS {}").format(
                                    sql.SQL(kind), sql.Identifier(schema_name(number), name)
                                )
                            )


def connect(shard: PhysicalShard, *, admin: bool = False) -> psycopg.Connection[Any]:
    """Return a plain connection to a primary; statements commit by themselves."""
    url = (shard.admin_url if admin else shard.primary.url).set(drivername="postgresql")
    return psycopg.connect(url.render_as_string(hide_password=False), autocommit=True)
