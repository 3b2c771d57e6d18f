"""Photos beside their owner, likes and comments beside their photo."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import Index, SmallInteger, String, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base
from shardkit import CachedList, Sharded, after_delete, after_insert

__all__ = [
    "LIKES_CHANGED",
    "PHOTO_ADDED",
    "PHOTO_DELETED",
    "Comment",
    "Like",
    "LikeSlot",
    "Photo",
    "Upload",
    "newest_of",
    "slots_of",
]

LIKES_CHANGED = "likes.changed"
"""Topic of the events that say that the likes of a photo have to be counted."""

PHOTO_ADDED = "photo.added"
"""Topic of the events that say that somebody has a new photo, in the order of each person."""

PHOTO_DELETED = "photo.deleted"
"""Topic of the events that say whose bytes are to be removed."""


class Photo(Sharded, Base):
    """A photo; its bytes are in the blob store under `blob_key`.

    *Invariant:* `comment_count` changes in the transaction that inserts or deletes a comment,
    under a lock on this row. `like_count` is what its slots added up to when the relay last looked.
    """

    __tablename__ = "photos"
    __shard_key__ = "owner_id"
    __cache_ttl__ = 300.0
    __events__ = (
        after_insert(
            PHOTO_ADDED,
            lambda photo: {"id": str(photo.id), "owner_id": str(photo.owner_id)},
            key="owner_id",
        ),
        after_delete(PHOTO_DELETED, ("blob_key",)),
    )
    __table_args__ = (Index("photos_owner_id_id_idx", "owner_id", text("id DESC")),)

    owner_id: Mapped[int]
    caption: Mapped[str] = mapped_column(String(2200))
    width: Mapped[int]
    height: Mapped[int]
    blob_key: Mapped[str] = mapped_column(String(32))
    has_webp: Mapped[bool] = mapped_column(default=False, server_default="false")
    like_count: Mapped[int] = mapped_column(default=0, server_default="0")
    comment_count: Mapped[int] = mapped_column(default=0, server_default="0")
    created_at: Mapped[dt.datetime]


class Like(Sharded, Base):
    """A person likes a photo; a photo's id carries its owner's shard, so the row lives there."""

    __tablename__ = "likes"
    __shard_key__ = "photo_id"

    photo_id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[dt.datetime]


class LikeSlot(Sharded, Base):
    """A part of the count of a photo's likes; `app.photos.likes` says who writes which.

    *Invariant:* the slots of a photo add up to its likes, in every committed state.
    """

    __tablename__ = "like_slots"
    __shard_key__ = "photo_id"

    photo_id: Mapped[int] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    n: Mapped[int]


class Comment(Sharded, Base):
    """What a person wrote under a photo, beside the photo.

    Attributes:
        parent_id: the comment that this answers, which answers none itself; None for others.
    """

    __tablename__ = "comments"
    __shard_key__ = "photo_id"
    __table_args__ = (Index("comments_photo_id_id_idx", "photo_id", "id"),)

    photo_id: Mapped[int]
    author_id: Mapped[int]
    parent_id: Mapped[int | None]
    body: Mapped[str] = mapped_column(String(1000))
    created_at: Mapped[dt.datetime]


class Upload(Sharded, Base):
    """An upload that takes longer than its client waits for: what has become of it.

    *Invariant:* `photo_id` is set in the transaction that inserts the photo.

    Attributes:
        photo_id: the photo, once it is there.
        problem_type: why there is none, as in a problem document.
        problem_detail: the same for people.
        expires_at: from then on nobody works on it any more, whatever became of who did.
    """

    __tablename__ = "uploads"
    __shard_key__ = "owner_id"
    __table_args__ = (Index("uploads_owner_id_idx", "owner_id"),)

    owner_id: Mapped[int]
    photo_id: Mapped[int | None]
    problem_type: Mapped[str] = mapped_column(String(100), default="", server_default="")
    problem_detail: Mapped[str] = mapped_column(String(500), default="", server_default="")
    created_at: Mapped[dt.datetime]
    expires_at: Mapped[dt.datetime]


newest_of = CachedList(Photo.owner_id, order_by=Photo.id.desc(), limit=120)
"""A person's newest photos, by id: the first page of a profile, of any size."""

slots_of = CachedList(LikeSlot.photo_id, order_by=LikeSlot.slot, of=LikeSlot.n, limit=64)
"""Parts of how many like a photo: their sum is it."""
