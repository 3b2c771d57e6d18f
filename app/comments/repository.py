"""Statements about comments, all of which are beside their photo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import func, select

from app.photos.models import Comment
from shardkit import AsyncReadSession

__all__ = ["CommentRepository"]

_LONGEST = 500
"""Answers read for one page of comments, of all of them together."""


class CommentRepository:
    """Comments as one session sees them.

    Args:
        session: where to read.
    """

    def __init__(self, session: AsyncReadSession) -> None:
        self._session = session

    async def page(
        self, photo_id: int, parent_id: int | None, after: int | None, n: int
    ) -> Sequence[Comment]:
        """Return comments above an id, oldest first: those at the top, or answers to one."""
        statement = select(Comment).where(
            Comment.photo_id == photo_id, Comment.parent_id.is_not_distinct_from(parent_id)
        )
        if after is not None:
            statement = statement.where(Comment.id > after)
        return (await self._session.scalars(statement.order_by(Comment.id).limit(n))).all()

    async def answers(
        self, photo_id: int, parent_ids: Sequence[int], n: int
    ) -> tuple[Mapping[int, int], Mapping[int, Sequence[Comment]]]:
        """Return how many answers comments have, and the first `n` of each, oldest first."""
        if not parent_ids:
            return {}, {}
        here = (Comment.photo_id == photo_id, Comment.parent_id.in_(parent_ids))
        counting = select(Comment.parent_id, func.count()).where(*here)
        rows = await self._session.execute(counting.group_by(Comment.parent_id))
        counts = {parent: count for parent, count in rows if parent is not None}
        if not counts:
            return {}, {}
        first: dict[int, list[Comment]] = {}
        found = select(Comment).where(*here).order_by(Comment.id).limit(_LONGEST)
        for answer in await self._session.scalars(found):
            some = first.setdefault(answer.parent_id or 0, [])
            if len(some) < n:
                some.append(answer)
        return counts, first
