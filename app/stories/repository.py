"""Statements about stories. Every one that shows any is told the time, and compares with it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import delete, func, select

from app.errors import NotFoundError
from app.partial import answered_or_none
from app.stories.models import Story, StoryView
from shardkit import AsyncReadSession, AsyncWriteSession

__all__ = ["StoryRepository", "delete_story", "living_story"]


class StoryRepository:
    """Stories as one session sees them at a certain time.

    Args:
        session: where to read.
        now: the time.
    """

    def __init__(self, session: AsyncReadSession, now: dt.datetime) -> None:
        self._session = session
        self._now = now

    async def story(self, story_id: int) -> Story:
        """Return a story that is still there.

        Raises:
            NotFoundError: there is none.
        """
        return _living(await self._session.get(Story, story_id), self._now)

    async def of_owners(self, owner_ids: Collection[int], n: int) -> Sequence[Story]:
        """Return the newest stories of some people, newest first, of who answers."""
        statement = select(Story).where(Story.owner_id.in_(owner_ids), Story.expires_at > self._now)
        return await answered_or_none(self._session, statement.order_by(Story.id.desc()).limit(n))

    async def seen_among(self, viewer_id: int, story_ids: Collection[int]) -> set[int]:
        """Return which of some stories a person has seen."""
        if not story_ids:
            return set()
        statement = select(StoryView.story_id).where(
            StoryView.story_id.in_(story_ids), StoryView.viewer_id == viewer_id
        )
        return set(await answered_or_none(self._session, statement))

    async def view_counts(self, story_ids: Collection[int]) -> Mapping[int, int]:
        """Return how many have seen stories, all of one person; those nobody saw are missing."""
        if not story_ids:
            return {}
        statement = select(StoryView.story_id, func.count()).where(
            StoryView.story_id.in_(story_ids)
        )
        rows = await self._session.execute(statement.group_by(StoryView.story_id))
        return {row[0]: row[1] for row in rows}

    async def viewers(self, story_id: int, before: int | None, n: int) -> Sequence[StoryView]:
        """Return who has seen a story, the last first."""
        statement = select(StoryView).where(StoryView.story_id == story_id)
        if before is not None:
            statement = statement.where(StoryView.id < before)
        statement = statement.order_by(StoryView.id.desc()).limit(n)
        return (await self._session.scalars(statement)).all()


async def living_story(session: AsyncWriteSession, story_id: int, now: dt.datetime) -> Story:
    """Return a story that is still there, locked until the transaction ends.

    Raises:
        NotFoundError: there is none.
    """
    return _living(await session.get(Story, story_id, with_for_update=True), now)


async def delete_story(session: AsyncWriteSession, story: Story) -> None:
    """Delete a story with the notes of who has seen it, all on its shard."""
    await session.execute(delete(StoryView).where(StoryView.story_id == story.id))
    await session.delete(story)


def _living(story: Story | None, now: dt.datetime) -> Story:
    if story is None or story.expires_at <= now:
        raise NotFoundError("There is no such story.")
    return story
