"""Who may see what of whom: blocks in both directions, and private accounts.

Asked after cached reads, by everybody who shows something of a person. A block is read where the
blocker is, so it counts for both from its commit on, whatever the relay has done. Who may not know
is answered as if there were nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import select

from app.accounts.models import User
from app.errors import NotFoundError
from app.graph import tao
from app.graph.models import Assoc, Kind
from app.partial import FAILED, PATIENCE, answered_or_none
from shardkit import AsyncReadSession, ReadSession, deadline

__all__ = [
    "check_reaction",
    "check_unblocked",
    "hidden",
    "hidden_among",
    "hidden_from",
    "seen_among",
    "visible",
]


def hidden(session: ReadSession, viewer_id: int | None, others: Iterable[int]) -> set[int]:
    """Return which of some people have blocked the viewer, or are blocked by the viewer."""
    if viewer_id is None:
        return set()
    pairs = [
        pair
        for other in set(others)
        if other != viewer_id
        for pair in ((viewer_id, other), (other, viewer_id))
    ]
    if not pairs:
        return set()
    found = tao.there(session, Kind.BLOCKS, pairs)
    return {b if a == viewer_id else a for a, b in found}


def visible(session: ReadSession, viewer_id: int | None, people: Mapping[int, User]) -> set[int]:
    """Return whose photos a viewer may see, of people by id.

    Public ones, and private ones that the viewer follows, but for blocks; oneself always.
    """
    gone = hidden(session, viewer_id, people)
    private = [id_ for id_, user in people.items() if user.is_private and id_ != viewer_id]
    followed: Mapping[int, object] = {}
    if private and viewer_id is not None:
        followed = tao.assoc_get(session, viewer_id, Kind.FOLLOWS, private)
    closed = set(private) - followed.keys()
    return set(people) - gone - closed


async def check_unblocked(session: AsyncReadSession, viewer_id: int | None, other: int) -> None:
    """Refuse what concerns a person whom a block separates from the viewer.

    Raises:
        NotFoundError: there is a block, one way or the other.
    """
    if await tao.on(session, hidden, viewer_id, [other]):
        raise NotFoundError("There is no such person.")


async def seen_among(
    session: AsyncReadSession, viewer_id: int | None, people: Mapping[int, User]
) -> set[int]:
    """Return what `visible` does; nobody of whom it is not known because a server is silent."""
    if not people:
        return set()
    try:
        with deadline(PATIENCE):
            return await tao.on(session, visible, viewer_id, people)
    except FAILED:
        pass  # who answers is asked
    known = set(await answered_or_none(session, select(User.id).where(User.id.in_(people))))
    blocks = select(Assoc).where(
        Assoc.id1.in_([*people, viewer_id or 0]), Assoc.atype == int(Kind.BLOCKS)
    )
    ends = [*people, viewer_id or 0]
    found = await answered_or_none(session, blocks.where(Assoc.id2.in_(ends)))
    gone = {edge.id2 if edge.id1 == viewer_id else edge.id1 for edge in found}
    follows = select(Assoc.id2).where(
        Assoc.id1 == (viewer_id or 0), Assoc.atype == int(Kind.FOLLOWS), Assoc.id2.in_(people)
    )
    open_to = set(await answered_or_none(session, follows)) | {viewer_id}
    return {
        id_
        for id_, user in people.items()
        if id_ in known
        and (id_ not in gone or id_ == viewer_id)
        and (not user.is_private or id_ in open_to)
    }


async def hidden_among(
    session: AsyncReadSession, viewer_id: int | None, people: Mapping[int, User]
) -> set[int]:
    """Return which of some people a block hides; also those of whom it is not known."""
    try:
        with deadline(PATIENCE):
            return await tao.on(session, hidden, viewer_id, people)
    except FAILED:
        return set(people) - await seen_among(session, viewer_id, people)


def hidden_from(session: ReadSession, owner_id: int, user_ids: Sequence[int]) -> set[int]:
    """Return who may not see an owner's photos; asks where the owner is.

    A follow that the relay has not told the owner of yet is asked of who follows.
    """
    others = [user_id for user_id in user_ids if user_id != owner_id]
    owner = session.get(User, owner_id)
    if owner is None:
        return set(others)
    keys = [(owner_id, int(Kind.BLOCKS), other) for other in others]
    gone = {edge.id2 for edge in session.get_many(Assoc, keys) if edge is not None}
    if owner.is_private:
        for pick in (
            lambda other: (owner_id, int(Kind.FOLLOWED_BY), other),
            lambda other: (other, int(Kind.FOLLOWS), owner_id),
        ):
            found = session.get_many(Assoc, list(map(pick, others)))
            follows = {other for other, edge in zip(others, found, strict=True) if edge}
            others = [other for other in others if other not in follows]
        gone |= set(others)
    return gone


def check_reaction(
    session: ReadSession, viewer_id: int, owner_id: int, what: str = "photo"
) -> None:
    """Refuse what somebody does to what they may not see; asks where that is.

    Raises:
        NotFoundError: the owner blocks the viewer, or is private and not followed.
    """
    if hidden_from(session, owner_id, [viewer_id]):
        raise NotFoundError(f"There is no such {what}.")
