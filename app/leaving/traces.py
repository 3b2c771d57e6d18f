"""Where a person's id stands in tables: all of them, found from the models themselves.

A column is one of a person if its name is in `PEOPLE`. `tests/app/test_leaving.py` fails for a
column of ids whose name is in neither list, so no new table is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, or_
from sqlalchemy.orm import Mapper

from app.tables import Base

__all__ = ["OF_OTHERS", "OTHERS", "PEOPLE", "SECRETS", "Trace", "traces"]

PEOPLE: Final = frozenset(
    {"owner_id", "user_id", "author_id", "actor_id", "viewer_id", "id1", "id2"}
)
"""Names of columns that hold the id of a person."""

OTHERS: Final = frozenset(
    {
        *("id", "photo_id", "comment_id", "parent_id", "story_id", "source_id", "version"),
        *("width", "height", "n_bytes", "n", "at", "seq", "last_seq", "read_seq"),
        *("photo_count", "follower_count", "following_count", "like_count", "comment_count"),
    }
)
"""Names of columns of whole numbers that hold something else."""

OF_OTHERS: Final = frozenset({"id2", "actor_id"})
"""Those of them in rows that belong to somebody else: who blocks a person is not the person's."""

SECRETS: Final = frozenset({"password_hash", "token_hash", "version", "blob_key", "grams"})
"""Columns that are nobody's to read: what proves something, and what only machines use."""


class Trace(NamedTuple):
    """A table with rows of people.

    Attributes:
        entity: its class.
        key: attribute that places its rows.
        people: attributes with the id of a person.
        blob: attribute with the key of a picture, or None.
    """

    entity: Any
    key: Any
    people: Sequence[Any]
    blob: Any

    def of(self, user_id: int) -> ColumnElement[bool]:
        """Return the condition for the rows that name a person."""
        return or_(*(column == user_id for column in self.people))

    def own(self, user_id: int) -> ColumnElement[bool] | None:
        """Return the condition for the rows that are a person's; None where none are."""
        mine = [column for column in self.people if column.key not in OF_OTHERS]
        return or_(*(column == user_id for column in mine)) if mine else None


def traces() -> Sequence[Trace]:
    """Return every table that has rows of people, by name."""
    found = []
    mappers: Sequence[Mapper[Any]] = sorted(
        Base.registry.mappers, key=lambda mapper: str(mapper.local_table)
    )
    for mapper in mappers:
        entity = mapper.class_
        names = [column.key for column in mapper.column_attrs if column.key in PEOPLE]
        if entity.__tablename__ == "users":
            names = ["id"]
        if names:
            key = getattr(entity, "__shard_key__", None) or "id"
            blob = getattr(entity, "blob_key", None)
            people = [getattr(entity, name) for name in names]
            found.append(Trace(entity, getattr(entity, key), people, blob))
    return found
