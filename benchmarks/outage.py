"""What an outage costs: how many attempts it draws, and what is left of the healthy servers.

Functions of `benchmarks.breaker`. Total failure is a port that accepts and hangs up; a black hole
is a server all of whose processes are stopped, so that the network stands and nobody answers.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from sqlalchemy import BigInteger
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.measure import database, servers
from shardkit import Cluster, Sharded, deadline, ids
from shardkit.config import PoolConfig, load
from shardkit.errors import ShardkitError, UnavailableError
from shardkit.local import LocalCluster
from shardkit.topology import Topology
from shardkit.writer import WriteSession

__all__ = ["outages"]

NAIVE_ATTEMPTS = 3
DEADLINE = 0.2
SHARDS = 64


class Base(DeclarativeBase):
    """The model of both figures."""


class Note(Sharded, Base):
    __tablename__ = "notes"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int] = mapped_column(BigInteger)


def outages(*, quick: bool) -> dict[str, float]:
    """Return the figures: attempts for each call, and the share of throughput that is left."""
    seconds = 3.0 if quick else 8.0
    with servers(logical_shards=SHARDS) as local:
        _, topology = load(local.config_path)
        small = database(local, topology, "outage", logical_shards=SHARDS, metadata=Base.metadata)
        figures = amplification(small, calls=2_000 if quick else 10_000)
        guarded = healthy_share(local, small, seconds=seconds, with_breakers=True)
        naive = healthy_share(local, small, seconds=seconds, with_breakers=False)
    return {
        **figures,
        "healthy_shards_throughput": guarded,
        "healthy_shards_throughput_without_breakers": naive,
    }


def amplification(topology: Topology, *, calls: int) -> dict[str, float]:
    """Return attempts for each call, and connections that reach the server, under total failure."""
    with dead_server() as (port, reached):
        name, shard = next(iter(topology.physical.items()))
        gone = replace(shard.primary, url=shard.primary.url.set(host="127.0.0.1", port=port))
        physical = {**topology.physical, name: replace(shard, primary=gone)}
        broken = Topology(topology.name, physical, topology.shard_map)
        owner = ids.compose(1, topology.shard_map.owned_by(name)[0], 0)
        attempts = 0

        def work(session: WriteSession) -> object:
            return session.get(Note, owner)

        with Cluster(broken) as cluster:
            writer = cluster.writer

            def counted() -> WriteSession:
                nonlocal attempts
                attempts += 1
                return writer()

            cluster.writer = counted  # type: ignore[method-assign,assignment]  # counts what run() opens
            for _ in range(calls):
                try:
                    cluster.run(work)
                except UnavailableError:
                    continue
            reached_with_breaker = len(reached)
        reached.clear()
        with Cluster(broken) as cluster:
            without_breakers(cluster)
            naive = calls // 10
            for _ in range(naive):
                for _ in range(NAIVE_ATTEMPTS):
                    try:
                        with cluster.writer() as session:
                            work(session)
                        break
                    except UnavailableError:
                        continue
        return {
            "retry_amplification": attempts / calls,
            "naive_retry_amplification": len(reached) / naive,
            "connections_per_call_with_breaker": reached_with_breaker / calls,
        }


def healthy_share(
    local: LocalCluster, topology: Topology, *, seconds: float, with_breakers: bool
) -> float:
    """Return the throughput of one physical shard while the other is a black hole, to before."""
    sick = list(topology.physical)[-1]
    with Cluster(topology, pool=PoolConfig(size=8, overflow=0)) as cluster:
        if not with_breakers:
            without_breakers(cluster)
        load_for(cluster, sick, 0.5)
        before = load_for(cluster, sick, seconds)
        local.pause(local.primary(sick).name)
        try:
            during = load_for(cluster, sick, seconds)
        finally:
            local.resume(local.primary(sick).name)
    return during / before


def load_for(cluster: Cluster, sick: str, seconds: float, n_threads: int = 8) -> float:
    """Return reads a second that the other physical shards answer, asked as often as this one."""
    owners = [
        (name != sick, ids.compose(1, shard, 0))
        for name in cluster.topology.physical
        for shard in cluster.topology.shard_map.owned_by(name)
    ]
    counts = [0] * n_threads
    end = time.monotonic() + seconds

    def repeat(number: int) -> None:
        choose = random.Random(number)
        while time.monotonic() < end:
            is_healthy, owner = choose.choice(owners)
            try:
                with deadline(DEADLINE), cluster.writer() as session:
                    session.get(Note, owner)
                counts[number] += is_healthy
            except ShardkitError:
                continue

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def without_breakers(cluster: Cluster) -> None:
    """Take the breakers away, for the arm without them."""
    for guard in cluster.connections.guards.values():
        guard.breaker.fail_max = 10**9
        guard.admit = lambda: None  # type: ignore[method-assign]  # lets everything through


@contextmanager
def dead_server() -> Iterator[tuple[int, list[int]]]:
    """Listen on a port, hang up on everybody, and list them."""
    reached: list[int] = []
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:

        def hang_up() -> None:
            while True:
                try:
                    connection, (_, port) = listener.accept()
                except OSError:
                    return
                reached.append(port)
                connection.close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        yield listener.getsockname()[1], reached
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
