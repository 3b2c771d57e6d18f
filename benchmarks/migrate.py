"""Ten revisions over many schemas: shardkit, Alembic once per schema, django-tenants.

One primary of the embedded cluster, fsync on; the schemas exist, and get the same tables, columns
and indexes from each. Alembic runs as its cookbook has it for tenants, `alembic -x tenant=schema
upgrade head` for one schema after the other, on a sample of them, times their number; and once
more in a loop inside one process, which spares it its start, the reading of revisions and nothing
else (`…_in_process`). django-tenants runs `migrate_schemas` in a process of its own, timed without
its start, with the faster of its executors.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config

from benchmarks.measure import report, servers
from shardkit.config import load
from shardkit.local import LocalCluster
from shardkit.ops import migrate
from shardkit.topology import Topology, schema_name

PEERS = ("Alembic, once per schema", "django-tenants, migrate_schemas")
TARGETS = {
    "vs_alembic_per_schema": "≥ 15",
    "vs_django_tenants": "≥ 8",
    "vs_alembic_per_schema_nothing_to_do": "≥ 100",
}

BODIES = (
    'op.create_table("items", big("id", primary_key=True), big("owner_id"), text("title"))',
    'op.create_table("notes", big("id", primary_key=True), big("item_id"), text("body"))',
    'op.add_column("items", text("subtitle"))',
    'op.add_column("items", big("views", nullable=False, server_default="0"))',
    'op.add_column("notes", big("author_id"))',
    'op.create_index("items_owner", "items", ["owner_id"])',
    'op.create_table("tags", big("id", primary_key=True), big("item_id"), text("label"))',
    'op.add_column("tags", big("weight", nullable=False, server_default="1"))',
    'op.create_index("notes_item", "notes", ["item_id"])',
    'op.create_index("tags_item", "tags", ["item_id"])',
)
"""What each revision does; `benchmarks.tenants` says the same in Django's words."""

HEAD = '''"""Revision {n}."""
import sqlalchemy as sa
from alembic import op
revision = "r{n:02}"
down_revision = {down}


def big(name, **options):
    return sa.Column(name, sa.BigInteger, autoincrement=False, **options)


def text(name):
    return sa.Column(name, sa.Text)


def upgrade():
    {body}
'''

ENV = """
from alembic import context
from sqlalchemy import create_engine, pool, text

schema = context.get_x_argument(as_dictionary=True)["tenant"]
engine = create_engine(context.config.get_main_option("sqlalchemy.url"), poolclass=pool.NullPool)
with engine.connect() as connection:
    connection.execute(text(f'set search_path to "{schema}"'))
    connection.commit()
    connection.dialect.default_schema_name = schema
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""


def main(*, as_json: bool, quick: bool = False) -> None:
    n = 64 if quick else 256
    with servers(physical=1, logical_shards=n, fsync=True) as local:
        times = measure(local, n)
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    figures = {
        f"vs_{name}{suffix}": medians[f"{peer}, {what}"] / medians[f"shardkit, {what}"]
        for suffix, what in (("", "10 revisions"), ("_nothing_to_do", "nothing to do"))
        for name, peer in (
            ("alembic_per_schema", "Alembic per schema"),
            ("alembic_in_process", "Alembic in a loop"),
            ("django_tenants", "django-tenants"),
        )
    }
    for size in () if quick else (1024, 4096):
        with servers(physical=1, logical_shards=size, fsync=True) as local:
            found = ours(local)
        medians |= {f"{name}, {size}": values[0] for name, values in found.items()}
        figures[f"seconds_{size}"] = medians[f"shardkit, 10 revisions, {size}"]
        figures[f"seconds_{size}_nothing_to_do"] = medians[f"shardkit, nothing to do, {size}"]
    figures |= {"schemas": n, "seconds": medians["shardkit, 10 revisions"]}
    report("migrate", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


def measure(local: LocalCluster, n: int) -> dict[str, list[float]]:
    """Time every arm, ours before, between and after the others, so that noise hits all alike.

    Twice each time, since a second of ours meets more or less of what else the machine does than a
    minute of theirs.
    """
    _, topology = load(local.config_path)
    found = [ours(local, rounds=2)]
    results = alembic(local, topology, n)
    found.append(ours(local, rounds=2))
    results |= django(local, topology, n)
    found.append(ours(local, rounds=2))
    return results | {name: [value for each in found for value in each[name]] for name in found[0]}


def ours(local: LocalCluster, *, rounds: int = 1) -> dict[str, list[float]]:
    _, topology = load(local.config_path)
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for _ in range(rounds):
            emptied(local)
            started(topology)
            settled(local)
            for what in ("10 revisions", "nothing to do"):
                start = time.perf_counter()
                outcome = migrate.apply(topology, migrate.load_revisions(folder, folder=Path()))
                results.setdefault(f"shardkit, {what}", []).append(time.perf_counter() - start)
                if outcome.error:
                    raise outcome.error
    return results


def started(topology: Topology) -> None:
    """Make every logical shard, without any table of the application's."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = migrate.apply(topology, migrate.load_revisions(folder, folder=Path()))
        if outcome.error:
            raise outcome.error


