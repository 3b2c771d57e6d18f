"""What a second question saves when replicas stumble, and how many second questions there are.

Two replicas of one primary, which are stopped for a quarter of a second in turns, as a checkpoint
or a busy neighbour does; reads by key through sessions, with and without hedging, in turns. One
that stumbles alone would be avoided without hedging, too: reads go where the latency is low.
The figures belong to `python -m benchmarks replicas`, too.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import BigInteger
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.measure import report, servers
from shardkit import Cluster, Sharded, ids
from shardkit.config import ReplicasConfig, load
from shardkit.local import LocalCluster
from shardkit.testing import create_tables

TARGETS = {"hedge_p999_gain": "≥ 10", "hedged_share": "≤ 0.05"}
STALL = 0.25
BETWEEN = 0.25
SHARDS = 64


class Base(DeclarativeBase):
    """The model that is read."""


class Note(Sharded, Base):
    __tablename__ = "notes"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int] = mapped_column(BigInteger)


def main(*, as_json: bool, quick: bool = False) -> None:
    found, medians = figures(quick=quick)
    report(
        "hedging", found, peers=("a reader without hedging",), medians=medians,
        targets=TARGETS, as_json=as_json,
    )  # fmt: skip


def figures(*, quick: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Return the figures, and the medians they come from."""
    rounds, seconds = (3, 4.0) if quick else (5, 12.0)
    tails: dict[str, list[float]] = {"plain": [], "hedged": []}
    middles: dict[str, list[float]] = {"plain": [], "hedged": []}
    shares: list[float] = []
    with servers(logical_shards=SHARDS, replicas=2, physical=1) as local:
        _, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        stumbling = [server.name for server in local.replicas("alpha")]
        arms = {
            "plain": Cluster(topology),
            "hedged": Cluster(topology, replicas=ReplicasConfig(hedge=True)),
        }
        counted = {"second": 0}
        hedges = arms["hedged"].connections.hedges["alpha"]
        spend = hedges.spend

        def counting() -> bool:
            granted = spend()
            counted["second"] += granted
            return granted

        hedges.spend = counting  # type: ignore[method-assign]  # counts second questions
        for cluster in arms.values():
            measured(cluster, 1.0)  # fills pools and tells the tail
        for _ in range(rounds):
            for name, cluster in arms.items():
                with stalls(local, stumbling):
                    before = counted["second"]
                    times = sorted(measured(cluster, seconds))
                tails[name].append(times[int(len(times) * 0.999)])
                middles[name].append(statistics.median(times))
                if name == "hedged":
                    shares.append((counted["second"] - before) / len(times))
        for cluster in arms.values():
            cluster.close()
    tail = {name: statistics.median(found) for name, found in tails.items()}
    return (
        {
            "hedge_p999_gain": tail["plain"] / tail["hedged"],
            "hedged_share": max(shares),
            "hedged_median_cost": statistics.median(middles["hedged"])
            / statistics.median(middles["plain"]),
        },
        {f"{name}, p99.9": seconds for name, seconds in tail.items()},
    )


def measured(cluster: Cluster, seconds: float) -> list[float]:
    """Return the seconds that each read of one thread took."""
    owner = ids.compose(1, 7, 0)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        with cluster.reader() as session:
            session.get(Note, owner)
        times.append(time.perf_counter() - began)
    return times


@contextmanager
def stalls(local: LocalCluster, names: Sequence[str]) -> Iterator[None]:
    """Stop one server after the other for a moment, again and again."""
    over = threading.Event()

    def stumble() -> None:
        for server in itertools.cycle(names):
            if over.wait(BETWEEN):
                return
            local.pause(server)
            over.wait(STALL)
            local.resume(server)

    thread = threading.Thread(target=stumble)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
