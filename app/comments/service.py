"""Write, read and delete comments and the answers to them.

Called by the API and the pages. Threads have two levels: who answers an answer is put under the
same comment. A comment that goes takes its answers along; an answer goes alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import delete, select

from app import happenings
from app.accounts.repository import AccountRepository
from app.accounts.schemas import PersonOut
from app.accounts.service import Viewer, person_out
from app.clock import Clock
from app.comments.repository import CommentRepository
from app.comments.schemas import CommentIn, CommentOut
from app.database import Database, Request
from app.errors import ForbiddenError, NotFoundError
from app.graph.privacy import check_reaction, hidden_among, seen_among
from app.graph.tao import on
from app.paging import Page, cut
from app.partial import is_partial
from app.photos.models import Comment
from app.photos.repository import PhotoRepository, locked_photo
from app.photos.service import unseen
from app.tags.parser import mentions, tags
from app.tags.repository import add_tags, drop_tags
from shardkit import AsyncReadSession, AsyncWriteSession

__all__ = ["FIRST_REPLIES", "CommentService"]

FIRST_REPLIES = 3
"""Answers that are shown with the comment they are to."""


class CommentService:
    """What people do with comments.

    Args:
        database: the client's sessions.
        clock: the time.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def comment(self, viewer: Viewer, photo_id: int, given: CommentIn) -> CommentOut:
        """Write a comment under a photo, or an answer to one.

        Raises:
            NotFoundError: there is no such photo, or no such comment under it.
        """

        async def work(session: AsyncWriteSession) -> dict[str, Any]:
            photo = await locked_photo(session, photo_id)
            await on(session, check_reaction, viewer.id, photo.owner_id)
            told = {"owner": photo.owner_id}
            parent_id = None
            if given.parent_id is not None:
                answered = await _comment(session, photo_id, given.parent_id)
                told["reply"] = answered.author_id
                parent_id = answered.parent_id or answered.id
            comment = Comment(
                photo_id=photo_id,
                author_id=viewer.id,
                parent_id=parent_id,
                body=given.body,
                created_at=self._clock(),
            )
            session.add(comment)
            photo.comment_count += 1
            await session.flush()
            if viewer.id == photo.owner_id:  # nobody puts another's photo on the page of a tag
                await add_tags(session, photo_id, comment.id, tags(given.body))
            happenings.comment_added(
                session,
                photo_id,
                comment.id,
                author_id=viewer.id,
                told=told,
                names=mentions(given.body),
            )
            me = PersonOut(id=viewer.id, username=viewer.username, display_name=viewer.display_name)
            return _out(comment, me).model_dump(mode="json")

        request = Request(viewer.id, ("comment", photo_id, given.body, given.parent_id))
        return CommentOut.model_validate(await self._database.run(request, work, near=photo_id))

    async def delete(self, viewer: Viewer, photo_id: int, comment_id: int) -> None:
        """Delete one's own comment, or any under one's own photo, with the answers to it.

        Raises:
            NotFoundError: there is no such comment under this photo.
            ForbiddenError: it is somebody else's.
        """

        async def work(session: AsyncWriteSession) -> None:
            photo = await locked_photo(session, photo_id)
            comment = await _comment(session, photo_id, comment_id)
            if viewer.id not in {comment.author_id, photo.owner_id}:
                raise ForbiddenError("This comment belongs to somebody else.")
            here = (Comment.photo_id == photo_id, Comment.parent_id == comment_id)
            gone = [comment_id, *await session.scalars(select(Comment.id).where(*here))]
            await drop_tags(session, photo_id, gone)
            await session.execute(delete(Comment).where(*here))
            await session.delete(comment)
            photo.comment_count -= len(gone)
            happenings.comments_removed(session, photo_id, gone)

        request = Request(viewer.id, ("delete comment", photo_id, comment_id))
        await self._database.run(request, work, near=photo_id)

    async def comments(
        self, photo_id: int, viewer: Viewer | None, after: int | None, n: int
    ) -> Page[CommentOut]:
        """Return a page of the comments under a photo, oldest first, without who is blocked.

        Each has the number of its answers and the first of them.

        Raises:
            NotFoundError: there is no such photo, or the viewer may not see it.
        """
        async with self._database.reader() as session:
            await _check_seen(session, photo_id, viewer)
            repository = CommentRepository(session)
            rows = await repository.page(photo_id, None, after, n + 1)
            top, cursor = cut(rows, n, lambda comment: comment.id)
            counts, first = await repository.answers(photo_id, [c.id for c in top], FIRST_REPLIES)
            return await _page(session, top, viewer, cursor, counts=counts, first=first)

    async def thread(
        self,
        photo_id: int,
        comment_id: int,
        viewer: Viewer | None,
        after: int | None,
        n: int,
    ) -> tuple[CommentOut, Page[CommentOut]]:
        """Return a comment and a page of the answers to it, oldest first.

        Raises:
            NotFoundError: there is no such comment, or the viewer may not see it.
        """
        async with self._database.reader() as session:
            await _check_seen(session, photo_id, viewer)
            comment = await _comment(session, photo_id, comment_id)
            repository = CommentRepository(session)
            rows = await repository.page(photo_id, comment_id, after, n + 1)
            answers, cursor = cut(rows, n, lambda each: each.id)
            counts, _ = await repository.answers(photo_id, [comment_id], 0)
            top = await _page(session, [comment], viewer, None, counts=counts)
            if not top.items:
                raise unseen(session)
            return top.items[0], await _page(session, answers, viewer, cursor)


