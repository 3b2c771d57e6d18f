"""How long migrations over 64 logical shards take, against Alembic once per schema.

Two primaries of the embedded cluster, fsync on, the application's own revisions. The baseline
is what people write first: `alembic upgrade head` in a loop, one schema after the other, with
Alembic's own version table in each.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from rich.console import Console
from rich.table import Table
from sqlalchemy import create_engine, text

from shardkit.config import load
from shardkit.local import LocalCluster, LocalOptions
from shardkit.ops import migrate
from shardkit.ops.revisions import locate
from shardkit.topology import Topology, schema_name

LOCATION = "app:migrations"
N_LOGICAL_SHARDS = 64
ROUNDS = 5


def main(*, as_json: bool, quick: bool = False) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # the servers run under an account of their own
        options = LocalOptions(
            replicas=0,
            logical_shards=N_LOGICAL_SHARDS,
            redis=False,
            memcached=False,
            pgbouncer=False,
        )
        with LocalCluster(Path(folder) / "cluster", options) as servers:
            results = measure(servers, rounds=1 if quick else ROUNDS)
    if as_json:
        print(json.dumps({"benchmark": "migrate", "seconds": results}))
        return
    table = Table("64 logical shards", "median s", "fastest s", "slowest s", box=None)
    for name, times in results.items():
        table.add_row(name, *(f"{f(times):.3f}" for f in (statistics.median, min, max)))
    Console().print(table)


def measure(servers: LocalCluster, *, rounds: int) -> dict[str, list[float]]:
    _, topology = load(servers.config_path)
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
        emptied(servers)
        timed("Alembic per schema, fresh", lambda: alembic(topology))
        timed("Alembic per schema, nothing to do", lambda: alembic(topology))
        emptied(servers)
        timed("shardkit migrate apply, fresh", shardkit)
        timed("shardkit migrate apply, nothing to do", shardkit)
    return results


def emptied(servers: LocalCluster) -> None:
    """Give both servers an empty database again."""
    for physical in ("alpha", "beta"):
        dsn = servers.superuser_dsn(servers.primary(physical).name, "postgres")
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
