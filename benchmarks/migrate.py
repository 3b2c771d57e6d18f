"""How long migrations over 64 logical shards take, against Alembic once per schema.

Two primaries of the embedded cluster, fsync on, the application's own revisions. The baseline
is what people write first: `alembic upgrade head` in a loop, one schema after the other, with
Alembic's own version table in each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

from benchmarks.measure import report, servers
from shardkit.config import load
from shardkit.local import LocalCluster
from shardkit.ops import migrate
from shardkit.ops.revisions import locate
from shardkit.topology import Topology, schema_name

LOCATION = "app:migrations"
N_LOGICAL_SHARDS = 64
PEERS = ("Alembic, once per schema",)


def main(*, as_json: bool, quick: bool = False) -> None:
    with servers(logical_shards=N_LOGICAL_SHARDS, fsync=True) as local:
        times = measure(local, rounds=2 if quick else 5)
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    figures = {
        f"vs_alembic_per_schema{suffix}": medians[f"Alembic per schema, {what}"]
        / medians[f"shardkit migrate apply, {what}"]
        for suffix, what in (("", "fresh"), ("_nothing_to_do", "nothing to do"))
    }
    report("migrate", figures, peers=PEERS, medians=medians, targets={}, as_json=as_json)


def measure(local: LocalCluster, *, rounds: int) -> dict[str, list[float]]:
    _, topology = load(local.config_path)
    results: dict[str, list[float]] = {}

    def timed(name: str, step: Callable[[], None]) -> None:
        start = time.perf_counter()
        step()
        results.setdefault(name, []).append(time.perf_counter() - start)

    def shardkit() -> None:
        revisions = migrate.load_revisions(LOCATION, folder=Path())
        outcome = migrate.apply(topology, revisions)
        if outcome.error:
            raise outcome.error

    for _ in range(rounds):
        emptied(local)
        timed("Alembic per schema, fresh", lambda: alembic(topology))
        timed("Alembic per schema, nothing to do", lambda: alembic(topology))
        emptied(local)
        timed("shardkit migrate apply, fresh", shardkit)
        timed("shardkit migrate apply, nothing to do", shardkit)
    return results


def emptied(local: LocalCluster) -> None:
    """Give both servers an empty database again."""
    for physical in ("alpha", "beta"):
        dsn = local.superuser_dsn(local.primary(physical).name, "postgres")
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("DROP DATABASE shardkit WITH (FORCE)")
            connection.execute("CREATE DATABASE shardkit OWNER shardkit_admin")


def alembic(topology: Topology) -> None:
    """Upgrade one schema after the other, as a loop around Alembic does."""
    script = ScriptDirectory(str(locate(LOCATION, folder=Path())))
    for name, shard in topology.physical.items():
        engine = create_engine(shard.admin_url)
        for number in topology.shard_map.owned_by(name):
            schema = schema_name(number)
            with engine.begin() as connection:
                connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
                connection.execute(text(f"SET LOCAL search_path = {schema}"))
                context = MigrationContext.configure(
                    connection,
                    opts={
                        "fn": lambda revision, _: script._upgrade_revs("head", revision),  # noqa: SLF001  what alembic.command.upgrade calls
                        "version_table_schema": schema,
                    },
                )
                with Operations.context(context):
                    context.run_migrations()
        engine.dispose()
