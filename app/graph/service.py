"""Follow, unfollow, ask to follow, block, and the lists of both directions.

Called by the API and the pages. An edge is two rows on two shards. The forward one is written
here, with its count and the event that announces it, in one transaction on the shard of the person
whose edge it is; it is the truth. The relay has `app.graph.inverse` write the other one. A request
to follow a private account is an edge of the one who asks; accepting it makes it a follow, in one
transaction there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from app.accounts.models import User
from app.accounts.repository import AccountRepository, person_of_name
from app.accounts.schemas import PersonOut
from app.accounts.service import Viewer, person_out
from app.clock import Clock
from app.database import Database, Request
from app.errors import FollowLimitError, InvalidInputError, NotFoundError
from app.graph import tao
from app.graph.models import Kind
from app.graph.places import cut_edges
from app.graph.privacy import check_unblocked, hidden, visible
from app.graph.tao import Edge
from app.paging import Page
from app.partial import FAILED, PATIENCE, is_partial
from shardkit import AsyncReadSession, AsyncWriteSession, WriteSession, deadline

__all__ = ["GraphService"]

T = TypeVar("T")


class GraphService:
    """What people do with edges.

    Args:
        database: the client's sessions.
        clock: the time.
        max_followees: people one account may follow.
    """

    def __init__(self, database: Database, clock: Clock, max_followees: int) -> None:
        self._database = database
        self._clock = clock
        self._max_followees = max_followees

    # -- follows

    async def follow(self, viewer: Viewer, name: str) -> tuple[PersonOut, bool]:
        """Make the viewer follow a person, or ask a private one; twice is once.

        Returns:
            The person, and whether the viewer follows now; otherwise the person has to answer.

        Raises:
            NotFoundError: nobody has the name, or there is a block.
            InvalidInputError: it is the viewer.
            FollowLimitError: the viewer follows too many already.
        """
        followee = await self._person(name)
        if followee.id == viewer.id:
            raise InvalidInputError("username", "You cannot follow yourself.")
        await self._check_unblocked(viewer, followee)
        is_private = followee.is_private

        def work(session: WriteSession) -> bool:
            me = tao.locked(session, viewer.id)
            if tao.has(session, me.id, Kind.FOLLOWS, followee.id):
                return True
            if me.following_count >= self._max_followees:
                raise FollowLimitError
            if is_private:
                tao.assoc_add(session, me, Kind.REQUESTED, followee.id, self._now())
                return False
            tao.assoc_delete(session, me, Kind.REQUESTED, followee.id)
            at = tao.next_time(session, me.id, Kind.FOLLOWS, self._now())
            tao.assoc_add(session, me, Kind.FOLLOWS, followee.id, at)
            return True

        request = Request(viewer.id, ("follow", followee.id))
        return person_out(followee), await self._run(request, work, near=viewer.id)

    async def unfollow(self, viewer: Viewer, name: str) -> PersonOut:
        """Make the viewer no longer follow a person, nor ask to; doing so twice is doing so once.

        Raises:
            NotFoundError: nobody has the name.
        """
        followee = await self._person(name)

        def work(session: WriteSession) -> None:
            me = tao.locked(session, viewer.id)
            tao.assoc_delete(session, me, Kind.FOLLOWS, followee.id)
            tao.assoc_delete(session, me, Kind.REQUESTED, followee.id)

        request = Request(viewer.id, ("unfollow", followee.id))
        await self._run(request, work, near=viewer.id)
        return person_out(followee)

    # -- requests

    async def accept(self, viewer: Viewer, name: str) -> PersonOut:
        """Let a person follow the viewer who has asked to; twice is once.

        Raises:
            NotFoundError: nobody has the name, or that person has not asked.
        """
        return await self._answer(viewer, name, accepted=True)

    async def refuse(self, viewer: Viewer, name: str) -> PersonOut:
        """Refuse a person who has asked to follow the viewer; twice is once.

        Raises:
            NotFoundError: nobody has the name.
        """
        return await self._answer(viewer, name, accepted=False)

    async def remove_follower(self, viewer: Viewer, name: str) -> PersonOut:
        """Make a person no longer follow the viewer; twice is once.

        Raises:
            NotFoundError: nobody has the name.
        """
        person = await self._person(name)

        def work(session: WriteSession) -> None:
            tao.assoc_delete(session, tao.locked(session, person.id), Kind.FOLLOWS, viewer.id)

        await self._run(Request(viewer.id, ("remove", person.id)), work, near=person.id)
        return person_out(person)

    async def requests(self, viewer: Viewer, after: Edge | None, n: int) -> Page[PersonOut]:
        """Return a page of people who ask to follow the viewer, newest first."""
        async with self._database.reader() as session:
            edges = await tao.on(
                session, tao.assoc_page, viewer.id, Kind.REQUESTED_BY, after, n + 1
            )
            shown, cursor = cut_edges(edges, n)
            ids = [edge.id2 for edge in shown]
            # The list is the relay's; whoever has been answered is left out at once.
            pairs = [(id_, viewer.id) for id_ in ids]
            try:
                with deadline(PATIENCE):
                    asked = await tao.on(session, tao.there, Kind.REQUESTED, pairs)
                    gone = await tao.on(session, hidden, viewer.id, ids)
            except FAILED:
                asked, gone = set(pairs), set()
            wanted = [id_ for id_ in ids if (id_, viewer.id) in asked and id_ not in gone]
            return await _people(session, wanted, cursor)

    # -- blocks

    async def block(self, viewer: Viewer, name: str) -> PersonOut:
        """Hide the viewer and a person from each other, and end edges; twice is once.

        Raises:
            NotFoundError: nobody has the name.
            InvalidInputError: it is the viewer.
        """
        person = await self._person(name)
        if person.id == viewer.id:
            raise InvalidInputError("username", "You cannot block yourself.")

        def work(session: WriteSession) -> None:
            me = tao.locked(session, viewer.id)
            tao.assoc_delete(session, me, Kind.FOLLOWS, person.id)
            tao.assoc_delete(session, me, Kind.REQUESTED, person.id)
            tao.assoc_add(session, me, Kind.BLOCKS, person.id, self._now())

        await self._run(Request(viewer.id, ("block", person.id)), work, near=viewer.id)
        return person_out(person)

    async def unblock(self, viewer: Viewer, name: str) -> PersonOut:
        """End a block; doing so twice is doing so once. Edges that it ended do not come back.

        Raises:
            NotFoundError: nobody has the name.
        """
        person = await self._person(name)

        def work(session: WriteSession) -> None:
            tao.assoc_delete(session, tao.locked(session, viewer.id), Kind.BLOCKS, person.id)

        await self._run(Request(viewer.id, ("unblock", person.id)), work, near=viewer.id)
        return person_out(person)

    async def blocked(self, viewer: Viewer, after: Edge | None, n: int) -> Page[PersonOut]:
        """Return a page of people whom the viewer blocks, newest first."""
        async with self._database.reader() as session:
            edges = await tao.on(session, tao.assoc_page, viewer.id, Kind.BLOCKS, after, n + 1)
            shown, cursor = cut_edges(edges, n)
            return await _people(session, [edge.id2 for edge in shown], cursor)

    # -- lists

    async def followers(
        self, name: str, viewer: Viewer | None, after: Edge | None, n: int
    ) -> Page[PersonOut]:
        """Return a page of the people who follow somebody, newest first.

        Raises:
            NotFoundError: nobody has the name, or the viewer may not know.
        """
        return await self._listed(name, viewer, after, n, Kind.FOLLOWED_BY)

    async def following(
        self, name: str, viewer: Viewer | None, after: Edge | None, n: int
    ) -> Page[PersonOut]:
        """Return a page of the people somebody follows, newest first.

        Raises:
            NotFoundError: nobody has the name, or the viewer may not know.
        """
        return await self._listed(name, viewer, after, n, Kind.FOLLOWS)

    async def followed_among(self, viewer: Viewer | None, ids: Sequence[int]) -> set[int]:
        """Return which of some people the viewer follows."""
        if viewer is None or not ids:
            return set()
        async with self._database.reader() as session:
            found = await tao.on(session, tao.assoc_get, viewer.id, Kind.FOLLOWS, ids)
            return set(found)

    # -- parts

    async def _listed(
        self, name: str, viewer: Viewer | None, after: Edge | None, n: int, kind: Kind
    ) -> Page[PersonOut]:
        async with self._database.reader() as session:
            user = await AccountRepository(session).user_by_name(name)
            me = None if viewer is None else viewer.id
            if user is None or not await tao.on(session, visible, me, {user.id: user}):
                raise NotFoundError("There is no such person.")
            edges = await tao.on(session, tao.assoc_page, user.id, kind, after, n + 1)
            shown, cursor = cut_edges(edges, n)
            return await _people(session, [edge.id2 for edge in shown], cursor)

    async def _answer(self, viewer: Viewer, name: str, *, accepted: bool) -> PersonOut:
        person = await self._person(name)

        def work(session: WriteSession) -> bool:
            them = tao.locked(session, person.id)
            if not accepted:
                tao.assoc_delete(session, them, Kind.REQUESTED, viewer.id)
                return True
            if tao.has(session, them.id, Kind.FOLLOWS, viewer.id):
                return True
            kinds = (Kind.REQUESTED, Kind.FOLLOWS)
            at = tao.next_time(session, them.id, Kind.FOLLOWS, self._now())
            return tao.assoc_change_type(session, them, kinds, viewer.id, at)

        what = "accept" if accepted else "refuse"
        request = Request(viewer.id, (what, person.id))
        if not await self._run(request, work, near=person.id):
            raise NotFoundError("This person has not asked to follow you.")
        return person_out(person)

    async def _check_unblocked(self, viewer: Viewer, other: User) -> None:
        """Refuse an edge to whom a block separates from the viewer, as far as servers can tell.

        Where nobody can, the edge is taken: what it would show is hidden when it is read.
        """
        try:
            async with self._database.primary() as session:
                await check_unblocked(session, viewer.id, other.id)
        except FAILED:
            with suppress(*FAILED):
                async with self._database.reader(fresh=False) as session:
                    await check_unblocked(session, viewer.id, other.id)

    async def _run(self, request: Request, work: Callable[[WriteSession], T], *, near: int) -> T:
        """Run a unit of work that is a function of shardkit's own session."""

        async def unit(session: AsyncWriteSession) -> T:
            return await tao.on(session, work)

        return await self._database.run(request, unit, near=near)

    async def _person(self, name: str) -> User:
        user = await person_of_name(self._database, name)
        if user is None:
            raise NotFoundError("There is no such person.")
        return user

    def _now(self) -> int:
        return int(self._clock().timestamp() * 1000)


async def _people(
    session: AsyncReadSession, ids: Sequence[int], cursor: str | None
) -> Page[PersonOut]:
    users = await AccountRepository(session).users(ids)
    people = [person_out(users[user_id]) for user_id in ids if user_id in users]
    return Page[PersonOut](items=people, next_cursor=cursor, partial=is_partial(session))
