"""What a second question saves when replicas stumble, and how many second questions there are.

Two replicas of one primary, each behind a link that delivers one answer of 200 at random 150 ms
late, independently of the other: a lost packet, a pause of a process, a page that has to be read.
Nothing foresees these, so choosing the better replica does not help; asking the other one does. The
links are processes of their own, so that what they do is not measured as the client's. Reads by
key through sessions, in turns: one hedged and one not over the same links, and one without links,
whose tail is what the machine itself does to a reader while this runs.

A round has 2,000 reads an arm, of which 10 stumble: its p99.9 is the second slowest. The figures
are medians over the rounds, 10 of them with `--quick`, so that a moment in which the machine does
something else spoils a round and not the figure. They belong to `python -m benchmarks replicas`.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Self

from sqlalchemy import BigInteger
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.measure import report, servers
from shardkit import Cluster, Sharded, ids
from shardkit.config import ReplicasConfig, load
from shardkit.session import ReadSession
from shardkit.testing import FaultProxy, create_tables, reroute
from shardkit.testing.faults import Way
from shardkit.topology import Endpoint, Topology

TARGETS = {"hedge_p999_gain": "≥ 10", "hedged_share": "≤ 0.05"}
STUMBLES = 0.005
STUMBLE = 0.15
READS = 2_000
"""Of each arm in a round."""
WARM = 8
"""Connections to each replica that a service has open."""
SEED = 7


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
    rounds = 10 if quick else 40
    with servers(logical_shards=8, replicas=2, physical=1) as local:
        _, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        with stumbling(topology) as through, Arms(topology, through) as arms:
            arms.run(READS // 2)  # fills pools and tells the tail
            found = [arms.run(READS) for _ in range(rounds)]
    return (
        {
            "hedge_p999_gain": _median(r["plain p99.9"] / r["hedged p99.9"] for r in found),
            "hedge_p99_gain": _median(r["plain p99"] / r["hedged p99"] for r in found),
            "hedged_share": max(r["share"] for r in found),
            "hedged_median_cost": _median(r["hedged p50"] / r["plain p50"] for r in found),
            "hedged_vs_undisturbed_p999": _median(
                r["hedged p99.9"] / r["undisturbed p99.9"] for r in found
            ),
            "hedge_reads": rounds * READS,
        },
        {name: _median(r[name] for r in found) for name in found[0] if name != "share"},
    )


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


class Arms:
    """A cluster that hedges and one that does not over the same links, and one without links."""

    def __init__(self, topology: Topology, through: Topology) -> None:
        self._clusters = {
            "plain": Cluster(through),
            "hedged": Cluster(through, replicas=ReplicasConfig(hedge=True)),
            "undisturbed": Cluster(topology),
        }
        self._n_second = 0
        hedges = self._clusters["hedged"].connections.hedges["alpha"]
        spend = hedges.spend

        def counting() -> bool:
            granted = spend()
            self._n_second += granted
            return granted

        hedges.spend = counting  # type: ignore[method-assign]  # counts second questions

    def __enter__(self) -> Self:
        for cluster in self._clusters.values():
            with ExitStack() as stack:  # all at once, so that each has a connection of its own
                for _ in range(2 * WARM):
                    read(stack.enter_context(cluster.reader()), 0)
        return self

    def __exit__(self, *_: object) -> None:
        for cluster in self._clusters.values():
            cluster.close()

    def run(self, reads: int) -> dict[str, float]:
        """Read in turns; return quantiles in seconds, and the share that was asked twice."""
        times: dict[str, list[float]] = {name: [] for name in self._clusters}
        before = self._n_second
        gc.collect()
        for number in range(reads):
            for name, cluster in self._clusters.items():
                began = time.perf_counter()
                with cluster.reader() as session:
                    read(session, number)
                times[name].append(time.perf_counter() - began)
        found = {"share": (self._n_second - before) / reads}
        for name, taken in times.items():
            taken.sort()
            for label, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)):
                found[f"{name} {label}"] = taken[int(reads * part)]
        return found


def read(session: ReadSession, number: int) -> None:
    """Ask for one row by its key."""
    session.get(Note, ids.compose(1, number % 8, 0))


@contextmanager
def stumbling(topology: Topology) -> Iterator[Topology]:
    """Run a link in front of each replica; yield the topology by way of them."""
    context = multiprocessing.get_context("spawn")
    replicas = topology.physical["alpha"].replicas
    with ExitStack() as stack:
        links: dict[Endpoint, _Address] = {}
        for number, replica in enumerate(replicas):
            here, there = context.Pipe()
            arguments = (there, replica.url.host, replica.url.port, SEED + number)
            process = context.Process(target=_link, args=arguments, daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(here.send, None)
            links[replica] = _Address(*here.recv())
        yield reroute(topology, links)


@dataclass(frozen=True)
class _Address:
    host: str
    port: int


def _link(pipe: Connection, host: str | None, port: int | None, seed: int) -> None:
    """Carry bytes, in a process of its own, until told to end."""
    with FaultProxy(host, port, seed=seed) as proxy:
        proxy.shape(Way.TO_CLIENT, stumbles=STUMBLES, stumble=STUMBLE)
        pipe.send((proxy.host, proxy.port))
        pipe.recv()
