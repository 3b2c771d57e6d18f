"""The relay's part of the cache: removes what is older than what was committed, everywhere.

Triggers write down in the outbox which cached rows a transaction has changed
(`shardkit.ops.cachetriggers`). A relay repairs each, on its server and in the gutter, until the
server has answered: that is what is left of the protocol when the writer dies between COMMIT and
its last step, and all of it for what psql has changed. Every server has a lane, a thread of its
own: one that is slow, or gone, keeps nobody else's keys waiting. Source: docs/cache.md, "Protocol".
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from shardkit.cacheable import identity_of
from shardkit.clock import SYSTEM, Clock
from shardkit.emitting import EPOCH_SHIFT
from shardkit.lanes import Lane
from shardkit.sections import CacheConfig

if TYPE_CHECKING:  # the `cache` extra
    from shardkit.caches.backend import Backend, Place
    from shardkit.rowcache import RowCache

__all__ = ["PATIENCE", "REPAIR_BATCH", "REPAIR_PAUSE", "CacheRepairs", "repair_pause"]

REPAIR_BATCH: Final = 500
"""Events that are repaired together."""

REPAIR_PAUSE: Final = 0.5
"""Most seconds until what a server did not answer is repaired again."""

_FIRST_PAUSE: Final = 0.05
"""After the first time: more often than not it was slow for once."""

PATIENCE: Final = 0.05
"""Seconds to wait for all lanes of a call: what takes longer goes on by itself, and is asked for
again with its event."""

_LOG: Final = logging.getLogger("shardkit.relay")


def repair_pause(attempts: int, chance: float) -> float:
    """Return how many seconds to wait before a repair that has failed is tried again.

    Half is chance, as in `shardkit.outbox.Backoff`: relays shall not come together.

    Args:
        attempts: how often it had failed before.
        chance: from 0 to 1.
    """
    return min(REPAIR_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempts, 10)) * (1 + chance) / 2


class CacheRepairs:
    """Handles the events of changed rows. Thread-safe.

    Args:
        config: `[cache]`.
        source: the cluster's connections, of which it needs the topology.
        clock: source of monotonic time.

    Attributes:
        patience: seconds a call may take; more where nobody calls again.
    """

    def __init__(self, config: CacheConfig, source: Any, *, clock: Clock = SYSTEM) -> None:
        self._config = config
        self._source = source
        self._clock = clock
        self.patience = PATIENCE
        self._lock = threading.Lock()
        self._opened: tuple[RowCache, Backend] | None = None
        self._lanes: dict[tuple[str, Place], Lane] = {}

    def __call__(self, events: Sequence[Any]) -> list[Any]:
        """Repair what events name, for a moment; return those to be given to it again.

        Of these a server has not answered yet.
        """
        if not self._config.is_on:
            return []
        names, servers = self._open()
        keys_of: list[list[tuple[str, int]]] = []
        wanted: dict[str, int] = {}
        for event in events:
            table, tags = event.payload["table"], event.payload["tags"]
            # Its id is its place, negated, which begins with the epoch it was written at: an entry
            # of a later one was made of rows that have the change already.
            epoch = (-event.id >> EPOCH_SHIFT) or None if event.id < 0 else None
            changed = [
                (
                    names.key_of(
                        table, event.logical_shard, identity_of(tags, values), epoch=epoch
                    ),
                    version,
                )
                for values, version in event.payload["rows"]
            ]
            keys_of.append(changed)
            for key, version in changed:
                wanted[key] = max(version, wanted.get(key, 0))
        owed = self._repair(servers, wanted)
        return [
            event
            for event, keys in zip(events, keys_of, strict=True)
            if any(key in owed for key, _ in keys)
        ]

    def _repair(self, servers: Backend, wanted: Mapping[str, int]) -> set[str]:
        """Repair keys; return those that are not repaired yet."""
        from shardkit.caches.backend import Place  # noqa: PLC0415 - the `cache` extra

        asked: dict[Lane, dict[str, int]] = defaultdict(dict)
        for key, version in wanted.items():
            asked[self._lane(servers, servers.home(key), Place.HOME)][key] = version
        if servers.has_gutter:
            asked[self._lane(servers, "", Place.GUTTER)] = dict(wanted)
        for lane, keys in asked.items():
            lane.ask(keys)
        for name in servers.must_flush:
            self._lane(servers, name, Place.HOME).ask({})
        until = self._clock.monotonic() + self.patience
        owed: set[str] = set()
        for lane, keys in asked.items():
            owed |= lane.owed(keys, until)
        for lane, keys in asked.items():
            lane.forget({key: version for key, version in keys.items() if key not in owed})
        return owed

    def close(self) -> None:
        """Close its connections, after what is under way; later events open new ones."""
        with self._lock:
            opened, self._opened = self._opened, None
            lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            lane.close()
        if opened is not None:
            opened[0].close()
            opened[1].close()

    def _lane(self, servers: Backend, name: str, place: Place) -> Lane:
        with self._lock:
            lane = self._lanes.get((name, place))
            if lane is None:
                work: Callable[[Mapping[str, int]], set[str]]
                work = partial(_repaired_there, servers, name, place)
                lane = self._lanes[name, place] = Lane(work, clock=self._clock)
            return lane

    def _open(self) -> tuple[RowCache, Backend]:
        from shardkit.caches.opening import backend  # noqa: PLC0415 - the `cache` extra
        from shardkit.caches.serving import RELAY_OPTIONS  # noqa: PLC0415
        from shardkit.rowcache import RowCache  # noqa: PLC0415

        with self._lock:
            if self._opened is None:
                servers = backend(self._config, **RELAY_OPTIONS)
                self._opened = RowCache(self._config, self._source), servers
            return self._opened


def _repaired_there(
    servers: Backend, name: str, place: Place, wanted: Mapping[str, int]
) -> set[str]:
    """Repair keys of one server; return those for which it answered."""
    if name in servers.must_flush and servers.flush(name):
        _LOG.warning("cache server %s was emptied: it had missed too much", name)
    done = _repaired(servers, wanted, place)
    if len(done) < len(wanted):  # for once, perhaps; nothing is sent while it is left alone
        again = {key: version for key, version in wanted.items() if key not in done}
        done |= _repaired(servers, again, place)
    return done


def _repaired(servers: Backend, wanted: Mapping[str, int], place: Place) -> set[str]:
    """Repair keys in one place; return those for which somebody answered."""
    from shardkit.cache import Repair  # noqa: PLC0415 - the `cache` extra

    machines = [Repair(key, version) for key, version in wanted.items()]
    while asking := [
        (n, request)
        for n, machine in enumerate(machines)
        if (request := machine.request) is not None
    ]:
        answers = servers.run([request for _, request in asking], place=place)
        for (n, _), answer in zip(asking, answers, strict=True):
            machines[n] = machines[n].advance(answer)
    return {machine.key for machine in machines if machine.is_clean}
