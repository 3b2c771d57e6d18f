"""Stories beside their owner, and who has seen them beside the story."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import Index, String, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base
from shardkit import Sharded

__all__ = ["LIFE", "Story", "StoryView"]

LIFE = dt.timedelta(hours=24)
"""How long a story is there."""


class Story(Sharded, Base):
    """A picture for a day.

    *Invariant:* nobody is shown it at `expires_at` or later: every read compares, and no read
    depends on the worker that removes the row some time afterwards.

    Attributes:
        blob_key: of its bytes; never told to anybody, since bytes know no time.
    """

    __tablename__ = "stories"
    __shard_key__ = "owner_id"
    __table_args__ = (
        Index("stories_owner_id_id_idx", "owner_id", text("id DESC")),
        Index("stories_expires_at_idx", "expires_at"),
    )

    owner_id: Mapped[int]
    caption: Mapped[str] = mapped_column(String(500))
    width: Mapped[int]
    height: Mapped[int]
    blob_key: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[dt.datetime]
    expires_at: Mapped[dt.datetime]


class StoryView(Sharded, Base):
    """Somebody has seen a story; the ids are in the order of seeing."""

    __tablename__ = "story_views"
    __shard_key__ = "story_id"
    __table_args__ = (
        UniqueConstraint("story_id", "viewer_id", name="story_views_story_id_viewer_id_key"),
        Index("story_views_viewer_id_idx", "viewer_id"),
    )

    story_id: Mapped[int]
    viewer_id: Mapped[int]
    seen_at: Mapped[dt.datetime]
