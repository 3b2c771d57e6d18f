"""What two people are to each other, as a profile shows it, and how many follow."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import and_, select

from app.accounts.models import User
from app.graph import tao
from app.graph.models import Assoc, Kind
from shardkit import ReadSession

__all__ = ["NOBODY", "Ties", "followers_with", "ties_of"]


@dataclass(frozen=True, slots=True)
class Ties:
    """What a viewer and a person are to each other.

    Attributes:
        follows: the viewer follows the person.
        requested: the viewer has asked to.
        is_counted: the viewer is among the person's followers as their shard knows them.
        blocks: the viewer blocks the person.
        is_blocked: the person blocks the viewer.
    """

    follows: bool = False
    requested: bool = False
    is_counted: bool = False
    blocks: bool = False
    is_blocked: bool = False


NOBODY = Ties()
"""Of a stranger, or oneself."""


def ties_of(session: ReadSession, viewer_id: int, user_id: int) -> Ties:
    """Return what a viewer and another person are to each other."""
    pairs = [(viewer_id, user_id), (user_id, viewer_id)]
    blocks = tao.there(session, Kind.BLOCKS, pairs)
    follows = bool(tao.assoc_get(session, viewer_id, Kind.FOLLOWS, [user_id]))
    requested = not follows and bool(tao.assoc_get(session, viewer_id, Kind.REQUESTED, [user_id]))
    is_counted = tao.has(session, user_id, Kind.FOLLOWED_BY, viewer_id)
    return Ties(follows, requested, is_counted, pairs[0] in blocks, pairs[1] in blocks)


def followers_with(session: ReadSession, viewer_id: int, user_id: int) -> tuple[int, bool]:
    """Return how many follow a person, and whether a certain one is among those counted."""
    edge = and_(Assoc.id1 == User.id, Assoc.atype == int(Kind.FOLLOWED_BY), Assoc.id2 == viewer_id)
    statement = (
        select(User.follower_count, Assoc.id2)
        .join_from(User, Assoc, edge, isouter=True)
        .where(User.id == user_id)
    )
    n, found = session.execute(statement).one()
    return n, found is not None
