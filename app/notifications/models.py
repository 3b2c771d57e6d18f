"""What happened to a person, numbered for the person, on the person's shard."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base
from shardkit import Sharded

__all__ = ["Inbox", "Notification"]


class Inbox(Sharded, Base):
    """The counters of a person's notifications.

    *Invariant:* numbers are given under a lock on this row that lasts until COMMIT. So who has
    read up to a number has missed none below it, which ids do not promise.

    Attributes:
        last_seq: the highest number that was given.
        read_seq: up to which the person has read.
    """

    __tablename__ = "inboxes"
    __shard_key__ = "user_id"

    user_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    last_seq: Mapped[int] = mapped_column(default=0)
    read_seq: Mapped[int] = mapped_column(default=0)


class Notification(Sharded, Base):
    """One thing that happened to a person.

    Attributes:
        user_id: who is told.
        seq: its number among the person's.
        kind: a `NoticeKind`.
        actor_id: who did it.
        photo_id: to which photo, if to any.
        comment_id: by which comment, if by any.
        source: what tells it from all others of the person; the same thing is told once.
        group_key: those of one key are shown as one.
    """

    __tablename__ = "notifications"
    __shard_key__ = "user_id"
    __table_args__ = (
        UniqueConstraint("user_id", "source", name="notifications_user_id_source_key"),
        Index("notifications_photo_id_idx", "photo_id"),
        Index("notifications_actor_id_idx", "actor_id"),
    )

    user_id: Mapped[int] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(12))
    actor_id: Mapped[int]
    photo_id: Mapped[int | None]
    comment_id: Mapped[int | None]
    source: Mapped[str] = mapped_column(String(80))
    group_key: Mapped[str] = mapped_column(String(80))
    created_at: Mapped[dt.datetime]
