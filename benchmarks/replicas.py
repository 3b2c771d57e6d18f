"""What reading with a token costs, and how little a slow replica gets.

The cost: one row by the ORM from a replica, plain and with a token that the replica has to be
asked about, in turns; both in new sessions. Round trips are counted by a proxy on the wire. The
share: two replicas, one behind a link that makes it ten times slower; round robin in the same run
gives each one half. The tail: `benchmarks.hedging`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session

from benchmarks import hedging
from benchmarks.measure import interleaved, report, servers
from shardkit import Cluster, Sharded, ids, tokens
from shardkit.config import load
from shardkit.testing import FaultProxy, create_tables, reroute, wait_until
from shardkit.topology import Endpoint, Role, Topology, schema_name

PEERS = (
    "sqlalchemy.orm.Session on the replica",
    "round robin over the replicas",
    "a reader without hedging",
)
TARGETS = {
    "gated_vs_plain_read": "≤ 1.6",
    "extra_round_trips": "≤ 0",
    "slow_replica_share": "≤ 0.08",
    **hedging.TARGETS,
}
KEY = ids.compose(1, 3, 0)
NUMBERS = itertools.count()
SLOWER = 10


class Base(DeclarativeBase):
    """Models of this benchmark."""


class Photo(Sharded, Base):
    __tablename__ = "photos"
    caption: Mapped[str]


def main(*, as_json: bool, quick: bool = False) -> None:
    with servers(logical_shards=8, physical=1, replicas=2) as local:
        _, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        with Cluster(topology) as cluster:
            with cluster.writer() as session:
                session.add(Photo(id=KEY, caption="dawn"))
                session.commit()
            wait_until(lambda: _has_it(cluster, topology), 20.0, "the replicas have the row")
        figures, medians = cost(topology, 1_000 if quick else 10_000)
        figures |= round_trips(topology)
        figures |= shares(topology, 1_000 if quick else 5_000)
    # Servers of its own, which stumble.
    hedged, tails = hedging.figures(quick=quick)
    figures, medians = figures | hedged, medians | tails
    report("replicas", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


def _has_it(cluster: Cluster, topology: Topology) -> bool:
    found = set()
    for _ in topology.physical["alpha"].replicas:
        with cluster.reader() as session:
            found.add(session.get(Photo, KEY) is not None)
    return found == {True}


def one_replica(topology: Topology) -> Topology:
    """Return the topology with one replica, so that every read takes the same way."""
    shard = topology.physical["alpha"]
    physical = {"alpha": replace(shard, replicas=shard.replicas[:1])}
    return Topology(topology.name, physical, topology.shard_map)


def fresh(cluster: Cluster) -> str:
    """Return a token that no connection has been asked about."""
    with cluster.writer() as session:
        session.get_one(Photo, KEY).caption = f"dawn {next(NUMBERS)}"
        session.commit()
        return session.token


def reads(cluster: Cluster) -> tuple[Callable[[], object], Callable[[str], object]]:
    """Return a plain read and one with a token, from a replica."""

    def plain() -> object:
        with cluster.reader() as session:
            return session.get_one(Photo, KEY)

    def gated(token: str) -> object:
        with cluster.reader(after=token) as session:
            found = session.get_one(Photo, KEY)
            endpoint = session.endpoint_of("alpha")
            assert endpoint is not None
            assert endpoint.role is Role.REPLICA
            return found

    return plain, gated


def cost(topology: Topology, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return how much longer a read with a token takes, whose position is asked each time."""
    replica = topology.physical["alpha"].replicas[0]
    engine = create_engine(replica.url, isolation_level="AUTOCOMMIT")
    shown = engine.execution_options(schema_translate_map={None: schema_name(3)})
    with Cluster(one_replica(topology)) as cluster:
        plain, gated = reads(cluster)
        token = fresh(cluster)
        (mark,) = tokens.parse(token).marks
        wait_until(lambda: gated(token) is not None, 20.0, "the replica has replayed it")
        # Each a byte earlier than the one before: replayed, and for the server to say so. The
        # connection is told to forget what it has seen, as after each write of a service.
        positions = (
            tokens.Token((replace(mark, lsn=mark.lsn - n),)).text for n in itertools.count()
        )

        def gated_anew() -> object:
            _forget(cluster, replica)
            return gated(next(positions))

        def plain_anew() -> object:
            _forget(cluster, replica)  # the same work as in the other arm
            return plain()

        def plain_orm() -> object:
            with Session(shown) as session:
                return session.get_one(Photo, KEY)

        medians = interleaved(
            {
                "plain": plain_anew,
                "gated": gated_anew,
                "gated, seen before": lambda: gated(token),
                "sqlalchemy": plain_orm,
            },
            rounds=rounds,
        )
    engine.dispose()
    return {
        "gated_vs_plain_read": medians["gated"] / medians["plain"],
        "seen_before_vs_plain_read": medians["gated, seen before"] / medians["plain"],
        "plain_vs_sqlalchemy": medians["plain"] / medians["sqlalchemy"],
    }, medians


def _forget(cluster: Cluster, replica: Endpoint) -> None:
    """Have the pooled connections to a replica forget what they have seen."""
    for (endpoint, _), engine in cluster.connections._engines.items():  # noqa: SLF001
        if endpoint == replica:
            pool: Any = engine.pool
            for record in list(pool._pool.queue):  # noqa: SLF001
                record.dbapi_connection.replayed = None


def round_trips(topology: Topology) -> dict[str, float]:
    """Return how many more turns on the wire a read with a new token takes than a plain one."""
    narrow = one_replica(topology)
    endpoint = narrow.physical["alpha"].replicas[0]
    with (
        FaultProxy(endpoint.url.host, endpoint.url.port) as proxy,
        Cluster(reroute(narrow, {endpoint: proxy})) as cluster,
    ):
        # The probes have connections of their own; here only reads are counted.
        cluster.connections.probes.start = lambda: None  # type: ignore[method-assign]
        plain, gated = reads(cluster)
        for _ in range(10):
            plain()
            gated(fresh(cluster))
        turns = {}
        for name, read in {"plain": lambda _: plain(), "gated": gated}.items():
            written = [fresh(cluster) for _ in range(100)]
            proxy.forget()
            for token in written:
                _forget(cluster, endpoint)
                read(token)
            turns[name] = proxy.counts.round_trips / len(written)
    return {"extra_round_trips": turns["gated"] - turns["plain"]}


def shares(topology: Topology, rounds: int) -> dict[str, float]:
    """Return which share of the reads a replica gets that is ten times slower."""
    slow, quick = topology.physical["alpha"].replicas
    with (
        FaultProxy(slow.url.host, slow.url.port) as slow_link,
        FaultProxy(quick.url.host, quick.url.port) as quick_link,
    ):
        quick_link.shape(latency=0.001)
        slow_link.shape(latency=0.001 * SLOWER)
        through = reroute(topology, {slow: slow_link, quick: quick_link})
        with Cluster(through) as cluster:
            read: Counter[Endpoint | None] = Counter()
            for _ in range(rounds):
                with cluster.reader() as session:
                    session.get_one(Photo, KEY)
                    read[session.endpoint_of("alpha")] += 1
    turns = Counter(itertools.islice(itertools.cycle([slow, quick]), rounds))
    return {
        "slow_replica_share": read[through.physical["alpha"].replicas[0]] / rounds,
        "round_robin_share": turns[slow] / rounds,
    }
