"""The relay's part of unique values: releases what a writer did not live to release.

A transaction that gives a value up says so in the outbox, if its column is `relayed`
(`shardkit.claims`). Mostly the writer has released it by the time that the event is delivered, and
one look finds that; else the pair of a row that has the value no more is removed here, by the same
steps. Source: docs/lookup.md.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

from shardkit.connections import AsyncConnections, Connections
from shardkit.lookup import Task
from shardkit.reserving import release
from shardkit.uniques import Value, was_given_up

__all__ = ["RELEASE_BATCH", "Releases"]

RELEASE_BATCH: Final = 100
"""Events that are looked at together."""


class Releases:
    """Handles the events of values that were given up. Thread-safe.

    Args:
        connections: of the relay's cluster.
    """

    def __init__(self, connections: Connections | AsyncConnections) -> None:
        self._given = connections
        self._lock = threading.Lock()
        self._own: Connections | None = None

    def __call__(self, events: Sequence[Any]) -> None:
        """Release what events name.

        Raises:
            ValueBusyError: a transaction that wants a value does not end (retryable).
            UnavailableError: a server does not answer (retryable).
        """
        wanted: dict[Value, frozenset[int]] = {}
        for event in events:
            for value, row_ids in was_given_up(event.payload).items():
                wanted[value] = wanted.get(value, frozenset()) | row_ids
        lookups = self._connections().lookups
        found = lookups.read(wanted)
        lookups.run(
            [
                Task(value, release(row_ids))
                for value, row_ids in wanted.items()
                if any(pair.id in row_ids for pair in found[value])
            ]
        )

    def close(self) -> None:
        """Close connections of its own; later events open new ones."""
        with self._lock:
            own, self._own = self._own, None
        if own is not None:
            own.close()

    def _connections(self) -> Connections:
        """Return connections that work in a thread; those of an asyncio cluster do not."""
        if isinstance(self._given, Connections):
            return self._given
        with self._lock:
            if self._own is None:
                self._own = Connections(self._given.topology)
            return self._own
