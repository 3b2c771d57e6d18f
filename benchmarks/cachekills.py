"""How long something old may be shown when writers are killed between COMMIT and the cache.

    python -m benchmarks cachekills [--quick] [--json]

Real sessions on real servers, rows that may stay for an hour, one relay in a process of its own,
and a reader that polls as any client does, in another. Hundreds of writers, one after the other,
each a process of its own, end at the point between the answer to COMMIT and what would have
stored the row: a third by SIGKILL of their own, a third by `os._exit`, a third by `kill -9` of
somebody else while they stand there. Before COMMIT every second one loses its marker, and another
reader fills the old row again, so that nothing but the relay stands between that and the hour.

The window is from the answer to COMMIT until the last read began that was shown the old row; 0
where nobody was. Wall time, by the clock that all processes of a machine share.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy.orm import DeclarativeBase, Mapped

from benchmarks.cachetrace import memcached
from benchmarks.measure import report, servers, tables
from shardkit import Cluster, Sharded, ids
from shardkit.cache import Kind, Op, Outcome, Request
from shardkit.cachewrites import CacheWrites
from shardkit.config import CacheConfig, load
from shardkit.relay import Relay
from shardkit.testing import wait_until

KILLS: Final = 300
PEERS = ("the bound of 1 s",)
TARGETS = {
    "killed_writers": "≥ 200", "stale_window_max": "≤ 1", "stale_window_p99": "≤ 0.25",
    "never_repaired": "≤ 0", "old_reads": "≥ 1",
}  # fmt: skip
_WATCHED: Final = 3.0
"""Seconds for which a row is polled after its writer was killed; at the end all are read again."""

_ENOUGH: Final = 60.0


class Base(DeclarativeBase):
    """Models of the benchmark."""


class Account(Sharded, Base):
    __tablename__ = "cachekills"
    __cache_ttl__ = 3600.0
    n: Mapped[int]


@dataclass(frozen=True)
class Shared:
    """What the processes have in common.

    Attributes:
        config: of the servers.
        node: of Memcached.
        ids: of the rows, one for each writer.
        committed: when each writer had its answer to COMMIT; 0 before that.
        old: when the last read of each row began that was shown the old value after that.
        seen: how many reads were shown something old after COMMIT; how many there were in all.
        stop: set at the end.
    """

    config: Path
    node: str
    ids: tuple[int, ...]
    committed: Any
    old: Any
    seen: Any
    stop: Any

    def cluster(self) -> Cluster:
        """Return a cluster of one's own."""
        return _cluster(self.config, self.node)


