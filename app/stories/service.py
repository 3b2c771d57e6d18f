"""Post, look at and delete stories.

Called by the API and the pages. A story is there for 24 hours, by the clock at the moment of the
read: of the row, of lists and of its bytes, which therefore have no address of their own.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import select

from app.accounts.models import User
from app.accounts.repository import AccountRepository
from app.accounts.service import Viewer, person_out
from app.addresses import MEDIA
from app.clock import Clock
from app.database import Database, Request
from app.errors import (
    ForbiddenError,
    NotFoundError,
    StorageFullError,
    StorageUnavailableError,
    is_disk_full,
)
from app.graph import tao
from app.graph.models import Kind
from app.graph.privacy import check_reaction, hidden_among, seen_among
from app.graph.tao import on
from app.ids import Id
from app.paging import Page, cut
from app.partial import is_partial
from app.photos.images import SIZES, ImageWorkers
from app.photos.store import NAME_DIGITS, BlobStore
from app.stories.models import LIFE, Story, StoryView
from app.stories.repository import StoryRepository, delete_story, living_story
from app.stories.schemas import StoriesOut, StoryOut, ViewerOfStoryOut
from shardkit import AsyncReadSession, AsyncWriteSession
from shardkit.errors import OutcomeUnknownError

__all__ = ["StoryService"]

MOST = 300
"""Stories of one look at everybody's, the newest; those of one person are far fewer."""


