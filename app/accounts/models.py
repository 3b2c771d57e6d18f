"""Users, the names that are theirs, and their log-ins."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base
from shardkit import Sharded

__all__ = ["Handle", "LoginSession", "User"]


class User(Sharded, Base):
    """A person; the id places the row, and everything of the person beside it.

    *Invariant:* `following_count` and `follower_count` change in the transaction that inserts
    or deletes the edge they count.
    """

    __tablename__ = "users"

    username: Mapped[str] = mapped_column(String(30))
    display_name: Mapped[str] = mapped_column(String(60))
    bio: Mapped[str] = mapped_column(String(300), default="")
    password_hash: Mapped[str] = mapped_column(String(200))
    photo_count: Mapped[int] = mapped_column(default=0)
    follower_count: Mapped[int] = mapped_column(default=0)
    following_count: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[dt.datetime]


class Handle(Sharded, Base):
    """Who a username belongs to; one row in the whole cluster, placed by the hash of the name.

    *Invariant:* written before the user's own row commits, so it may name a user who never
    came to be; it never fails to name one who did. See `app.accounts.handles`.
    """

    __tablename__ = "handles"
    __shard_key__ = "username"
    __shard_strategy__ = "hash"

    username: Mapped[str] = mapped_column(String(30), primary_key=True)
    user_id: Mapped[int]
    reserved_at: Mapped[dt.datetime]


class LoginSession(Sharded, Base):
    """One log-in of one browser or program, beside its user; only a hash of its secret."""

    __tablename__ = "login_sessions"
    __shard_key__ = "user_id"

    user_id: Mapped[int]
    token_hash: Mapped[bytes] = mapped_column(LargeBinary(32))
    created_at: Mapped[dt.datetime]
    last_seen_at: Mapped[dt.datetime]
    expires_at: Mapped[dt.datetime]
