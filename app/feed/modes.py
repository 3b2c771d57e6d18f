"""Whose photos are pushed to followers, and whose are pulled when a feed is read.

Pushing a photo costs time for each follower, and until it ends some have it and some do not. So
authors are pulled whose followers could not be reached within a budget, at the cost per delivery
that this relay measures; with hysteresis, so that nobody goes back and forth. That an author is
pulled is an edge of the service itself, which every reader finds in the cache beside its own; so
readers know of it as soon as it is committed.

An author who has few again is pushed first and pulled no more only when every follower's timeline
has what there was, see `resume`. Called by `app.feed.fanout`.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import select

from app.graph import tao
from app.graph.models import Assoc, Kind
from shardkit import Cluster, ids

__all__ = ["ROOT", "Modes", "begin_pull", "end_pull", "is_pulled"]

ROOT: Final = ids.compose(0, 0, 1)
"""Whose edges say who is pulled: nobody's id, of the first logical shard."""

BUDGET: Final = 0.5
"""Seconds that reaching all followers may take; half of the goal of a second (app.md, 3.3)."""

FIRST_GUESS: Final = 5e-6
"""Seconds of a delivery before one was measured."""

FEWEST, MOST_FOLLOWERS = 1_000, 1_000_000
"""The threshold stays between these, whatever was measured."""

WEIGHT: Final = 0.1
"""Of a measurement against those before it; the more it has delivered, the more it counts."""


class Modes:
    """Decides who is pulled; of one relay process.

    Args:
        fewest: the threshold is never lower.
        most: nor higher.
    """

    def __init__(self, *, fewest: int = FEWEST, most: int = MOST_FOLLOWERS) -> None:
        self._seconds = FIRST_GUESS
        self._fewest, self._most = fewest, most

    @property
    def threshold(self) -> int:
        """Followers above which an author is pulled."""
        return int(min(max(BUDGET / self._seconds, self._fewest), self._most))

    def measured(self, n: int, seconds: float) -> None:
        """Take how long reaching some followers took."""
        if n >= 100:
            self._seconds += WEIGHT * (seconds / n - self._seconds)

    def decide(self, n_followers: int, *, pulled: bool) -> bool:
        """Tell whether an author is to be pulled; one who is stays so down to half of it."""
        return n_followers > (self.threshold // 2 if pulled else self.threshold)


def is_pulled(cluster: Cluster, author_id: int) -> bool:
    """Tell whether an author is pulled, by the primary."""
    with cluster.writer() as session:
        return tao.has(session, ROOT, Kind.PULLED, author_id)


def begin_pull(cluster: Cluster, author_id: int, now: int) -> None:
    """Have an author pulled. What was pushed before stays in timelines; readers drop repeats."""
    with cluster.writer() as session:
        if not tao.has(session, ROOT, Kind.PULLED, author_id):
            session.add(Assoc(id1=ROOT, atype=int(Kind.PULLED), id2=author_id, at=now))
            session.commit()


def end_pull(cluster: Cluster, author_id: int) -> None:
    """Have an author pulled no more; all that there is has to be pushed by now."""
    with cluster.writer() as session:
        edge = session.scalars(
            select(Assoc).where(
                Assoc.id1 == ROOT, Assoc.atype == int(Kind.PULLED), Assoc.id2 == author_id
            )
        ).first()
        if edge is not None:
            session.delete(edge)
            session.commit()
