"""Follow and unfollow, and the lists of both directions.

Called by the API and the pages. An edge is two rows on two shards. The forward one is written
here, with its count and the event that announces it, in one transaction on the follower's shard;
it is the truth. The relay has `app.graph.inverse` write the other one.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.accounts.models import User
from app.accounts.repository import AccountRepository, person_of_name
from app.accounts.schemas import PersonOut
from app.accounts.service import Viewer, person_out
from app.clock import Clock
from app.database import Database, Request
from app.errors import FollowLimitError, InvalidInputError, NotFoundError
from app.graph.repository import GraphRepository, add_follow, remove_follow
from app.paging import Page, cut
from app.partial import is_partial
from shardkit import AsyncWriteSession

__all__ = ["GraphService"]


class GraphService:
    """What people do with follows.

    Args:
        database: the client's sessions.
        clock: the time.
        max_followees: people one account may follow.
    """

    def __init__(self, database: Database, clock: Clock, max_followees: int) -> None:
        self._database = database
        self._clock = clock
        self._max_followees = max_followees

    async def follow(self, viewer: Viewer, name: str) -> PersonOut:
        """Make the viewer follow a person; following twice is following once.

        Raises:
            NotFoundError: nobody has the name.
            InvalidInputError: it is the viewer.
            FollowLimitError: the viewer follows too many already.
        """
        followee = await self._person(name)
        if followee.id == viewer.id:
            raise InvalidInputError("username", "You cannot follow yourself.")

        async def work(session: AsyncWriteSession) -> None:
            follower = await _locked(session, viewer.id)
            if follower.following_count >= self._max_followees and not (
                await GraphRepository(session).follows(viewer.id, followee.id)
            ):
                raise FollowLimitError
            await add_follow(session, follower, followee.id, self._clock())

        request = Request(viewer.id, ("follow", followee.id))
        await self._database.run(request, work, near=viewer.id)
        return person_out(followee)

    async def unfollow(self, viewer: Viewer, name: str) -> PersonOut:
        """Make the viewer no longer follow a person; doing so twice is doing so once.

        Raises:
            NotFoundError: nobody has the name.
        """
        followee = await self._person(name)

        async def work(session: AsyncWriteSession) -> None:
            await remove_follow(session, await _locked(session, viewer.id), followee.id)

        request = Request(viewer.id, ("unfollow", followee.id))
        await self._database.run(request, work, near=viewer.id)
        return person_out(followee)

    async def followers(self, name: str, before: int | None, n: int) -> Page[PersonOut]:
        """Return a page of the people who follow somebody.

        Raises:
            NotFoundError: nobody has the name.
        """
        return await self._people(name, before, n, inverse=True)

    async def following(self, name: str, before: int | None, n: int) -> Page[PersonOut]:
        """Return a page of the people somebody follows.

        Raises:
            NotFoundError: nobody has the name.
        """
        return await self._people(name, before, n, inverse=False)

    async def followed_among(self, viewer: Viewer | None, ids: Sequence[int]) -> set[int]:
        """Return which of some people the viewer follows."""
        if viewer is None:
            return set()
        async with self._database.reader() as session:
            return await GraphRepository(session).followed_among(viewer.id, ids)

    async def _people(
        self, name: str, before: int | None, n: int, *, inverse: bool
    ) -> Page[PersonOut]:
        async with self._database.reader() as session:
            accounts = AccountRepository(session)
            user = await accounts.user_by_name(name)
            if user is None:
                raise NotFoundError("There is no such person.")
            graph = GraphRepository(session)
            read = graph.followers if inverse else graph.following
            ids, cursor = cut(await read(user.id, before, n + 1), n, lambda user_id: user_id)
            users = await accounts.users(ids)
            partial = is_partial(session)
        people = [person_out(users[user_id]) for user_id in ids if user_id in users]
        return Page[PersonOut](items=people, next_cursor=cursor, partial=partial)

    async def _person(self, name: str) -> User:
        user = await person_of_name(self._database, name)
        if user is None:
            raise NotFoundError("There is no such person.")
        return user


async def _locked(session: AsyncWriteSession, user_id: int) -> User:
    user = await session.get(User, user_id, with_for_update=True)
    if user is None:
        raise NotFoundError("There is no such person.")
    return user
