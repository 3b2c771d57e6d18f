"""The viewer's notifications: the list, how many are unread, and what came after a number.

Called by the API, the pages and the streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import aggregate_order_by

from app.accounts.models import User
from app.accounts.repository import AccountRepository
from app.accounts.service import Viewer, person_out
from app.database import Database, Request
from app.graph.privacy import hidden_among, seen_among
from app.notifications.models import Inbox, Notification
from app.notifications.notices import NoticeKind
from app.notifications.schemas import GroupOut, NotificationOut, UnreadOut
from app.paging import Page, cut
from app.partial import is_partial
from app.photos.repository import PhotoRepository
from app.photos.service import images_of
from shardkit import AsyncReadSession, AsyncWriteSession

__all__ = ["MOST_ACTORS", "News", "NotificationService", "told"]

MOST_ACTORS = 3
SMALL = "150"


@dataclass(frozen=True, slots=True)
class News:
    """What came after a number.

    Attributes:
        items: in order, some of them.
        last: the number up to which these are all there is.
        is_all: whether there is nothing beyond.
    """

    items: Sequence[NotificationOut]
    last: int
    is_all: bool


class NotificationService:
    """What the viewer is told.

    Args:
        database: the client's sessions.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(self, viewer: Viewer, before: int | None, n: int) -> Page[GroupOut]:
        """Return a page of the viewer's notifications, grouped, newest first."""
        async with self._database.reader() as session:
            inbox = await session.get(Inbox, viewer.id)
            read = 0 if inbox is None else inbox.read_seq
            rows = (await session.execute(_groups(viewer.id, before, n + 1))).all()
            shown, cursor = cut(rows, n, lambda row: row.seq)
            items = await _described(session, shown, viewer, read)
            return Page[GroupOut](items=items, next_cursor=cursor, partial=is_partial(session))

    async def unread(self, viewer: Viewer) -> UnreadOut:
        """Return how many notifications the viewer has not read."""
        async with self._database.reader() as session:
            return UnreadOut(unread=await _unread(session, viewer.id))

    async def read(self, viewer: Viewer, seq: int) -> UnreadOut:
        """Mark everything up to a number as read; what was read stays so."""

        async def work(session: AsyncWriteSession) -> int:
            inbox = await session.get(Inbox, viewer.id, with_for_update=True)
            if inbox is not None:  # nobody reads what there is not yet
                inbox.read_seq = max(inbox.read_seq, min(seq, inbox.last_seq))
                await session.flush()
            return await _unread(session, viewer.id)

        request = Request(viewer.id, ("read", seq))
        return UnreadOut(unread=await self._database.run(request, work, near=viewer.id))

    async def newest(self, user_id: int) -> int:
        """Return the highest number that was given to a person's notifications."""
        async with self._database.primary() as session:
            inbox = await session.get(Inbox, user_id)
            return 0 if inbox is None else inbox.last_seq

    async def since(self, user_id: int, seq: int, n: int) -> News:
        """Return up to `n` notifications of a person above a number, in order.

        From the primary: numbers are in the order of commit there, so nothing comes later below
        what this returns.
        """
        async with self._database.primary() as session:
            inbox = await session.get(Inbox, user_id)  # before the rows: never too far
            statement = select(Notification).where(
                Notification.user_id == user_id, Notification.seq > seq
            )
            rows = (await session.scalars(statement.order_by(Notification.seq).limit(n))).all()
            actors = await AccountRepository(session).users(row.actor_id for row in rows)
        last_given = 0 if inbox is None else inbox.last_seq
        is_all = len(rows) < n
        last = max(seq, last_given if is_all else 0, *(row.seq for row in rows), 0)
        items = [told(row, actors[row.actor_id]) for row in rows if row.actor_id in actors]
        return News(items, last, is_all)


def told(row: Notification, actor: User) -> NotificationOut:
    """Return a notification as it is told."""
    return NotificationOut(
        seq=row.seq,
        kind=NoticeKind(row.kind),
        actor=person_out(actor),
        photo_id=row.photo_id,
        comment_id=row.comment_id,
        created_at=row.created_at,
    )


def _groups(user_id: int, before: int | None, n: int) -> Any:
    """Select groups by their newest number; all rows are on one logical shard."""
    newest = func.max(Notification.seq)

    def in_order(column: Any) -> Any:
        return func.array_agg(aggregate_order_by(column, Notification.seq.desc()))

    statement = (
        select(
            newest.label("seq"),
            func.min(Notification.kind).label("kind"),
            func.count().label("count"),
            in_order(Notification.actor_id).label("actors"),
            func.max(Notification.photo_id).label("photo_id"),
            func.max(Notification.comment_id).label("comment_id"),
            func.max(Notification.created_at).label("created_at"),
        )
        .where(Notification.user_id == user_id)
        .group_by(Notification.group_key)
    )
    if before is not None:
        statement = statement.having(newest < before)
    return statement.order_by(newest.desc()).limit(n)


async def _unread(session: AsyncReadSession, user_id: int) -> int:
    read = select(Inbox.read_seq).where(Inbox.user_id == user_id)
    n = await session.scalar(
        select(func.count())
        .select_from(Notification)
        .where(
            Notification.user_id == user_id,
            Notification.seq > func.coalesce((await session.scalar(read)), 0),
        )
    )
    return n or 0


async def _described(
    session: AsyncReadSession, rows: Sequence[Any], viewer: Viewer, read: int
) -> list[GroupOut]:
    """Return groups with people and pictures; without people whom a block hides, or who left."""
    people = await AccountRepository(session).users(_first_actors(rows))
    hidden = await hidden_among(session, viewer.id, people)
    pictures = await _pictures(session, viewer, [row.photo_id for row in rows if row.photo_id])
    found = []
    for row in rows:
        ids = [each for each in dict.fromkeys(row.actors) if each in people and each not in hidden]
        if not ids or (row.photo_id is not None and row.photo_id not in pictures):
            continue
        found.append(
            GroupOut(
                seq=row.seq,
                kind=row.kind,
                count=len(set(row.actors)),
                actors=[person_out(people[each]) for each in ids[:MOST_ACTORS]],
                photo_id=row.photo_id,
                photo=pictures.get(row.photo_id),
                comment_id=row.comment_id,
                created_at=row.created_at,
                unread=row.seq > read,
            )
        )
    return found


def _first_actors(rows: Iterable[Any]) -> set[int]:
    """Return who is named: some more than are shown, for a block may hide one."""
    return {each for row in rows for each in list(dict.fromkeys(row.actors))[: 2 * MOST_ACTORS]}


async def _pictures(
    session: AsyncReadSession, viewer: Viewer, photo_ids: Sequence[int]
) -> Mapping[int, str]:
    photos = await PhotoRepository(session).by_ids(list(dict.fromkeys(photo_ids)))
    owners = await AccountRepository(session).users(photo.owner_id for photo in photos)
    seen = await seen_among(session, viewer.id, owners)
    return {
        photo.id: images_of(photo.blob_key)[str(SMALL)]
        for photo in photos
        if photo.owner_id in seen
    }
