"""The two sides of a follow, each beside the person it is read for."""

from __future__ import annotations

import datetime as dt

from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base
from shardkit import Sharded

__all__ = ["Follow", "Follower"]


class Follow(Sharded, Base):
    """Whom a person follows: the forward edge, on the follower's shard; this one is the truth."""

    __tablename__ = "follows"
    __shard_key__ = "follower_id"

    follower_id: Mapped[int] = mapped_column(primary_key=True)
    followee_id: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[dt.datetime]


class Follower(Sharded, Base):
    """Who follows a person: the inverse edge, on the followee's shard; written second."""

    __tablename__ = "followers"
    __shard_key__ = "followee_id"

    followee_id: Mapped[int] = mapped_column(primary_key=True)
    follower_id: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[dt.datetime]
