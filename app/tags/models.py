"""Which photos have a tag, beside the photos, and how many have it, beside the tag."""

from __future__ import annotations

from sqlalchemy import ARRAY, Index, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base
from app.tags.parser import MAX_TAG
from shardkit import Sharded

__all__ = ["PhotoTag", "Tag"]


class PhotoTag(Sharded, Base):
    """A photo has a tag, for its caption or for a comment of its owner.

    Attributes:
        photo_id: the photo, whose shard this is on.
        tag: the tag in its canonical form.
        source_id: id of the photo or of the comment that says so.
    """

    __tablename__ = "photo_tags"
    __shard_key__ = "photo_id"
    __table_args__ = (Index("photo_tags_tag_photo_id_idx", "tag", text("photo_id DESC")),)

    photo_id: Mapped[int] = mapped_column(primary_key=True)
    tag: Mapped[str] = mapped_column(String(MAX_TAG, collation="C"), primary_key=True)
    source_id: Mapped[int] = mapped_column(primary_key=True)


class Tag(Sharded, Base):
    """A tag that photos have, on the shard that its name's hash names; written by the relay.

    Attributes:
        name: the tag in its canonical form.
        photo_count: how many photos have it.
        grams: the trigrams of the name.
    """

    __tablename__ = "tags"
    __shard_key__ = "name"
    __shard_strategy__ = "hash"
    __table_args__ = (
        Index("tags_grams_idx", "grams", postgresql_using="gin"),
        Index("tags_photo_count_idx", text("photo_count DESC")),
    )

    name: Mapped[str] = mapped_column(String(MAX_TAG, collation="C"), primary_key=True)
    photo_count: Mapped[int]
    grams: Mapped[list[str]] = mapped_column(ARRAY(Text))
