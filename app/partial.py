"""Reads of several servers of which some may not answer, and the note that rows are missing.

Used by repositories for lists that are worth something also when they are not whole; a page made
of them says so. Writers never read like this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import Select

from shardkit import AsyncReadSession, CachedCount, all_shards, deadline
from shardkit.errors import GatherError, UnavailableError

__all__ = ["FAILED", "PATIENCE", "answered", "answered_or_none", "counted", "is_partial"]

K = TypeVar("K")

PATIENCE: Final = 1.5
"""Seconds that servers have to give their part: a list does not wait for one that is frozen."""

FAILED: Final = (GatherError, UnavailableError)
"""What is raised where servers do not answer."""

_KEY: Final = "app_partial"


async def answered(session: AsyncReadSession, statement: Select[Any]) -> Sequence[Any]:
    """Return the first column of the rows of every server that answers.

    Args:
        session: a reader.
        statement: an ordinary one.

    Raises:
        UnavailableError: there is one server to ask, and it does not answer (retryable).
        GatherError: none of them does (retryable).
    """
    with deadline(PATIENCE):
        rows = (await session.scalars(statement.options(all_shards(partial=True)))).all()
    if session.failures:
        session.info[_KEY] = True
    return rows


async def answered_or_none(session: AsyncReadSession, statement: Select[Any]) -> Sequence[Any]:
    """Return what `answered` does; no rows when no server answers."""
    try:
        return await answered(session, statement)
    except FAILED:
        session.info[_KEY] = True
        return ()


async def counted(
    session: AsyncReadSession, count: CachedCount, kept: Mapping[K, int]
) -> Mapping[K, int]:
    """Return counts by key; those that are kept in rows where servers do not answer.

    Args:
        session: a reader.
        count: what is counted.
        kept: the same counts as rows have them, by key.
    """
    if not kept or is_partial(session):
        return kept
    try:
        with deadline(PATIENCE):
            return await session.cached_many(count, kept)
    except FAILED:
        return kept


def is_partial(session: AsyncReadSession) -> bool:
    """Tell whether something was missing from what this session has read."""
    return bool(session.info.get(_KEY))