async def _check_seen(session: AsyncReadSession, photo_id: int, viewer: Viewer | None) -> None:
    photo = await PhotoRepository(session).photo(photo_id)
    owners = await AccountRepository(session).users([photo.owner_id])
    if not await seen_among(session, _id(viewer), owners):
        raise unseen(session)


async def _comment(session: AsyncReadSession, photo_id: int, comment_id: int) -> Comment:
    """Return a comment under a photo.

    Raises:
        NotFoundError: there is none.
    """
    comment = await session.get(Comment, comment_id)
    if comment is None or comment.photo_id != photo_id:
        raise NotFoundError("There is no such comment.")
    return comment


async def _page(
    session: AsyncReadSession,
    comments: Sequence[Comment],
    viewer: Viewer | None,
    cursor: int | None,
    *,
    counts: Mapping[int, int] | None = None,
    first: Mapping[int, Sequence[Comment]] | None = None,
) -> Page[CommentOut]:
    """Return a page of comments, without those of people whom a block hides."""
    below = first or {}
    shown = [*comments, *(answer for some in below.values() for answer in some)]
    authors = await AccountRepository(session).users(each.author_id for each in shown)
    hidden = await hidden_among(session, _id(viewer), authors)
    items = []
    for comment in _of_people(comments, authors.keys() - hidden):
        out = _out(comment, person_out(authors[comment.author_id]))
        out.reply_count = (counts or {}).get(comment.id, 0)
        out.replies = [
            _out(answer, person_out(authors[answer.author_id]))
            for answer in _of_people(below.get(comment.id, ()), authors.keys() - hidden)
        ]
        items.append(out)
    return Page[CommentOut](items=items, next_cursor=cursor, partial=is_partial(session))


def _of_people(comments: Iterable[Comment], people: Collection[int]) -> list[Comment]:
    return [comment for comment in comments if comment.author_id in people]


def _id(viewer: Viewer | None) -> int | None:
    return None if viewer is None else viewer.id


def _out(comment: Comment, author: PersonOut) -> CommentOut:
    return CommentOut(
        id=comment.id,
        photo_id=comment.photo_id,
        parent_id=comment.parent_id,
        author=author,
        body=comment.body,
        created_at=comment.created_at,
    )
