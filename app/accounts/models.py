"""Users and their log-ins."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import Index, LargeBinary, String, false
from sqlalchemy.orm import Mapped, mapped_column

from app.happenings import PERSON_CHANGED
from app.models import Base
from shardkit import Sharded, after_insert, unique_lookup

__all__ = ["LoginSession", "User"]


class User(Sharded, Base):
    """A person; the id places the row, and everything of the person beside it.

    *Invariant:* no two users of the whole cluster have one username, in its canonical form.
    Each count changes in the transaction that inserts or deletes the row it counts, under a lock
    on this row: photos, forward edges (`following_count`) and inverse edges (`follower_count`).
    Photos and edges of a private person are for who follows them and was let to.
    The hash of the password is loaded only for who asks for it, and never cached.
    """

    __tablename__ = "users"
    __cache_ttl__ = 300.0
    __unique__ = (unique_lookup("username", fold="casefold", relayed=True),)
    __events__ = (after_insert(PERSON_CHANGED, lambda user: {"user_id": str(user.id)}, key="id"),)

    username: Mapped[str] = mapped_column(String(30), index=True)
    display_name: Mapped[str] = mapped_column(String(60))
    bio: Mapped[str] = mapped_column(String(300), default="")
    password_hash: Mapped[str] = mapped_column(String(200), deferred=True)
    photo_count: Mapped[int] = mapped_column(default=0, server_default="0")
    follower_count: Mapped[int] = mapped_column(default=0, server_default="0")
    following_count: Mapped[int] = mapped_column(default=0, server_default="0")
    is_private: Mapped[bool] = mapped_column(default=False, server_default=false())
    is_feed_ranked: Mapped[bool] = mapped_column(default=False, server_default=false())
    created_at: Mapped[dt.datetime]


class LoginSession(Sharded, Base):
    """One log-in of one browser or program, beside its user; only a hash of its secret.

    Attributes:
        client: what the browser or program calls itself.
    """

    __tablename__ = "login_sessions"
    __shard_key__ = "user_id"
    __table_args__ = (Index("login_sessions_user_id_idx", "user_id"),)

    user_id: Mapped[int]
    token_hash: Mapped[bytes] = mapped_column(LargeBinary(32))
    client: Mapped[str] = mapped_column(String(200), default="", server_default="")
    created_at: Mapped[dt.datetime]
    last_seen_at: Mapped[dt.datetime]
    expires_at: Mapped[dt.datetime]
