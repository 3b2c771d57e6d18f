"""Exports that were asked for, and accounts that are being removed."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from app.models import Base
from shardkit import Sharded, after_insert

__all__ = ["ACCOUNT_DELETED", "EXPORT_REQUESTED", "Erasure", "Export"]

ACCOUNT_DELETED = "account.deleted"
"""Topic of the events that say whose traces are to be removed."""

EXPORT_REQUESTED = "export.requested"
"""Topic of the events that say which export is to be made."""


class Export(Sharded, Base):
    """A copy of what the service keeps of a person, for the person; a file once it is ready.

    Attributes:
        n_bytes: length of the file; None while it is being made.
    """

    __tablename__ = "exports"
    __shard_key__ = "user_id"
    __table_args__ = (Index("exports_user_id_idx", "user_id"),)
    __events__ = (
        after_insert(
            EXPORT_REQUESTED,
            lambda export: {"id": str(export.id), "user_id": str(export.user_id)},
            key="user_id",
        ),
    )

    user_id: Mapped[int]
    created_at: Mapped[dt.datetime]
    expires_at: Mapped[dt.datetime]
    n_bytes: Mapped[int | None]


class Erasure(Sharded, Base):
    """An account that is being removed; the row goes last, and with it all that is known."""

    __tablename__ = "erasures"
    __shard_key__ = "user_id"
    __events__ = (
        after_insert(
            ACCOUNT_DELETED, lambda erasure: {"user_id": str(erasure.user_id)}, key="user_id"
        ),
    )

    user_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    created_at: Mapped[dt.datetime]
