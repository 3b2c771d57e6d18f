"""How long nobody can write when a primary is killed, and what becomes of the writes meanwhile.

    python -m benchmarks failover --quick --json

Threads write through `cluster.run` as a service would, each unit with a name. All processes of the
primary are killed at once; the watcher, with the settings that it has when nobody sets any, finds
out, promotes a replica, and makes the old primary a replica again. Measured is the time from the
kill to the next acknowledged write. Afterwards every acknowledged row must be there, once.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import BigInteger, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.measure import report, servers
from shardkit import Cluster, Sharded, all_shards, ids
from shardkit.config import Config, load
from shardkit.local import LocalCluster, LocalHost
from shardkit.ops.failover import watch
from shardkit.ops.failover.machine import Action, Rest
from shardkit.testing import create_tables, wait_until
from shardkit.topology import Topology
from shardkit.writer import WriteSession

TARGETS = {"recovery_p99_s": "≤ 5", "failed_writes": "≤ 0", "lost_writes": "≤ 0",
           "doubled_writes": "≤ 0"}  # fmt: skip
SHARDS = 8
WRITERS = 4
STEADY = 20
"""Writes acknowledged before a primary is killed."""
PATIENCE = 60.0


class Base(DeclarativeBase):
    """The model."""


class Note(Sharded, Base):
    __tablename__ = "notes"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int] = mapped_column(BigInteger)
    number: Mapped[int] = mapped_column(BigInteger)


@dataclass(slots=True)
class Load:
    """Writers, and what they were told.

    Attributes:
        acknowledged: times at which writes were, by number.
        failures: errors that writers were given.
    """

    cluster: Cluster
    acknowledged: dict[int, float] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    numbers: Any = field(default_factory=itertools.count)

    def write(self, owner: int) -> None:
        """Write until told to stop."""
        while not self.stop.is_set():
            number = next(self.numbers)

            def unit(session: WriteSession, number: int = number) -> None:
                session.add(Note(owner_id=owner, number=number))

            try:
                self.cluster.run(unit, operation=f"note {number}", near=(Note, owner))
            except Exception as error:  # noqa: BLE001  what a client would be shown
                self.failures.append(error)
            else:
                self.acknowledged[number] = time.monotonic()

    def after(self, moment: float) -> list[float]:
        """Return how long after a moment writes were acknowledged that came later."""
        return sorted(at - moment for at in [*self.acknowledged.values()] if at > moment)


def main(*, as_json: bool = False, quick: bool = False) -> None:
    """Measure, and print the figures."""
    rounds = 5 if quick else 30
    with servers(physical=1, replicas=2, confirm=1, logical_shards=SHARDS) as local:
        config, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        # All else as it is when nobody sets anything; real primaries are not killed every minute.
        config = config.model_copy(
            update={"failover": config.failover.model_copy(update={"every": 0.0})}
        )
        recoveries, load_, rows = _killed(local, config, topology, rounds)
    found = [row for row in rows if row in load_.acknowledged]
    figures = {
        "failovers": len(recoveries),
        "recovery_p50_s": statistics.median(recoveries),
        "recovery_p99_s": max(recoveries),
        "acknowledged_writes": len(load_.acknowledged),
        "failed_writes": len(load_.failures),
        "lost_writes": len(load_.acknowledged) - len(set(found)),
        "doubled_writes": len(rows) - len(set(rows)),
    }
    if load_.failures and not as_json:
        print(f"first failure: {load_.failures[0]!r}")
    report("failover", figures, peers=[], medians={}, targets=TARGETS, as_json=as_json)


def _killed(
    local: LocalCluster, config: Config, topology: Topology, rounds: int
) -> tuple[list[float], Load, list[int]]:
    """Kill primary after primary; return how long each time took, the load, and all rows."""
    latest: dict[str, Action] = {}
    stop = threading.Event()
    watcher = threading.Thread(
        target=watch,
        args=(config, topology),
        kwargs={"host": LocalHost(local), "stop": stop, "progress": latest.__setitem__},
    )
    watcher.start()
    recoveries: list[float] = []
    try:
        with Cluster(topology, failover_wait=config.failover.wait) as cluster:
            load_ = Load(cluster)
            owners = [ids.compose(1, n % SHARDS, n) for n in range(WRITERS)]
            threads = [threading.Thread(target=load_.write, args=(owner,)) for owner in owners]
            for thread in threads:
                thread.start()
            try:
                recoveries.extend(_one(local, load_, latest) for _ in range(rounds))
            finally:
                load_.stop.set()
                for thread in threads:
                    thread.join()
        with Cluster(_present(topology, local)) as cluster, cluster.writer() as session:
            rows = [*session.scalars(select(Note.number).options(all_shards()))]
    finally:
        stop.set()
        watcher.join()
    return recoveries, load_, rows


def _one(local: LocalCluster, load_: Load, latest: dict[str, Action]) -> float:
    before = len(load_.acknowledged)
    wait_until(lambda: isinstance(latest.get("alpha"), Rest), PATIENCE, "all servers are well")
    wait_until(lambda: len(load_.acknowledged) > before + STEADY, PATIENCE, "writes go on")
    name = local.primary("alpha").name
    local.kill_server(name)
    killed = time.monotonic()  # what was acknowledged until now came from the old primary
    wait_until(lambda: bool(load_.after(killed)), PATIENCE, "a write is acknowledged")
    wait_until(lambda: not isinstance(latest.get("alpha"), Rest), PATIENCE, "the watcher sees it")
    return load_.after(killed)[0]


def _present(topology: Topology, local: LocalCluster) -> Topology:
    """Return the topology with the primary of now."""
    port = local.primary("alpha").port
    shard = topology.physical["alpha"]
    address = next(e.address for e in shard.endpoints if e.url.port == port)
    return Topology(topology.name, {"alpha": shard.led_by(address)}, topology.shard_map)
