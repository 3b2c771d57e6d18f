"""Which relationships stay on one logical shard, so that a join may load them.

A lazy or select-in load of any relationship is a statement of its own and routes itself. A
joined load is part of its parent's statement, invisible in it, and would find nothing on other
shards: it is allowed only where the keys prove that both rows lie together.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from sqlalchemy import Table
from sqlalchemy.orm import Mapper, RelationshipProperty

from shardkit.errors import UnsupportedStatementError
from shardkit.models import REFERENCE_SCHEMA, sharding_of

__all__ = ["is_colocated", "refuse_joined_loads"]

_JOINED = ("lazy", "joined")


@lru_cache(maxsize=4096)
def is_colocated(relationship: RelationshipProperty[Any]) -> bool:
    """Tell whether the rows a relationship leads to always lie on the shard of its parent."""
    target = relationship.mapper.local_table
    if isinstance(target, Table) and target.schema == REFERENCE_SCHEMA:
        return True
    if relationship.secondary is not None:
        return False
    for local, remote in relationship.local_remote_pairs or ():
        rules = []
        for column in (local, remote):
            table = column.table
            sharding = sharding_of(table) if isinstance(table, Table) else None
            rules.append(sharding.placing.get(column.name) if sharding else None)
        if rules[0] is not None and rules[0] == rules[1]:
            return True
    return False


def refuse_joined_loads(statement: Any, mapper: Mapper[Any] | None, *, several: bool) -> None:
    """Refuse a statement whose joined loads could miss rows.

    Args:
        statement: a SELECT.
        mapper: of its first entity, if it has one.
        several: whether it runs on several logical shards; joined collections multiply rows,
            which LIMIT and the merge would then count.

    Raises:
        UnsupportedStatementError: it has one; the message names the relationship.
    """
    joined = [*_by_default(mapper)] if mapper is not None else []
    for option in statement._with_options:
        for element in getattr(option, "context", ()):
            if _JOINED in (element.strategy or ()):
                path = [p for p in element.path.natural_path if isinstance(p, RelationshipProperty)]
                if not path:
                    raise UnsupportedStatementError(
                        "joinedload('*') may cross logical shards", hint="name the relationships"
                    )
                joined.append(path[-1])
    for relationship in joined:
        if several or not is_colocated(relationship):
            raise UnsupportedStatementError(
                f"a joined load of {relationship} cannot be answered exactly",
                hint="load it with selectinload()",
            )


@lru_cache(maxsize=4096)
def _default_joins(mapper: Mapper[Any]) -> tuple[RelationshipProperty[Any], ...]:
    return tuple(r for r in mapper.relationships if r.lazy in ("joined", False))


def _by_default(mapper: Mapper[Any]) -> Iterator[RelationshipProperty[Any]]:
    yield from _default_joins(mapper)
