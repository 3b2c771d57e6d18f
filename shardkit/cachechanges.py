"""What a writer's transaction knows of the cached rows that it changes: values, no I/O.

Called by `shardkit.cachewrites`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from sqlalchemy import ForeignKey, Table
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.orm.attributes import instance_state

from shardkit.cacheable import is_cached
from shardkit.derived import is_watched, watched_columns

if TYPE_CHECKING:  # the `cache` extra
    from shardkit.cached import CachePlan

__all__ = [
    "ANY_VERSION",
    "NEW",
    "Change",
    "Row",
    "concerned",
    "concerns",
    "gone",
    "now",
    "reaches",
    "watched_attributes",
]

NEW: Final = -1
"""Version of a row before it is inserted."""

ANY_VERSION: Final = sys.maxsize
"""Of a change whose version is not known: whatever is there is older. Its marker carries no row
and is followed by none, so that others may take it for a later writer's."""


class Row(NamedTuple):
    """A row, by what names its entry: its logical shard, its table and its primary key."""

    shard: int
    table: str
    identity: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """What is known of a changed row.

    Attributes:
        version: it has now; `ANY_VERSION` when that is not known.
        payload: it as it is now, encoded; None to leave no entry.
        floor: version that readers of this process have to see at least.
        replaces: version it had before the transaction; None when that is not known.
        plan: of its class; None when a statement changed it.
    """

    version: int
    payload: bytes | None = None
    floor: int = 0
    replaces: int | None = None
    plan: CachePlan | None = None


def concerned(*groups: Iterable[Any]) -> list[Any]:
    """Return the objects whose rows are cached."""
    return [
        obj
        for group in groups
        for obj in group
        if is_cached(instance_state(obj).mapper.local_table)
    ]


def gone(before: int | None) -> Change:
    """Return the change of a row that is there no more."""
    return Change(ANY_VERSION, floor=0 if before is None or before < 0 else before + 1)


def now(cache: Any, state: InstanceState[Any], before: int | None, after: Any) -> Change:
    """Return the change of a row that was written.

    What it is now is known where its statement has returned its version: then it has returned
    all that it did not set.
    """
    if before is None or after is None or after == before:
        return Change(ANY_VERSION, floor=max(after or 0, 0))
    plan = cache.plan(state.mapper)
    values = state.dict
    if before == NEW:  # new: what was left out is null
        values = {**_nulls(state.mapper), **values}
    image = plan.image(values)
    payload = None if image is None else plan.encode(image)
    return Change(after, payload, after, before if before > 0 else None, plan)


@lru_cache(maxsize=4096)
def _nulls(mapper: Mapper[Any]) -> dict[str, None]:
    """Return the attributes whose columns are null unless a value is given."""
    return {
        key: None
        for key, column in mapper.columns.items()
        if column.nullable and column.server_default is None and column.default is None
    }


@lru_cache(maxsize=4096)
def watched_attributes(mapper: Mapper[Any]) -> frozenset[str]:
    """Return the attributes of the columns on which lists and counts depend."""
    columns = watched_columns(cast("Table", mapper.local_table))
    return frozenset(key for key, c in mapper.columns.items() if c.name in columns)


def concerns(table: Any) -> bool:
    """Tell whether a statement that changes a table may change what is cached."""
    return is_cached(table) or is_watched(table) or reaches(table)


@lru_cache(maxsize=4096)
def reaches(table: Any) -> bool:
    """Tell whether the server itself changes cached rows when rows of a table go or change."""
    seen: set[Any] = set()
    waiting = [table] if isinstance(table, Table) else []
    while waiting:
        parent = waiting.pop()
        seen.add(parent)
        for child in parent.metadata.tables.values():
            if child not in seen and any(_acts(key, parent) for key in child.foreign_keys):
                if is_cached(child) or is_watched(child):
                    return True
                waiting.append(child)
    return False


def _acts(key: ForeignKey, parent: Table) -> bool:
    actions = {(action or "no action").lower() for action in (key.ondelete, key.onupdate)}
    return not actions <= {"no action", "restrict"} and key.references(parent)
