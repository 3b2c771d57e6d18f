"""What the processes of a run have to know, as one file of JSON that each of them reads."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from shardkit import Cluster, WriteSession
from shardkit.config import CacheConfig, PoolConfig, load
from shardkit.events import CacheRead, Event
from shardkit.testing import reroute
from shardkit.topology import Endpoint, Topology

__all__ = ["KINDS", "LISTS", "NotedCluster", "Plan", "draw_of"]

KINDS: Final = ("append", "register", "set", "bank", "name", "page", "note", "emit")
"""What clients do, each kind for a judge of its own."""

LISTS: Final = 3
"""Lists and sets of a logical shard at one time; a while later there are others."""


class NotedCluster(Cluster):
    """A cluster that remembers of each thread its last writer, and whether a cache has answered."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._mine = threading.local()
        self.listen(self._note)

    def writer(self, *, atomic: bool = False) -> WriteSession:
        """Return a writer, and remember it: `run` makes its sessions here."""
        session = self._mine.session = super().writer(atomic=atomic)
        return session

    def last_token(self) -> str:
        """Return the token of this thread's last writer."""
        return str(self._mine.session.token)

    def _note(self, event: Event) -> None:
        if isinstance(event, CacheRead):
            self._mine.hits = event.hits

    def forget_hits(self) -> None:
        """Begin to watch for an answer of the cache."""
        self._mine.hits = 0

    def had_hits(self) -> bool:
        """Tell whether the cache has answered this thread since."""
        return bool(self._mine.hits)


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run.

    Attributes:
        config: `shardkit.toml` of the cluster.
        folder: of the histories.
        seed: chance in every process is drawn from it.
        seconds: that clients work.
        logical_shards: their number.
        threads: clients of each process.
        kinds: what clients do.
        cache: `memcached` or `redis`, for all of them.
        deadline: seconds of each operation.
        think: seconds a client pauses between two operations, at most.
        hold: seconds that a transaction which adds to a set stays open, at most.
        is_named: whether what writes has a name, by which it is run again after a lost answer.
        every: seconds after which lists and sets are new ones.
        map_age: see `Cluster`.
        ports: by real port, where the processes behind faulty links connect instead.
        bug: what is left out; see `tests.history.bugs`.
        began: monotonic time of the run, in seconds.
    """

    config: str
    folder: str
    seed: int = 0
    seconds: float = 30.0
    logical_shards: int = 4
    threads: int = 4
    kinds: tuple[str, ...] = KINDS
    cache: str = "memcached"
    deadline: float = 30.0
    think: float = 0.02
    hold: float = 0.0
    is_named: bool = True
    every: float = 5.0
    map_age: float = 1.0
    ports: Mapping[str, int] = field(default_factory=dict)
    bug: str = ""
    began: float = 0.0

    @property
    def path(self) -> Path:
        """Where it is written."""
        return Path(self.folder) / "plan.json"

    @property
    def n_lists(self) -> int:
        """Lists that a logical shard needs for the whole run, and then some."""
        return LISTS * (int(self.seconds / self.every) + 20)

    def lists_at(self, now: float) -> range:
        """Return the numbers of the lists and sets that are used at a time."""
        epoch = min(int((now - self.began) / self.every), self.n_lists // LISTS - 1)
        return range(epoch * LISTS, (epoch + 1) * LISTS)

    def write(self) -> None:
        """Leave it for the other processes."""
        self.path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: str) -> Self:
        """Return what was left."""
        values: dict[str, Any] = json.loads(Path(path).read_text())
        return cls(**{**values, "kinds": tuple(values["kinds"])})

    def cluster(self, *, is_linked: bool = False) -> NotedCluster:
        """Open the cluster.

        Args:
            is_linked: whether by way of the links that break.
        """
        config, topology = load(self.config)
        ports = self.ports if is_linked else {}
        node = config.services[self.cache]
        for real, port in ports.items():
            node = node.replace(f":{real}", f":{port}")
        return NotedCluster(
            _linked(topology, ports),
            pool=PoolConfig(size=self.threads, overflow=self.threads, timeout=10.0),
            cache=CacheConfig(backend=self.cache, nodes=(node,), timeout=0.05),  # type: ignore[arg-type]  # one of them
            map_age=self.map_age,
            failover_wait=self.deadline,
        )


def _linked(topology: Topology, ports: Mapping[str, int]) -> Topology:
    endpoints: list[Endpoint] = [
        endpoint
        for shard in topology.physical.values()
        for endpoint in (shard.primary, *shard.replicas)
        if str(endpoint.url.port) in ports
    ]
    return reroute(topology, {e: _Address("127.0.0.1", ports[str(e.url.port)]) for e in endpoints})


def draw_of(plan: Plan, name: str) -> random.Random:
    """Return the chance of one process or thread."""
    return random.Random(f"{plan.seed} {name}")
