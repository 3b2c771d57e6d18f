"""Typed associations between people: one table, each edge beside the person it is read for.

After TAO's associations (Bronson et al., "TAO: Facebook's Distributed Data Store for the Social
Graph", USENIX ATC 2013): `(id1, atype, id2, time)`, on the logical shard of `id1`, so that every
read goes to one. Objects are rows of ordinary classes. A kind with an inverse has its truth at
`id1` of the forward edge; the relay writes the other one (`app.graph.inverse`). Written by
`app.graph.tao` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final

from sqlalchemy import Index, SmallInteger, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base
from shardkit import CachedCount, CachedList, Sharded

__all__ = [
    "ASSOC_CHANGED",
    "COUNTED",
    "INVERSE",
    "Assoc",
    "Kind",
    "count_of",
    "edges_of",
    "key_of",
    "told",
]

ASSOC_CHANGED = "assoc.changed"
"""Topic of the events that say whether an edge is there, in the order of each edge."""

LONGEST: Final = 2000
"""Edges of a list that are cached; whoever has more is read from the database beyond that."""


class Kind(IntEnum):
    """What an edge says of `id1`."""

    FOLLOWS = 1
    FOLLOWED_BY = 2
    REQUESTED = 3
    """Has asked to follow, and waits for an answer."""
    REQUESTED_BY = 4
    BLOCKS = 5
    PULLED = 6
    """Of the service itself, not of a person: see `app.feed.modes`."""


INVERSE: Final[Mapping[Kind, Kind]] = {
    Kind.FOLLOWS: Kind.FOLLOWED_BY,
    Kind.REQUESTED: Kind.REQUESTED_BY,
}
"""Kinds whose other side is kept as well. Who blocks somebody is read at the blocker only."""

COUNTED: Final[Mapping[Kind, str]] = {
    Kind.FOLLOWS: "following_count",
    Kind.FOLLOWED_BY: "follower_count",
}
"""Kinds that a person's row counts, and the column."""


def told(id1: int, kind: Kind, id2: int, at: int | None, *, is_news: bool = True) -> dict[str, Any]:
    """Return the payload that says whether an edge is there; `at` is None when it is not."""
    payload = {"id1": str(id1), "kind": int(kind), "id2": str(id2), "at": at}
    return payload if is_news else payload | {"is_news": False}


def key_of(id1: int, kind: Kind, id2: int) -> str:
    """Return the key of an edge, whose events keep their order."""
    return f"{id1}:{int(kind)}:{id2}"


class Assoc(Sharded, Base):
    """An edge. Rows are cached, also that there is none: most questions have the answer no.

    Attributes:
        id1: whose edge.
        atype: a `Kind`.
        id2: to whom.
        at: since when; Unix milliseconds.
    """

    __tablename__ = "assocs"
    __shard_key__ = "id1"
    __cache_ttl__ = 300.0
    __table_args__ = (
        Index("assocs_newest_idx", "id1", "atype", text("at DESC"), text("id2 DESC")),
        Index("assocs_id2_idx", "id2"),
    )

    id1: Mapped[int] = mapped_column(primary_key=True)
    atype: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    id2: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[int]


edges_of = CachedList(
    Assoc.id1,
    Assoc.atype,
    order_by=(Assoc.at.desc(), Assoc.id2.desc()),
    of=(Assoc.at, Assoc.id2),
    limit=LONGEST,
)
"""The newest edges of a kind of somebody: pairs of time and id, newest first."""

count_of = CachedCount(Assoc.id1, Assoc.atype)
"""How many edges of a kind somebody has."""
