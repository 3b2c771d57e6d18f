"""The relay's part of the cache: removes what is older than what was committed, everywhere.

Triggers write down in the outbox which cached rows a transaction has changed
(`shardkit.ops.cachetriggers`). A relay repairs each, on its server and in the gutter, until the
server has answered: that is what is left of the protocol when the writer dies between COMMIT and
its last step, and all of it for what psql has changed. Source: docs/cache.md, "Protocol".
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from shardkit.cacheable import identity_of
from shardkit.errors import UnavailableError
from shardkit.sections import CacheConfig

if TYPE_CHECKING:  # the `cache` extra
    from shardkit.caches.backend import Backend, Place
    from shardkit.rowcache import RowCache

__all__ = ["REPAIR_BATCH", "REPAIR_PAUSE", "CacheRepairs", "repair_pause"]

REPAIR_BATCH: Final = 100
"""Events that are repaired together."""

REPAIR_PAUSE: Final = 0.5
"""Most seconds until what a server did not answer is repaired again."""

_FIRST_PAUSE: Final = 0.05
"""After the first time: more often than not it was slow for once."""

_KEYS_AT_ONCE: Final = 500

_LOG: Final = logging.getLogger("shardkit.relay")


def repair_pause(attempts: int) -> float:
    """Return how many seconds to wait before a repair that has failed so often is tried again."""
    return min(REPAIR_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempts, 10))


class CacheRepairs:
    """Handles the events of changed rows. Thread-safe.

    Args:
        config: `[cache]`.
        source: the cluster's connections, of which it needs the topology.
    """

    def __init__(self, config: CacheConfig, source: Any) -> None:
        self._config = config
        self._source = source
        self._lock = threading.Lock()
        self._opened: tuple[RowCache, Backend] | None = None

    def __call__(self, events: Sequence[Any]) -> None:
        """Repair what events name.

        Raises:
            UnavailableError: a server did not answer (retryable).
        """
        if not self._config.is_on:
            return
        from shardkit.caches.backend import Place  # noqa: PLC0415 - the `cache` extra

        names, servers = self._open()
        wanted: dict[str, int] = {}
        for event in events:
            table, tags = event.payload["table"], event.payload["tags"]
            for values, version in event.payload["rows"]:
                key = names.key_of(table, event.logical_shard, identity_of(tags, values))
                wanted[key] = max(version, wanted.get(key, 0))
        keys = list(wanted)
        places = (Place.HOME, Place.GUTTER) if servers.has_gutter else (Place.HOME,)
        missed = 0
        for place in places:
            for at in range(0, len(keys), _KEYS_AT_ONCE):
                some = {key: wanted[key] for key in keys[at : at + _KEYS_AT_ONCE]}
                missed += _repaired(servers, some, place)
        for name in servers.must_flush:
            if servers.flush(name):
                _LOG.warning("cache server %s was emptied: it had missed too much", name)
        if missed:
            raise UnavailableError(
                f"the cache did not answer for {missed} keys", hint="they are repaired later"
            )

    def close(self) -> None:
        """Close its connections; later events open new ones."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened[0].close()
            opened[1].close()

    def _open(self) -> tuple[RowCache, Backend]:
        from shardkit.caches.opening import backend  # noqa: PLC0415 - the `cache` extra
        from shardkit.caches.serving import RELAY_OPTIONS  # noqa: PLC0415
        from shardkit.rowcache import RowCache  # noqa: PLC0415

        with self._lock:
            if self._opened is None:
                servers = backend(self._config, **RELAY_OPTIONS)
                self._opened = RowCache(self._config, self._source), servers
            return self._opened


def _repaired(servers: Backend, wanted: dict[str, int], place: Place) -> int:
    """Repair keys in one place; return for how many nobody answered."""
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
    return sum(not machine.is_clean for machine in machines)
