"""The newest 20 of 65,536 rows over 16 to 4,096 logical shards on two servers.

Arms, interleaved, each with a fresh session a time: shardkit, SQLAlchemy's `ShardedSession`
(sorted and cut by the caller, since it only concatenates), and one unsharded table with all the
rows. Every arm returns the same objects, checked before timing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import BigInteger, Engine, create_engine, select
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.measure import connect, database, interleaved, report, servers
from shardkit import Cluster, Sharded, all_shards
from shardkit.config import load
from shardkit.ids import SEQUENCE_BITS, TIME_SHIFT
from shardkit.topology import Topology, schema_name

PEERS = ("sqlalchemy.ext.horizontal_shard.ShardedSession", "one PostgreSQL table")
TARGETS = {
    "scatter64_speedup": "≥ 100",
    "scatter1024_speedup": "≥ 150",
    "scatter64_vs_single_table": "≤ 3",
}
CURVE = (16, 64, 256, 1024, 4096)
MOST_PEERS = 1024
"""The peer needs a connection for each logical shard; beyond this, servers refuse so many."""
N_ROWS = 65_536
NEWEST = 20


class Base(DeclarativeBase):
    """Models of the shardkit arm."""


class Photo(Sharded, Base):
    __tablename__ = "photos"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int]
    caption: Mapped[str]


class PlainBase(DeclarativeBase):
    """Models of the peers."""


class PlainPhoto(PlainBase):
    __tablename__ = "photos"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    owner_id: Mapped[int] = mapped_column(BigInteger)
    caption: Mapped[str]


def main(*, as_json: bool, quick: bool = False) -> None:
    figures: dict[str, float] = {}
    medians: dict[str, float] = {}
    # A statement locks 512 tables and their indexes; so many locks need no shared lock table.
    settings = {"max_connections": "700", "max_locks_per_transaction": "2048"}
    with servers(logical_shards=64, settings=settings, shared_buffers_mb=256) as local:
        _, topology = load(local.config_path)
        for n_shards in (64, 1024) if quick else CURVE:
            made = database(
                local, topology, f"bench{n_shards}", logical_shards=n_shards, metadata=Base.metadata
            )
            load_rows(made)
            rounds = max(4, (2_000 if quick else 12_000) // n_shards)
            measured = measure(made, n_shards, rounds)
            if "peer" in measured:
                figures[f"scatter{n_shards}_speedup"] = measured["peer"] / measured["shardkit"]
            figures[f"scatter{n_shards}_vs_single_table"] = (
                measured["shardkit"] / measured["single"]
            )
            medians |= {f"{name}, {n_shards} shards": t for name, t in measured.items()}
    report("scatter", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


def load_rows(topology: Topology) -> None:
    """Fill every logical shard, and one table outside them with all the rows of all shards."""
    total = topology.n_logical_shards

    def rows(shard: str) -> str:
        ms = f"n * {total} + ({shard} * 7919 + n * 104729) % {total}"
        return (
            f"SELECT (({ms})::bigint << {TIME_SHIFT}) | ({shard}::bigint << {SEQUENCE_BITS}),"
            f" {shard}::bigint << {SEQUENCE_BITS}, 'photo ' || n"
            f" FROM generate_series(1, {N_ROWS // total}) AS n"
        )

    everything = f"INSERT INTO photos {rows('s')}, generate_series(0, {total - 1}) AS s"
    for shard in topology.physical.values():
        with connect(shard, admin=True) as connection:
            for number in topology.shard_map.owned_by(shard.name):
                target = f"{schema_name(number)}.photos (id, owner_id, caption)"
                connection.execute(f"INSERT INTO {target} {rows(str(number))}".encode())
            connection.execute(
                "CREATE TABLE photos"
                " (id bigint PRIMARY KEY, owner_id bigint NOT NULL, caption text NOT NULL)"
            )
            connection.execute(everything.encode())
            connection.execute(f"GRANT SELECT ON photos TO {shard.primary.url.username}".encode())
            connection.execute("ANALYZE")


def measure(topology: Topology, n_shards: int, rounds: int) -> dict[str, float]:
    has_peer = n_shards <= MOST_PEERS
    pool_size = n_shards // len(topology.physical) if has_peer else 1
    engines = {
        name: create_engine(shard.primary.url, pool_size=pool_size, max_overflow=0)
        for name, shard in topology.physical.items()
    }
    try:
        with Cluster(topology) as cluster:
            newest = select(Photo).order_by(Photo.id.desc()).limit(NEWEST).options(all_shards())

            def shardkit() -> list[int]:
                with cluster.reader() as session:
                    return [photo.id for photo in session.scalars(newest)]

            arms = {"shardkit": shardkit, "single": single(next(iter(engines.values())))}
            if has_peer:
                arms["peer"] = peer(topology, engines)
            answers = {name: run() for name, run in arms.items()}
            assert all(answer == answers["single"] for answer in answers.values()), answers
            for _ in range(10):  # drivers prepare a statement after some uses
                shardkit()
            return interleaved(arms, rounds=rounds, warm_up=1 if n_shards > 64 else 10)
    finally:
        for engine in engines.values():
            engine.dispose()


def peer(topology: Topology, engines: dict[str, Engine]) -> Callable[[], list[int]]:
    """The same over SQLAlchemy's ShardedSession, as its documentation shows it."""
    shards: dict[Any, Any] = {
        f"{number}": engines[topology.shard_map.owner(number)].execution_options(
            schema_translate_map={None: schema_name(number)}
        )
        for number in range(topology.n_logical_shards)
    }
    everywhere = list(shards)
    statement = select(PlainPhoto).order_by(PlainPhoto.id.desc()).limit(NEWEST)

    def run() -> list[int]:
        with ShardedSession(
            shards=shards,
            shard_chooser=lambda *_: "0",
            identity_chooser=lambda *_, **__: everywhere,
            execute_chooser=lambda _: everywhere,
        ) as session:
            found = session.scalars(statement).all()
            return sorted((photo.id for photo in found), reverse=True)[:NEWEST]

    return run


def single(engine: Engine) -> Callable[[], list[int]]:
    """The same over one table with all the rows."""
    statement = select(PlainPhoto).order_by(PlainPhoto.id.desc()).limit(NEWEST)

    def run() -> list[int]:
        with Session(engine) as session:
            return [photo.id for photo in session.scalars(statement)]

    return run
