"""Applies follows on the shard of the person who is followed: the inverse edge and its count.

Handler of the relay, see `app.workers`. An event says what the edge of a pair is, not what to add
to a number: an edge that is there already is left, and the count changes only with a row. Together
with the note of the event in the same transaction, nothing is counted twice or forgotten, wherever
a process is killed.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from app.accounts.models import User
from app.database import TIMEOUT
from app.graph.models import Follower
from shardkit import Cluster, WriteSession, deadline, ids
from shardkit.errors import UnavailableError
from shardkit.outbox import Event

__all__ = ["apply"]


@dataclass(frozen=True, slots=True)
class _Change:
    """What an event says; `since` is None where nobody follows any more."""

    follower_id: int
    followee_id: int
    since: dt.datetime | None

    @classmethod
    def read(cls, event: Event) -> Self:
        payload = event.payload
        since = payload["since"]
        return cls(
            int(payload["follower_id"]),
            int(payload["followee_id"]),
            None if since is None else dt.datetime.fromisoformat(since),
        )


def apply(cluster: Cluster, events: Sequence[Event]) -> None:
    """Apply events, in one transaction for each physical shard that they concern.

    A server that does not answer keeps nothing from the others.

    Args:
        cluster: where the inverse edges are.
        events: those of a pair in order.

    Raises:
        UnavailableError: a server does not answer; what others have was applied (retryable).
    """
    shard_map = cluster.topology.shard_map
    concerned: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        shard = ids.shard_of(_Change.read(event).followee_id)
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
        by_shard[ids.shard_of(change.followee_id)].append((event, change))
    found = []
    for _, pairs in sorted(by_shard.items()):
        near = pairs[0][1].followee_id
        new = {event.id for event in session.once_many((e for e, _ in pairs), near=near)}
        found += [change for event, change in pairs if event.id in new]
    return found


def _write(session: WriteSession, changes: Sequence[_Change]) -> None:
    """Make the inverse edges what the last change of each pair says, and count them."""
    wanted = {(change.followee_id, change.follower_id): change for change in changes}
    people: dict[int, User | None] = {}
    for followee_id in sorted({pair[0] for pair in wanted}):  # one order: relays do not deadlock
        people[followee_id] = session.get(User, followee_id, with_for_update=True)
    edges = session.get_many(
        Follower, list(wanted)
    )  # read after the locks: nobody else changes them
    for (pair, change), edge in zip(wanted.items(), edges, strict=True):
        user = people[pair[0]]
        if change.since is None and edge is not None:
            session.delete(edge)
            if user is not None:
                user.follower_count -= 1
        elif change.since is not None and edge is None and user is not None:
            session.add(Follower(followee_id=pair[0], follower_id=pair[1], created_at=change.since))
            user.follower_count += 1
