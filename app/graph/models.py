"""The two sides of a follow, each beside the person it is read for, and what tells one the other.

A flush that adds or deletes a forward edge emits an event in the same transaction; the relay has
`app.graph.inverse` apply it on the other person's shard.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base
from shardkit import CachedCount, Sharded, after_delete, after_insert

__all__ = [
    "FOLLOW_CHANGED",
    "Follow",
    "Follower",
    "followers_of",
    "following_of",
    "key_of",
    "told",
]

FOLLOW_CHANGED = "follow.changed"
"""Topic of the events that say whether somebody follows somebody, in the order of each pair."""


def told(follower_id: int, followee_id: int, since: dt.datetime | None) -> dict[str, Any]:
    """Return the payload that says whether an edge is there; `since` is None when it is not."""
    return {
        "follower_id": str(follower_id),
        "followee_id": str(followee_id),
        "since": None if since is None else since.isoformat(),
    }


def key_of(follower_id: int, followee_id: int) -> str:
    """Return the key of a pair, whose events keep their order."""
    return f"{follower_id}:{followee_id}"


class Follow(Sharded, Base):
    """Whom a person follows: the forward edge, on the follower's shard; this one is the truth."""

    __tablename__ = "follows"
    __shard_key__ = "follower_id"
    __events__ = (
        after_insert(
            FOLLOW_CHANGED,
            lambda edge: told(edge.follower_id, edge.followee_id, edge.created_at),
            key=lambda edge: key_of(edge.follower_id, edge.followee_id),
        ),
        after_delete(
            FOLLOW_CHANGED,
            lambda edge: told(edge.follower_id, edge.followee_id, None),
            key=lambda edge: key_of(edge.follower_id, edge.followee_id),
        ),
    )

    follower_id: Mapped[int] = mapped_column(primary_key=True)
    followee_id: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[dt.datetime]


class Follower(Sharded, Base):
    """Who follows a person: the inverse edge, on the followee's shard; written by the relay."""

    __tablename__ = "followers"
    __shard_key__ = "followee_id"

    followee_id: Mapped[int] = mapped_column(primary_key=True)
    follower_id: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[dt.datetime]


followers_of = CachedCount(Follower.followee_id)
"""How many follow a person."""

following_of = CachedCount(Follow.follower_id)
"""How many a person follows."""