class StoryService:
    """What people do with stories.

    Args:
        database: the client's sessions.
        blobs: where the bytes go.
        workers: the decoding processes.
        clock: the time.
        max_followees: people whose stories are looked for.
    """

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        workers: ImageWorkers,
        clock: Clock,
        max_followees: int,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._workers = workers
        self._clock = clock
        self._max_followees = max_followees

    async def post(self, viewer: Viewer, data: bytes, caption: str) -> StoryOut:
        """Store a story and return it.

        Raises:
            UploadError: the file is refused; nothing was stored.
            BusyError: too many uploads wait already.
        """
        prepared = await self._workers.prepare(data)
        try:
            key = await self._blobs.put(secrets.token_hex(NAME_DIGITS // 2), prepared.variants)
        except OSError as error:
            raise (
                StorageFullError() if is_disk_full(error) else StorageUnavailableError()
            ) from error

        async def work(session: AsyncWriteSession) -> tuple[str, dict[str, Any]]:
            owner = await session.get(User, viewer.id)
            if owner is None:
                raise NotFoundError("There is no such person.")
            now = self._clock()
            story = Story(
                owner_id=viewer.id,
                caption=caption,
                width=prepared.width,
                height=prepared.height,
                blob_key=key,
                created_at=now,
                expires_at=now + LIFE,
            )
            session.add(story)
            await session.flush()
            return key, _story_out(story, owner, seen=False, n_views=0).model_dump(mode="json")

        digest = hashlib.sha256(data).hexdigest()
        request = Request(viewer.id, ("story", digest, caption))
        try:
            kept, answer = await self._database.run(request, work, near=viewer.id)
        except Exception as error:
            if not isinstance(error, OutcomeUnknownError):  # nothing was committed
                await self._blobs.delete(key)
            raise
        if kept != key:  # a repetition: the first one's are kept
            await self._blobs.delete(key)
        return StoryOut.model_validate(answer)

    async def delete(self, viewer: Viewer, story_id: int) -> None:
        """Delete one's own story.

        Raises:
            NotFoundError: there is no such story any more, or the viewer may not see it.
            ForbiddenError: it is somebody else's.
        """

        async def work(session: AsyncWriteSession) -> str:
            story = await living_story(session, story_id, self._clock())
            if story.owner_id != viewer.id:
                await on(session, check_reaction, viewer.id, story.owner_id, "story")
                raise ForbiddenError("This story belongs to somebody else.")
            await delete_story(session, story)
            return story.blob_key

        request = Request(viewer.id, ("delete story", story_id))
        await self._blobs.delete(await self._database.run(request, work, near=story_id))

    async def story(self, viewer: Viewer, story_id: Id) -> StoryOut:
        """Return a story as a viewer sees it.

        Raises:
            NotFoundError: there is none, or the viewer may not see it.
        """
        async with self._database.reader() as session:
            story = await self._seen(session, viewer, story_id)
            groups = await self._described(session, [story], viewer)
            if not groups:
                raise NotFoundError("There is no such story.")
            return groups[0].stories[0]

    async def of(self, viewer: Viewer, name: str) -> StoriesOut:
        """Return somebody's stories, the oldest first; perhaps none.

        Raises:
            NotFoundError: nobody has the name, or the viewer may not see their stories.
        """
        async with self._database.reader() as session:
            user = await AccountRepository(session).user_by_name(name)
            if user is None or not await seen_among(session, viewer.id, {user.id: user}):
                raise NotFoundError("There is no such person.")
            stories = await StoryRepository(session, self._clock()).of_owners([user.id], MOST)
            groups = await self._described(session, stories, viewer)
        return (
            groups[0] if groups else StoriesOut(person=person_out(user), stories=[], all_seen=True)
        )

    async def all(self, viewer: Viewer) -> Page[StoriesOut]:
        """Return the stories of the viewer and of whom the viewer follows.

        The viewer first, then those with something new, each by the newest story.
        """
        async with self._database.reader() as session:
            followees = await tao.on(
                session, tao.all_ids, viewer.id, Kind.FOLLOWS, self._max_followees
            )
            repository = StoryRepository(session, self._clock())
            stories = await repository.of_owners([viewer.id, *followees], MOST)
            groups = await self._described(session, stories, viewer)
            partial = is_partial(session)
        groups.sort(key=lambda each: (each.person.id != viewer.id, each.all_seen))
        return Page[StoriesOut](items=groups, partial=partial)

    async def view(self, viewer: Viewer, story_id: int) -> None:
        """Note that the viewer has seen a story; once is enough, and one's own does not count.

        Raises:
            NotFoundError: there is none, or the viewer may not see it.
        """
        async with self._database.reader() as session:
            await self._seen(session, viewer, story_id)

        async def work(session: AsyncWriteSession) -> None:
            now = self._clock()
            story = await living_story(session, story_id, now)
            seen = select(StoryView.id).where(
                StoryView.story_id == story_id, StoryView.viewer_id == viewer.id
            )
            if story.owner_id != viewer.id and await session.scalar(seen) is None:
                session.add(StoryView(story_id=story_id, viewer_id=viewer.id, seen_at=now))

        request = Request(viewer.id, ("view story", story_id))
        await self._database.run(request, work, near=story_id)

    async def viewers(
        self, viewer: Viewer, story_id: int, before: int | None, n: int
    ) -> Page[ViewerOfStoryOut]:
        """Return a page of who has seen one's own story, the last first.

        Raises:
            NotFoundError: there is no such story any more.
            ForbiddenError: it is somebody else's.
        """
        async with self._database.reader() as session:
            story = await self._seen(session, viewer, story_id)
            if story.owner_id != viewer.id:
                raise ForbiddenError("Who has seen a story is for its owner to know.")
            repository = StoryRepository(session, self._clock())
            views, cursor = cut(
                await repository.viewers(story_id, before, n + 1), n, lambda view: view.id
            )
            people = await AccountRepository(session).users(view.viewer_id for view in views)
            hidden = await hidden_among(session, viewer.id, people)
            partial = is_partial(session)
        shown = [
            ViewerOfStoryOut(person=person_out(people[view.viewer_id]), seen_at=view.seen_at)
            for view in views
            if view.viewer_id in people and view.viewer_id not in hidden
        ]
        return Page[ViewerOfStoryOut](items=shown, next_cursor=cursor, partial=partial)

    async def picture(self, viewer: Viewer, story_id: int, size: int) -> tuple[bytes, int]:
        """Return the bytes of one size, and for how many seconds they may be kept.

        Raises:
            NotFoundError: there are none, or the viewer may not see them.
        """
        if size not in SIZES:
            raise NotFoundError("There is no such picture.")
        async with self._database.reader() as session:
            story = await self._seen(session, viewer, story_id)
        data = await self._blobs.get(story.blob_key, f"{size}.jpg")
        seconds = int((story.expires_at - self._clock()).total_seconds())
        if data is None or seconds < 0:  # the store may have taken its time
            raise NotFoundError("There is no such picture.")
        return data, seconds

    async def _seen(self, session: AsyncReadSession, viewer: Viewer, story_id: int) -> Story:
        """Return a story that the viewer may see now."""
        story = await StoryRepository(session, self._clock()).story(story_id)
        owners = await AccountRepository(session).users([story.owner_id])
        if not await seen_among(session, viewer.id, owners):
            raise NotFoundError("There is no such story.")
        return story

    async def _described(
        self, session: AsyncReadSession, stories: Sequence[Story], viewer: Viewer
    ) -> list[StoriesOut]:
        """Return stories by person, in the order of the newest, of whom the viewer may see."""
        owners = await AccountRepository(session).users(story.owner_id for story in stories)
        visible = await seen_among(session, viewer.id, owners)
        repository = StoryRepository(session, self._clock())
        shown = [story for story in stories if story.owner_id in visible]
        seen = await repository.seen_among(viewer.id, [story.id for story in shown])
        own = [story.id for story in shown if story.owner_id == viewer.id]
        seen |= set(own)
        counts = await repository.view_counts(own)
        return [
            _group(owners[owner_id], some, seen, counts if owner_id == viewer.id else None)
            for owner_id, some in _by_owner(shown).items()
        ]


def _by_owner(stories: Iterable[Story]) -> dict[int, list[Story]]:
    found: dict[int, list[Story]] = {}
    for story in stories:
        found.setdefault(story.owner_id, []).append(story)
    return found


def _group(
    owner: User, stories: Iterable[Story], seen: set[int], counts: Mapping[int, int] | None
) -> StoriesOut:
    shown = [
        _story_out(
            story,
            owner,
            seen=story.id in seen,
            n_views=None if counts is None else counts.get(story.id, 0),
        )
        for story in sorted(stories, key=lambda story: story.id)
    ]
    return StoriesOut(
        person=person_out(owner), stories=shown, all_seen=all(each.seen_by_me for each in shown)
    )


def _story_out(story: Story, owner: User, *, seen: bool, n_views: int | None) -> StoryOut:
    return StoryOut(
        id=story.id,
        owner=person_out(owner),
        caption=story.caption,
        width=story.width,
        height=story.height,
        images={str(size): f"{MEDIA}/stories/{story.id}/{size}.jpg" for size in SIZES},
        created_at=story.created_at,
        expires_at=story.expires_at,
        seen_by_me=seen,
        view_count=n_views,
    )
