"""Applies edges on the shard of the person they lead to: inverse edges, counts, what a block ends.

Handler of the relay, see `app.workers`. An event says what an edge is, not what to add to a
number: an edge that is there already is left, and the count changes only with a row. Together
with the note of the event in the same transaction, nothing is counted twice or forgotten, wherever
a process is killed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from app.accounts.models import User
from app.database import TIMEOUT
from app.graph import tao
from app.graph.models import INVERSE, Assoc, Kind
from shardkit import Cluster, WriteSession, deadline, ids
from shardkit.errors import UnavailableError
from shardkit.outbox import Event

__all__ = ["apply"]

ENDED_BY_BLOCK = (Kind.FOLLOWS, Kind.REQUESTED)
"""Edges from who is blocked to who blocks that a block removes."""


@dataclass(frozen=True, slots=True)
class _Change:
    """What an event says; `at` is None where there is no such edge any more."""

    id1: int
    kind: Kind
    id2: int
    at: int | None

    @classmethod
    def read(cls, event: Event) -> Self:
        payload = event.payload
        return cls(int(payload["id1"]), Kind(payload["kind"]), int(payload["id2"]), payload["at"])

    @property
    def edges(self) -> list[tuple[int, int, int]]:
        """Primary keys of the edges at the other end that this decides about."""
        if self.kind is Kind.BLOCKS:
            return [(self.id2, int(kind), self.id1) for kind in ENDED_BY_BLOCK]
        return [(self.id2, int(INVERSE[self.kind]), self.id1)]


def apply(cluster: Cluster, events: Sequence[Event]) -> None:
    """Apply events, in one transaction for each physical shard that they concern.

    A server that does not answer keeps nothing from the others.

    Args:
        cluster: where the inverse edges are.
        events: those of an edge in order.

    Raises:
        UnavailableError: a server does not answer; what others have was applied (retryable).
    """
    shard_map = cluster.topology.shard_map
    concerned: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        shard = ids.shard_of(_Change.read(event).id2)
        concerned[shard_map.owner(shard)].append(event)
    failed: UnavailableError | None = None
    for some in concerned.values():
        try:
            with deadline(TIMEOUT), cluster.writer() as session:
                if changes := _not_applied(session, some):
                    _write(session, changes)
                    session.commit()
        except UnavailableError as error:
            failed = error
    if failed is not None:
        raise failed


def _not_applied(session: WriteSession, events: Sequence[Event]) -> list[_Change]:
    """Note events, logical shard by logical shard; return what those say that are new."""
    by_shard: dict[int, list[tuple[Event, _Change]]] = defaultdict(list)
    for event in events:
        change = _Change.read(event)
        by_shard[ids.shard_of(change.id2)].append((event, change))
    found = []
    for _, pairs in sorted(by_shard.items()):
        near = pairs[0][1].id2
        new = {event.id for event in session.once_many((e for e, _ in pairs), near=near)}
        found += [change for event, change in pairs if event.id in new]
    return found


def _write(session: WriteSession, changes: Sequence[_Change]) -> None:
    """Make the edges what the last change of each says, and count them."""
    people: dict[int, User | None] = {}
    for id2 in sorted({change.id2 for change in changes}):  # one order: relays do not deadlock
        people[id2] = session.get(User, id2, with_for_update=True)
    last = {(change.id2, change.kind, change.id1): change for change in changes}
    keys = [key for change in last.values() for key in change.edges]
    # Read after the locks: nobody else changes them.
    found = session.get_many(Assoc, keys)
    held = {key: edge for key, edge in zip(keys, found, strict=True) if edge is not None}
    for change in last.values():
        user = people[change.id2]
        if user is not None:
            _settle(session, user, change, held)


def _settle(
    session: WriteSession,
    user: User,
    change: _Change,
    held: dict[tuple[int, int, int], Assoc],
) -> None:
    edges = [(key, held.get(key)) for key in change.edges]
    if change.kind is Kind.BLOCKS:
        for key, edge in edges:  # what came after the block is of a later time, and stays
            if edge is not None and change.at is not None and edge.at <= change.at:
                tao.assoc_delete(session, user, Kind(key[1]), change.id1)
        return
    ((key, edge),) = edges
    if change.at is None:
        tao.assoc_delete(session, user, Kind(key[1]), change.id1)
    elif edge is None:
        tao.assoc_new(session, user, Kind(key[1]), change.id1, change.at)
    else:
        edge.at = change.at