@dataclass
class Windows:
    """What was seen; seconds."""

    windows: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    old_reads: int = 0
    reads: int = 0
    never: int = 0

    @property
    def figures(self) -> dict[str, float]:
        """What is reported."""
        return {
            "killed_writers": len(self.windows),
            "stale_window_max": max(self.windows),
            "stale_window_p99": quantile(self.windows, 0.99),
            "stale_window_p50_marker_lost": statistics.median(self.lost),
            "old_reads": self.old_reads,
            "reads": self.reads,
            "never_repaired": self.never,
        }


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that so many are at most, by rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main(*, as_json: bool, quick: bool = False) -> None:
    with servers(physical=1) as local, memcached() as port:
        outcome = run(local.config_path, f"127.0.0.1:{port}", kills=40 if quick else KILLS)
    targets = TARGETS | ({"killed_writers": ""} if quick else {})
    if not as_json:
        print(f"load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    report("cachekills", outcome.figures, peers=PEERS, medians={}, targets=targets, as_json=as_json)
    if outcome.never:
        sys.exit(1)


def run(config: Path, node: str, *, kills: int, watched: float = _WATCHED) -> Windows:
    """Kill so many writers, one after the other, and watch what readers are shown.

    Args:
        config: of a cluster, in which a table is made if it is not there.
        node: a Memcached.
        kills: how many.
        watched: seconds for which the row of the last one is polled.
    """
    _, topology = load(config)
    with tables(topology, Base.metadata), _cluster(config, node) as cluster:
        accounts = [Account(n=0) for _ in range(kills)]
        for account in accounts:
            with cluster.writer() as session:
                session.add(account)
                session.commit()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.cachekills"])
        shared = Shared(
            config,
            node,
            tuple(account.id for account in accounts),
            context.Array("d", kills, lock=False),
            context.Array("d", kills, lock=False),
            context.Array("q", 2, lock=False),
            context.Event(),
        )
        roles: list[Callable[[Shared], None]] = [_relay, _poll]
        helpers = [context.Process(target=role, args=(shared,), daemon=True) for role in roles]
        for each in helpers:
            each.start()
        try:
            for at in range(kills):
                _kill_one(context, shared, at)
                if not all(each.is_alive() for each in helpers):
                    raise AssertionError("the relay or the reader ended before the end")
            last = shared.committed[kills - 1]
            wait_until(lambda: time.monotonic() > last + watched, _ENOUGH, "all were watched")
        finally:
            shared.stop.set()
            for each in helpers:
                each.join(_ENOUGH)
                if each.is_alive():
                    each.kill()
        with cluster.reader() as session:
            shown = [session.get_one(Account, each).n for each in shared.ids]
    windows = [max(0.0, old - done) for old, done in zip(shared.old, shared.committed, strict=True)]
    lost = [window for at, window in enumerate(windows) if _loses_marker(at)]
    return Windows(windows, lost, shared.seen[0], shared.seen[1], sum(n != 1 for n in shown))


def _cluster(config: Path, node: str) -> Cluster:
    _, topology = load(config)
    return Cluster(topology, cache=CacheConfig(backend="memcached", nodes=(node,)))


def _loses_marker(at: int) -> bool:
    return at % 2 == 1


# -- the processes


def _kill_one(context: Any, shared: Shared, at: int) -> None:
    writer = context.Process(target=_write, args=(shared, at))
    writer.start()
    if at % 3 == 2:
        wait_until(lambda: shared.committed[at] > 0, _ENOUGH, "the writer has committed")
        os.kill(writer.pid, signal.SIGKILL)
    writer.join(_ENOUGH)
    if shared.committed[at] == 0 or writer.exitcode not in {-signal.SIGKILL, 1}:
        raise AssertionError(f"writer {at} ended with {writer.exitcode} before it had committed")


def _write(shared: Shared, at: int) -> None:
    """Change one row and end when that holds."""
    prepare = CacheWrites.prepare

    def then_lose(writes: CacheWrites) -> None:
        prepare(writes)
        if _loses_marker(at):
            _refill(shared, cluster, shared.ids[at])

    def end(_writes: CacheWrites) -> None:
        shared.committed[at] = time.monotonic()
        if at % 3 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        elif at % 3 == 1:
            os._exit(1)
        while True:
            signal.pause()  # until somebody kills it

    CacheWrites.prepare = then_lose  # type: ignore[method-assign,assignment]  # of this process
    CacheWrites.finish = end  # type: ignore[method-assign,assignment]
    cluster = shared.cluster()
    with cluster.writer() as session:
        session.get_one(Account, shared.ids[at]).n = 1
        session.commit()


def _refill(shared: Shared, cluster: Cluster, key: int) -> None:
    """Have the marker evicted, and the row filled by a reader, which finds the old one."""
    cache = cluster.cache
    assert cache is not None
    name = cache.key_of("cachekills", ids.shard_of(key), (key,))

    def filled() -> bool:
        """Try it; a server that is late on a busy machine is asked again."""
        if cache.run([Request(Op.DELETE, name)])[0].outcome is not Outcome.DONE:
            return False
        with other.reader() as session:
            shown = session.get_one(Account, key).n
        there = cache.run([Request(Op.READ, name)])[0]
        return shown == 0 and there.outcome is Outcome.FOUND and there.kind is Kind.VALUE

    with shared.cluster() as other:
        wait_until(filled, _ENOUGH, "the old row was filled")


def _relay(shared: Shared) -> None:
    with shared.cluster() as cluster, Relay(cluster):
        shared.stop.wait()


def _poll(shared: Shared) -> None:
    """Read the rows whose writers were killed lately, as a client, again and again."""
    with shared.cluster() as cluster:
        while not shared.stop.wait(0.001):
            began = time.monotonic()
            committed = list(shared.committed)
            done = sum(1 for each in committed if each)
            watched = [
                at
                for at in range(min(done + 1, len(committed)))
                if committed[at] == 0 or began < committed[at] + _WATCHED
            ]
            with cluster.reader() as session:
                found = session.get_many(Account, [shared.ids[at] for at in watched])
            for at, account in zip(watched, found, strict=True):
                if committed[at]:
                    shared.seen[1] += 1
                    if account.n == 0:
                        shared.old[at] = began
                        shared.seen[0] += 1
