"""Tells whether a commit is one INSERT and nothing else.

PostgreSQL commits a single statement as a whole: one INSERT alone needs neither BEGIN nor COMMIT
around it, which are two of its three round trips. `WriteSession.commit` asks here before it
flushes. Pure; a doubt is a no, which costs the two round trips and nothing else.
Source: docs/architecture.md, "A commit of one object".
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sqlalchemy.orm import Mapper, Session

from shardkit.uniques import lookups_of

__all__ = ["is_lone_insert"]


def is_lone_insert(session: Session) -> bool:
    """Tell whether committing a session now would send one INSERT, and nothing else that writes.

    The session holds no connection yet, which the caller knows. Then the unit of work is one new
    object; it is one row of one table; nothing is related to it, so that no other row is touched;
    and nothing of the program runs between the flush and its end that could send a statement.
    """
    if len(session._new) != 1 or session._deleted or session.identity_map.check_modified():
        return False
    (state,) = session._new
    mapper: Mapper[Any] = state.mapper
    related = _related(mapper)
    return (
        related is not None
        and related.isdisjoint(state.dict)
        and not session.in_nested_transaction()
        and not _listens(session)
        and not mapper.dispatch.before_insert
        and not mapper.dispatch.after_insert
        and not state.manager.dispatch.refresh_flush
    )


def _listens(session: Session) -> bool:
    """Tell whether listeners of the program may use the connection while a session commits.

    shardkit's own listeners add no statement, but for classes with unique columns, and for events,
    of which there are none, as the caller knows.
    """
    events: Any = session.dispatch
    return bool(
        len(events.before_flush) > 1
        or events.after_begin
        or len(events.after_flush) > 1
        or events.after_flush_postexec
        or len(events.after_transaction_create) > 1
        or len(events.before_commit) > 1
        or events.pending_to_persistent
    )


@lru_cache(maxsize=4096)
def _related(mapper: Mapper[Any]) -> frozenset[str] | None:
    """Return the relationships of a class, or None where an INSERT may take more statements.

    It may where a value is reserved first, where a row is in several tables, where a collection is
    kept elsewhere than in the object, and where a default is a function: it is given the
    connection.
    """
    if len(mapper.tables) != 1 or lookups_of(mapper.tables[0]):
        return None
    if mapper.tables[0].schema is not None:  # a reference table
        return None
    if any(relationship.lazy in ("dynamic", "write_only") for relationship in mapper.relationships):
        return None
    if any(c.default is not None and c.default.is_callable for c in mapper.tables[0].columns):
        return None
    return frozenset(relationship.key for relationship in mapper.relationships)