def write(folder: Path) -> None:
    """Write the revisions as an Alembic environment."""
    (folder / "versions").mkdir()
    (folder / "env.py").write_text(ENV)
    (folder / "script.py.mako").touch()
    for n, body in enumerate(BODIES, start=1):
        down = f'"r{n - 1:02}"' if n > 1 else "None"
        text = HEAD.format(n=n, down=down, body=body)
        (folder / "versions" / f"r{n:02}.py").write_text(text)


def alembic(local: LocalCluster, topology: Topology, n: int) -> dict[str, list[float]]:
    """Upgrade one schema after the other, as a loop around Alembic does."""
    emptied(local)
    url = topology.physical["alpha"].admin_url
    schemas(topology, n)
    settled(local)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        config = Config()
        config.set_main_option("script_location", folder)
        text = url.render_as_string(hide_password=False).replace("%", "%%")
        config.set_main_option("sqlalchemy.url", text)
        for what in ("10 revisions", "nothing to do"):
            start = time.perf_counter()
            for number in range(n):
                options = type("Options", (), {"x": [f"tenant={schema_name(number)}"]})
                config.cmd_opts = options()
                command.upgrade(config, "head")
            results[f"Alembic in a loop, {what}"] = [time.perf_counter() - start]
        emptied(local)
        schemas(topology, n)
        settled(local)
        (Path(folder) / "alembic.ini").write_text(
            f"[alembic]\nscript_location = {folder}\nsqlalchemy.url = {text}\n"
        )
        sample = range(0, n, max(1, n // SAMPLE))
        for what in ("10 revisions", "nothing to do"):
            start = time.perf_counter()
            for number in sample:
                subprocess.run(
                    [
                        *(sys.executable, "-m", "alembic", "-c", f"{folder}/alembic.ini"),
                        *("-x", f"tenant={schema_name(number)}", "upgrade", "head"),
                    ],
                    check=True,
                    capture_output=True,
                )
            seconds = time.perf_counter() - start
            results[f"Alembic per schema, {what}"] = [seconds * n / len(sample)]
    return results


SAMPLE = 16
"""Schemas that get a process of Alembic each."""


def django(local: LocalCluster, topology: Topology, n: int) -> dict[str, list[float]]:
    """Let django-tenants do the same in a process of its own."""
    best: dict[str, list[float]] = {}
    url = topology.physical["alpha"].admin_url
    for executor in ("standard", "multiprocessing"):
        emptied(local)
        schemas(topology, n)
        settled(local)
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.tenants", str(n), executor],
            env=os.environ | {"TENANTS_URL": url.render_as_string(hide_password=False)},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            sys.exit(
                f"django-tenants failed; it comes with the extra `bench`\n{run.stderr[-3000:]}"
            )
        found = json.loads(run.stdout.splitlines()[-1])
        for what, seconds in found.items():
            name = f"django-tenants, {what}"
            best[name] = [min(seconds, *best.get(name, [seconds]))]
    return best


def schemas(topology: Topology, n: int) -> None:
    url = topology.physical["alpha"].admin_url.set(drivername="postgresql")
    dsn = url.render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as connection:
        for number in range(n):
            connection.execute(f"CREATE SCHEMA {schema_name(number)}")


def emptied(local: LocalCluster) -> None:
    """Give the server an empty database again."""
    dsn = local.superuser_dsn(local.primary("alpha").name, "postgres")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("DROP DATABASE shardkit WITH (FORCE)")
        connection.execute("CREATE DATABASE shardkit OWNER shardkit_admin")


def settled(local: LocalCluster) -> None:
    """Have the disk be done with what the arm before has left: thousands of files to remove.

    The shortest arm would pay for it otherwise, as all of its time is in the first seconds.
    """
    dsn = local.superuser_dsn(local.primary("alpha").name, "postgres")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
    os.sync()
