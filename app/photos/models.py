"""Photos beside their owner, likes and comments beside their photo."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import Index, String, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base
from shardkit import CachedCount, CachedList, Sharded

__all__ = ["Comment", "Like", "Photo", "likes_of", "newest_of"]


class Photo(Sharded, Base):
    """A photo; its bytes are in the blob store under `blob_key`.

    *Invariant:* `like_count` and `comment_count` change in the transaction that inserts or
    deletes the row they count, under a lock on this row.
    """

    __tablename__ = "photos"
    __shard_key__ = "owner_id"
    __cache_ttl__ = 300.0
    __table_args__ = (Index("photos_owner_id_id_idx", "owner_id", text("id DESC")),)

    owner_id: Mapped[int]
    caption: Mapped[str] = mapped_column(String(2200))
    width: Mapped[int]
    height: Mapped[int]
    blob_key: Mapped[str] = mapped_column(String(32))
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


newest_of = CachedList(Photo.owner_id, order_by=Photo.id.desc(), limit=120)
"""A person's newest photos, by id: the first page of a profile, of any size."""

likes_of = CachedCount(Like.photo_id)
"""How many like a photo."""
