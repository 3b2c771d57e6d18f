"""Looks up and assigns the logical shards of directory keys.

The entry of a key lies on the logical shard that the key's hash names, in the table
`shardkit_directory`, and never changes. So what any server says of a key holds, and is cached;
that a key has no entry is believed of the primary only, and never cached. Routing itself stays
pure: `decided` runs it, and runs it again with the entries it lacked. Called by sessions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import UnavailableError
from shardkit.keys import canonical
from shardkit.placement import Placement
from shardkit.router import Entry, Router, UnknownEntriesError
from shardkit.strategies import Directory, hash_shard
from shardkit.topology import schema_name

__all__ = ["Directories", "Servers"]

T = TypeVar("T")

CACHE_SIZE: Final = 100_000
"""Entries kept; the oldest go first."""

CACHE_TTL: Final = 300.0
"""Seconds an entry is kept. Entries never change; this bounds what a repair by hand takes."""

# AccessShareLock; one branch a logical shard.
_READ = (
    "SELECT key, shard FROM {0}.shardkit_directory WHERE directory = %(d)s AND key = ANY(%({1})s)"
)

# RowExclusiveLock, and one row at a time in the order of the keys, so that two writers of the
# same keys wait for each other and never both ways round.
_ASSIGN = """
INSERT INTO {0}.shardkit_directory (directory, key, shard)
SELECT %(d)s, k, s FROM unnest(%(keys)s::bytea[], %(shards)s::integer[]) AS t (k, s) ORDER BY k
ON CONFLICT DO NOTHING
"""


class Servers(Protocol):
    """What a directory needs of the cluster."""

    def group(self, logical_shards: Sequence[int], /) -> Mapping[str, tuple[int, ...]]:
        """Return logical shards by physical shard."""

    def ask(
        self, physical: str, query: str, parameters: Mapping[str, Any], *, primary: bool
    ) -> Sequence[Sequence[Any]]:
        """Run one statement by itself on a physical shard and return its rows."""


class Directories:
    """The directories of one cluster, with their cache.

    Args:
        servers: the cluster.
        placement: chooses the logical shard of a new key.
        size: entries cached.
        ttl: seconds an entry is cached.
        clock: where the time comes from.
    """

    def __init__(
        self,
        servers: Servers,
        placement: Placement,
        *,
        size: int = CACHE_SIZE,
        ttl: float = CACHE_TTL,
        clock: Clock = SYSTEM,
    ) -> None:
        self._servers = servers
        self._placement = placement
        self._size = size
        self._ttl = ttl
        self._clock = clock
        self._cache: dict[Entry, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def decided(self, router: Router, decide: Callable[[Router], T], *, assign: bool = False) -> T:
        """Return what `decide` answers, having looked up the directory keys it needs.

        Args:
            router: of the cluster, without entries.
            decide: pure, as it may be asked several times.
            assign: whether keys without an entry get one.

        Raises:
            UnavailableError: a key's entry cannot be read (retryable).
        """
        known: dict[Entry, int] = {}
        while True:
            try:
                return decide(router)
            except UnknownEntriesError as unknown:
                known |= self._found(unknown.entries, router.total, assign=assign)
                router = Router(router.total, known, router.values)

    def _found(self, entries: Iterable[Entry], total: int, *, assign: bool) -> dict[Entry, int]:
        """Return a logical shard for every key; without an entry, the one that would hold it."""
        entries = list(entries)
        now = self._clock.monotonic()
        found = {
            entry: hit[0]
            for entry in entries
            if (hit := self._cache.get(entry)) is not None and hit[1] > now
        }
        by_directory: dict[Directory, dict[bytes, Entry]] = {}
        for entry in entries:
            if entry not in found:
                by_directory.setdefault(entry[0], {})[canonical(entry[1])] = entry
        for directory, keys in by_directory.items():
            read: dict[bytes, int] = {}
            for primary in (False, True):
                missing = [key for key in keys if key not in read]
                if missing:
                    read |= self._read(directory, missing, total, primary=primary)
            if assign and (missing := [key for key in keys if key not in read]):
                read |= self._assigned(directory, missing, total)
            self._keep({keys[key]: shard for key, shard in read.items()})
            found |= {entry: read.get(k, hash_shard(k, total)) for k, entry in keys.items()}
        return found

    def _read(
        self, directory: Directory, keys: Iterable[bytes], total: int, *, primary: bool
    ) -> dict[bytes, int]:
        by_home = _by_home(keys, total)
        read: dict[bytes, int] = {}
        for physical, homes in self._servers.group(sorted(by_home)).items():
            query = " UNION ALL ".join(_READ.format(schema_name(h), f"k{h}") for h in homes)
            parameters = {"d": directory.directory, **{f"k{h}": by_home[h] for h in homes}}
            try:
                rows = self._servers.ask(physical, query, parameters, primary=primary)
            except UnavailableError:
                if primary:
                    raise
                continue
            read.update((bytes(key), shard) for key, shard in rows)
        return read

    def _assigned(self, directory: Directory, keys: list[bytes], total: int) -> dict[bytes, int]:
        # Chosen before a connection is taken: measuring loads takes one as well.
        chosen = {key: self._placement(total) for key in keys}
        by_home = _by_home(keys, total)
        for physical, homes in self._servers.group(sorted(by_home)).items():
            for home in homes:
                mine = by_home[home]
                shards = [chosen[key] for key in mine]
                parameters = {"d": directory.directory, "keys": mine, "shards": shards}
                query = _ASSIGN.format(schema_name(home))
                self._servers.ask(physical, query, parameters, primary=True)
        # Whoever came first has decided.
        return self._read(directory, keys, total, primary=True)

    def _keep(self, entries: Mapping[Entry, int]) -> None:
        expires = self._clock.monotonic() + self._ttl
        with self._lock:
            for entry, shard in entries.items():
                self._cache.pop(entry, None)
                self._cache[entry] = (shard, expires)
            while len(self._cache) > self._size:
                del self._cache[next(iter(self._cache))]


def _by_home(keys: Iterable[bytes], total: int) -> dict[int, list[bytes]]:
    """Return keys by the logical shard that holds their entries."""
    homes: dict[int, list[bytes]] = {}
    for key in keys:
        homes.setdefault(hash_shard(key, total), []).append(key)
    return homes
