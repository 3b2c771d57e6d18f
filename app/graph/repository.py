"""Statements about follows."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from sqlalchemy import and_, select

from app.accounts.models import User
from app.graph.models import Follow, Follower
from shardkit import AsyncReadSession, AsyncWriteSession

__all__ = ["GraphRepository", "add_follow", "remove_follow"]


class GraphRepository:
    """The graph as one session sees it; every read goes to one shard.

    Args:
        session: where to read.
    """

    def __init__(self, session: AsyncReadSession) -> None:
        self._session = session

    async def follows(self, follower_id: int, followee_id: int) -> bool:
        """Tell whether one person follows another."""
        return await self._session.get(Follow, (follower_id, followee_id)) is not None

    async def counted(self, follower_id: int, followee_id: int) -> tuple[int, bool]:
        """Return how many follow a person, and whether a certain one is among those counted."""
        edge = and_(Follower.followee_id == User.id, Follower.follower_id == follower_id)
        statement = (
            select(User.follower_count, Follower.follower_id)
            .join_from(User, Follower, edge, isouter=True)
            .where(User.id == followee_id)
        )
        n, found = (await self._session.execute(statement)).one()
        return n, found is not None

    async def is_follower(self, followee_id: int, follower_id: int) -> bool:
        """Tell whether a person is among the followers of another: the relay was there."""
        return await self._session.get(Follower, (followee_id, follower_id)) is not None

    async def followee_ids(self, follower_id: int, n: int) -> list[int]:
        """Return whom a person follows, at most `n`, in no order."""
        statement = select(Follow.followee_id).where(Follow.follower_id == follower_id).limit(n)
        return list(await self._session.scalars(statement))

    async def followed_among(self, follower_id: int, ids: Sequence[int]) -> set[int]:
        """Return which of some people a person follows."""
        statement = select(Follow.followee_id).where(
            Follow.follower_id == follower_id, Follow.followee_id.in_(ids)
        )
        return set(await self._session.scalars(statement)) if ids else set()

    async def following(self, user_id: int, before: int | None, n: int) -> list[int]:
        """Return ids of people a person follows, descending, below `before`."""
        statement = select(Follow.followee_id).where(Follow.follower_id == user_id)
        if before is not None:
            statement = statement.where(Follow.followee_id < before)
        statement = statement.order_by(Follow.followee_id.desc()).limit(n)
        return list(await self._session.scalars(statement))

    async def followers(self, user_id: int, before: int | None, n: int) -> list[int]:
        """Return ids of people who follow a person, descending, below `before`."""
        statement = select(Follower.follower_id).where(Follower.followee_id == user_id)
        if before is not None:
            statement = statement.where(Follower.follower_id < before)
        statement = statement.order_by(Follower.follower_id.desc()).limit(n)
        return list(await self._session.scalars(statement))


async def add_follow(
    session: AsyncWriteSession, follower: User, followee_id: int, now: dt.datetime
) -> None:
    """Insert the forward edge and count it, unless it is there; `follower` is locked."""
    if await session.get(Follow, (follower.id, followee_id)) is None:
        session.add(Follow(follower_id=follower.id, followee_id=followee_id, created_at=now))
        follower.following_count += 1


async def remove_follow(session: AsyncWriteSession, follower: User, followee_id: int) -> None:
    """Delete the forward edge and count it, if it is there; `follower` is locked."""
    edge = await session.get(Follow, (follower.id, followee_id))
    if edge is not None:
        await session.delete(edge)
        follower.following_count -= 1
