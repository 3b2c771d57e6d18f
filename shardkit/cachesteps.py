"""The machines of one commit, driven in step: one round trip per server of the cache and step.

What can be done while somebody else works is done then: requests are sent before the session does
what it has to do anyway, and their answers are read after that; what follows COMMIT is computed
while the database commits. Called by `shardkit.cachewrites`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the `cache` extra
    from shardkit.cache import Writer
    from shardkit.caches.backend import Underway
    from shardkit.caching.operations import Request

__all__ = ["CacheSteps"]


class CacheSteps:
    """The writers of one transaction's rows.

    Args:
        cache: of the cluster.

    Attributes:
        keys: names of the entries that have been marked.
    """

    __slots__ = ("_cache", "_foreseen", "_underway", "_writers", "keys")

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._writers: list[Writer] = []
        self._underway: list[tuple[list[int], Underway]] = []
        self._foreseen: tuple[list[Writer], list[int], list[Request]] | None = None
        self.keys: set[str] = set()

    def mark(self, writers: Sequence[Writer]) -> None:
        """Send the first requests of writers that have asked nothing yet."""
        first = len(self._writers)
        self._writers += writers
        self.keys.update([writer.key for writer in writers])
        self._send(*_asking(self._writers, first))

    def drive(self) -> None:
        """Have everything answered: COMMIT may be sent, or the commit be acknowledged."""
        writers = self._writers
        while self._underway:
            while self._underway:
                asking, underway = self._underway.pop()
                for n, answer in zip(asking, underway.answers(), strict=True):
                    writers[n] = writers[n].advance(answer)
            self._send(*_asking(writers))

    def foresee(self, known: Mapping[str, tuple[int, bytes | None]]) -> None:
        """Compute what will be sent if COMMIT succeeds.

        Args:
            known: version and payload of each entry; of others the marker is removed.
        """
        writers = []
        for writer in self._writers:
            found = known.get(writer.key)
            writers.append(
                writer.rolled_back() if found is None else writer.known(*found).committed()
            )
        self._foreseen = (writers, *_asking(writers))

    def committed(self, known: Mapping[str, tuple[int, bytes | None]]) -> None:
        """Send what follows COMMIT."""
        if self._foreseen is None:
            self.foresee(known)
        assert self._foreseen is not None
        self._writers, asking, requests = self._foreseen
        self._send(asking, requests)

    def rolled_back(self) -> None:
        """Send what removes markers; those of writers that were interrupted expire."""
        self.drive()
        self._writers = [writer.rolled_back() for writer in self._writers if writer.is_ready]
        self._send(*_asking(self._writers))

    def _send(self, asking: list[int], requests: list[Request]) -> None:
        if requests:
            self._underway.append((asking, self._cache.start(requests)))


def _asking(writers: Sequence[Writer], first: int = 0) -> tuple[list[int], list[Request]]:
    """Return which machines, from the first on, ask something, and what."""
    asking: list[int] = []
    requests: list[Request] = []
    for n in range(first, len(writers)):
        request = writers[n].request
        if request is not None:
            asking.append(n)
            requests.append(request)
    return asking, requests
