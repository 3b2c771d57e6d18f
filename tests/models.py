"""The models that tests of the library share: users, their photos, likes on photos, names."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from typing import Any

from sqlalchemy import JSON, DateTime, Enum, ForeignKey, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from shardkit import (
    CachedCount,
    CachedList,
    Directory,
    Range,
    Reference,
    Sharded,
    unique_lookup,
)


class Base(DeclarativeBase):
    """What every model of the tests derives from."""


class User(Sharded, Base):
    """Placed by its own id."""

    __tablename__ = "users"
    name: Mapped[str]
    photos: Mapped[list[Photo]] = relationship(back_populates="owner")


class Photo(Sharded, Base):
    """Lives with its owner."""

    __tablename__ = "photos"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int] = mapped_column(ForeignKey(User.id))
    caption: Mapped[str] = mapped_column(default="")
    rank: Mapped[int | None]
    taken_at: Mapped[dt.datetime | None] = mapped_column(server_default=func.now())
    owner: Mapped[User] = relationship(back_populates="photos")
    likes: Mapped[list[Like]] = relationship()


class Like(Sharded, Base):
    """Lives with the photo; maps its own primary key."""

    __tablename__ = "likes"
    __shard_key__ = "photo_id"
    photo_id: Mapped[int] = mapped_column(ForeignKey(Photo.id), primary_key=True)
    user_id: Mapped[int] = mapped_column(primary_key=True)
    fan: Mapped[User] = relationship(primaryjoin="foreign(Like.user_id) == User.id", viewonly=True)


class Handle(Sharded, Base):
    """Placed by the hash of a text."""

    __tablename__ = "handles"
    __shard_key__ = "name"
    __shard_strategy__ = "hash"
    name: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[int]


class Reading(Sharded, Base):
    """Placed by ranges of numbers."""

    __tablename__ = "readings"
    __shard_key__ = "meter"
    __shard_strategy__ = Range([(1_000, 3), (2_000, 40)])
    meter: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]


class Tenant(Sharded, Base):
    """Placed by a directory."""

    __tablename__ = "tenants"
    __shard_key__ = "name"
    __shard_strategy__ = Directory("tenants")
    name: Mapped[str] = mapped_column(primary_key=True)
    plan: Mapped[str] = mapped_column(default="free")


class Device(Sharded, Base):
    """Placed by the hash of a UUID, beside a minted id."""

    __tablename__ = "devices"
    __shard_key__ = "serial"
    __shard_strategy__ = "hash"
    serial: Mapped[uuid.UUID]


class Account(Sharded, Base):
    """Has a name and an address that nobody else has."""

    __tablename__ = "accounts"
    __unique__ = (unique_lookup("name", fold="casefold"), unique_lookup("email", relayed=True))
    name: Mapped[str]
    email: Mapped[str | None]
    bio: Mapped[str] = mapped_column(default="")


class Mood(enum.Enum):
    """How a profile feels."""

    GOOD = "g"
    BAD = "b"


class Profile(Sharded, Base):
    """Cached."""

    __tablename__ = "profiles"
    __cache_ttl__ = 300.0
    name: Mapped[str]
    mood: Mapped[Mood | None] = mapped_column(Enum(Mood, native_enum=False))
    seen_at: Mapped[dt.datetime | None] = mapped_column(DateTime(timezone=True))
    data: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    essay: Mapped[str] = mapped_column(default="", deferred=True)


class Post(Sharded, Base):
    """Cached, and lives with its owner; somebody elsewhere may have reviewed it."""

    __tablename__ = "posts"
    __shard_key__ = "owner_id"
    __cache_ttl__ = 60.0
    owner_id: Mapped[int]
    reviewer_id: Mapped[int | None]
    text: Mapped[str] = mapped_column(default="")
    owner: Mapped[Profile] = relationship(
        primaryjoin="foreign(Post.owner_id) == Profile.id", viewonly=True
    )
    reviewer: Mapped[Profile | None] = relationship(
        primaryjoin="foreign(Post.reviewer_id) == Profile.id", viewonly=True
    )


class Track(Sharded, Base):
    """Cached, and so are lists and counts of those of one owner, and of one album."""

    __tablename__ = "tracks"
    __shard_key__ = "owner_id"
    __cache_ttl__ = 60.0
    owner_id: Mapped[int]
    album: Mapped[int | None]
    rank: Mapped[int | None]
    title: Mapped[str] = mapped_column(default="")


class Play(Sharded, Base):
    """Who plays a track; not cached, but counted."""

    __tablename__ = "plays"
    __shard_key__ = "track_id"
    track_id: Mapped[int] = mapped_column(
        ForeignKey(Track.id, ondelete="CASCADE"), primary_key=True
    )
    user_id: Mapped[int] = mapped_column(primary_key=True)
    times: Mapped[int] = mapped_column(default=1)


newest = CachedList(Track.owner_id, order_by=Track.id.desc(), limit=5)
best = CachedList(
    Track.owner_id, Track.album, order_by=Track.rank.desc().nulls_last(), of=Track.title, limit=3
)
n_tracks = CachedCount(Track.owner_id)
n_plays = CachedCount(Play.track_id)
players = CachedList(Play.track_id, order_by=Play.user_id, limit=10)


class Country(Reference, Base):
    """On every physical shard."""

    __tablename__ = "countries"
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
