"""What an atomic commit over two servers costs, against two local transactions one after the other.

Arms, interleaved, each with fresh sessions a time: one atomic session that writes a row on each of
two servers; two plain sessions that write the same rows, each with a commit of its own. A third
writes both rows in one atomic session to one server, which is a plain commit. Round trips of each
arm are counted on the wire, by a proxy before either server.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack

from sqlalchemy.orm import DeclarativeBase, Mapped

from benchmarks.measure import Arm, database, interleaved, report, servers
from shardkit import Cluster, Sharded, ids
from shardkit.config import load
from shardkit.testing import FaultProxy, reroute

PEERS = ("two local transactions",)
N_COUNTED = 20


class Base(DeclarativeBase):
    """Models of the benchmark."""


class Note(Sharded, Base):
    __tablename__ = "notes"
    text: Mapped[str]


def main(*, as_json: bool, quick: bool = False) -> None:
    with servers(logical_shards=64) as local, ExitStack() as stack:
        _, topology = load(local.config_path)
        made = database(local, topology, "bench", logical_shards=64, metadata=Base.metadata)
        first, second = (made.shard_map.owned_by(name)[0] for name in sorted(made.physical))
        numbers = itertools.count(1)

        def note(shard: int) -> Note:
            return Note(id=ids.compose(next(numbers), shard, 0), text="noted")

        def arms(cluster: Cluster) -> dict[str, Arm]:
            def atomic(*shards: int) -> None:
                with cluster.writer(atomic=True) as session:
                    session.add_all([note(shard) for shard in shards])
                    session.commit()

            def two_local() -> None:
                for shard in (first, second):
                    # Flushed first, or it would be one INSERT without BEGIN and COMMIT.
                    with cluster.writer() as session:
                        session.add(note(shard))
                        session.flush()
                        session.commit()

            return {
                "atomic": lambda: atomic(first, second),
                "two local": two_local,
                "atomic on one server": lambda: atomic(first, first),
            }

        with Cluster(made) as cluster:
            medians = interleaved(arms(cluster), rounds=300 if quick else 3_000)
        through, proxies = made, []
        for shard in made.physical.values():
            proxy = stack.enter_context(FaultProxy(shard.primary.url.host, shard.primary.url.port))
            proxies.append(proxy)
            through = reroute(through, {shard.primary: proxy})
        turns = {}
        with Cluster(through) as cluster:
            for name, run in arms(cluster).items():
                run()  # opens the connections
                for proxy in proxies:
                    proxy.forget()
                for _ in range(N_COUNTED):
                    run()
                turns[name] = sum(proxy.counts.round_trips for proxy in proxies) / N_COUNTED
    figures = {
        "atomic_vs_two_local": medians["atomic"] / medians["two local"],
        "atomic_on_one_vs_two_local": medians["atomic on one server"] / medians["two local"],
        "atomic_round_trips": turns["atomic"],
        "two_local_round_trips": turns["two local"],
    }
    report("twophase", figures, peers=PEERS, medians=medians, targets={}, as_json=as_json)
