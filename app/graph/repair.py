"""Finds edges that are there on one side only, and has the relay mend them.

The forward edge is the truth. A pair whose two sides differ is said once more: under the lock that
every follow takes, an event is emitted that says what the forward edge is. It comes behind all that
is still under way for the pair, and the relay makes the inverse edge and its count what it says.
So repair and traffic cannot cross, and a repair that is killed has said less, never a wrong thing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import select

from app.accounts.models import User
from app.graph.models import FOLLOW_CHANGED, Follow, Follower, key_of, told
from app.scan import pages
from shardkit import Cluster, WriteSession

__all__ = ["EXTRA", "MISSING", "compare"]

MISSING: Final = "followers.missing"
EXTRA: Final = "followers.extra"
"""What is found, by name: inverse edges that lack, and inverse edges of nobody who follows."""

Pair = tuple[int, int]
"""Ids of the follower and of who is followed."""


def compare(cluster: Cluster, shard: int, *, n: int, dry_run: bool) -> Counter[str]:
    """Compare the edges of a logical shard with their other sides; return how many differ.

    Both are counted that the relay has not got to yet: for a moment after a follow it lacks its
    other side.

    Args:
        cluster: whose.
        shard: the logical shard, whose forward and whose inverse edges are read.
        n: edges compared at once; each page takes a statement here and one for each server.
        dry_run: only say how many.

    Raises:
        EndpointUnavailableError: a primary does not answer (retryable).
        GatherError: primaries of the other sides do not (retryable).
    """
    found: Counter[str] = Counter()
    forward: Any = select(Follow.follower_id, Follow.followee_id)
    for rows in pages(cluster, shard, forward, [Follow.follower_id, Follow.followee_id], n):
        with cluster.writer() as session:
            there = session.get_many(Follower, [(row[1], row[0]) for row in rows])
        lacking = [(row[0], row[1]) for row, edge in zip(rows, there, strict=True) if edge is None]
        found[MISSING] += _say_again(cluster, lacking, present=True, dry_run=dry_run)
    inverse: Any = select(Follower.followee_id, Follower.follower_id)
    for rows in pages(cluster, shard, inverse, [Follower.followee_id, Follower.follower_id], n):
        with cluster.writer() as session:
            held = session.get_many(Follow, [(row[1], row[0]) for row in rows])
        extra = [(row[1], row[0]) for row, edge in zip(rows, held, strict=True) if edge is None]
        found[EXTRA] += _say_again(cluster, extra, present=False, dry_run=dry_run)
    return found


def _say_again(cluster: Cluster, pairs: Sequence[Pair], *, present: bool, dry_run: bool) -> int:
    """Emit what the forward edges of pairs are now; return how many were as they seemed."""
    by_follower: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_follower[pair[0]].append(pair)
    n = 0
    for follower_id, some in sorted(by_follower.items()):
        with cluster.writer() as session:
            session.get(User, follower_id, with_for_update=True)
            edges = session.get_many(Follow, some)
            for pair, edge in zip(some, edges, strict=True):
                n += (edge is not None) is present
                if not dry_run:
                    _emit(session, pair, edge)
            if not dry_run:
                session.commit()
    return n


def _emit(session: WriteSession, pair: Pair, edge: Follow | None) -> None:
    session.emit(
        FOLLOW_CHANGED,
        told(*pair, None if edge is None else edge.created_at),
        key=key_of(*pair),
        near=pair[0],
    )
