"""Which relationships stay on one logical shard, so that a join may load them.

A lazy or select-in load of any relationship is a statement of its own and routes itself. A
joined load is part of its parent's statement, invisible in it, and would find nothing on other
shards: it is allowed only where the keys prove that both rows lie together.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from sqlalchemy import BinaryExpression, BooleanClauseList, Column, Table
from sqlalchemy.orm import Mapper, RelationshipProperty
from sqlalchemy.sql import operators
from sqlalchemy.sql.selectable import SelectBase
from sqlalchemy.sql.visitors import iterate

from shardkit.errors import UnsupportedStatementError
from shardkit.models import REFERENCE_SCHEMA, sharding_of
from shardkit.shapes import expressions_of

__all__ = ["is_colocated", "refuse_joined_loads", "relationships_set_key"]

_JOINED = ("lazy", "joined")


@lru_cache(maxsize=4096)
def is_colocated(relationship: RelationshipProperty[Any]) -> bool:
    """Tell whether the rows a relationship leads to always lie on the shard of its parent."""
    target = relationship.mapper.local_table
    if relationship.secondary is not None:
        return False
    if isinstance(target, Table) and target.schema == REFERENCE_SCHEMA:
        return True
    for condition in _conjuncts(relationship.primaryjoin):
        if not isinstance(condition, BinaryExpression) or condition.operator is not operators.eq:
            continue
        rules = []
        for column in (condition.left, condition.right):
            if not isinstance(column, Column):
                break
            table: Any = column.table
            sharding = sharding_of(table) if isinstance(table, Table) else None
            rules.append(sharding.placing.get(column.name) if sharding else None)
        if len(rules) == 2 and rules[0] is not None and rules[0] == rules[1]:
            return _reads_one_row_each(relationship)
    return False


def _conjuncts(condition: Any) -> Iterator[Any]:
    """Yield the conditions that a join condition needs all of."""
    if isinstance(condition, BooleanClauseList) and condition.operator is operators.and_:
        for part in condition.clauses:
            yield from _conjuncts(part)
    else:
        yield condition


def _reads_one_row_each(relationship: RelationshipProperty[Any]) -> bool:
    return not expressions_of(relationship.mapper) and not any(
        isinstance(part, SelectBase) for part in iterate(relationship.primaryjoin)
    )


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
    joined = [r for root in _mappers(statement, mapper) for r in _default_joins(root)]
    otherwise = set()
    for option in statement._with_options:
        for element in getattr(option, "context", ()):
            if _JOINED in (element.strategy or ()):
                path = [p for p in element.path.natural_path if isinstance(p, RelationshipProperty)]
                if not path:
                    raise UnsupportedStatementError(
                        "joinedload('*') may cross logical shards", hint="name the relationships"
                    )
                joined += [path[-1], *_default_joins(path[-1].mapper)]
            elif element.strategy and len(element.path.natural_path) == 2:
                otherwise.add(element.path.natural_path[-1])
    for relationship in joined:
        if relationship in otherwise:
            continue
        if several or not is_colocated(relationship):
            raise UnsupportedStatementError(
                f"a joined load of {relationship} cannot be answered exactly",
                hint="load it with selectinload()",
            )


def _mappers(statement: Any, first: Mapper[Any] | None) -> set[Mapper[Any]]:
    found = {
        entity.mapper
        for column in getattr(statement, "_raw_columns", ())
        if (entity := column._annotations.get("parententity")) is not None
    }
    return found if first is None else found | {first}


@lru_cache(maxsize=4096)
def _default_joins(mapper: Mapper[Any]) -> tuple[RelationshipProperty[Any], ...]:
    """Return what an entity joins unasked, and what that joins in turn."""
    found: dict[RelationshipProperty[Any], None] = {}
    mappers = [mapper]
    while mappers:
        for relationship in mappers.pop().relationships:
            if relationship.lazy in ("joined", False) and relationship not in found:
                found[relationship] = None
                mappers.append(relationship.mapper)
    return tuple(found)


@lru_cache(maxsize=4096)
def relationships_set_key(mapper: Mapper[Any]) -> bool:
    """Tell whether a flush may fill in the shard key of a class from a related object."""
    table = mapper.local_table
    sharding = sharding_of(table) if isinstance(table, Table) else None
    return sharding is not None and any(
        filled is sharding.key_column
        for other in mapper.registry.mappers
        for relationship in other.relationships
        for _, filled in relationship.synchronize_pairs
    )
