"""Saved photos, beside who saved them: nobody else reads them."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import Index, UniqueConstraint
from sqlalchemy.orm import Mapped

from app.models import Base
from shardkit import Sharded

__all__ = ["Save"]


class Save(Sharded, Base):
    """Somebody keeps a photo; the ids are in the order of saving."""

    __tablename__ = "saves"
    __shard_key__ = "user_id"
    __table_args__ = (
        UniqueConstraint("user_id", "photo_id", name="saves_user_id_photo_id_key"),
        Index("saves_photo_id_idx", "photo_id"),
    )

    user_id: Mapped[int]
    photo_id: Mapped[int]
    saved_at: Mapped[dt.datetime]
