"""Splits the key lists of a statement, so that each logical shard is asked for its own keys.

`owner_id IN (…)` with keys of many shards becomes `owner_id = ANY (:list)`: the same text for any
number of keys, which servers can keep prepared, with a list of its own for every shard. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from sqlalchemy import (
    ARRAY,
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Column,
    Delete,
    Select,
    Tuple,
    Update,
    and_,
    any_,
    bindparam,
    func,
    select,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import ColumnElement

from shardkit.keys import checked
from shardkit.router import Router
from shardkit.shapes import base_sharding, listed_by_any, tuples_of
from shardkit.statements import Params
from shardkit.strategies import Rule

__all__ = ["KeyLists", "split"]

_NAME: Final = "shardkit_keys_{}"

S = TypeVar("S", Select[Any], Update, Delete)

Values = Mapping[int, list[Any]]
"""Keys by the logical shard they name."""


@dataclass(frozen=True, slots=True)
class KeyLists:
    """The key lists of one statement.

    Attributes:
        values: keys by logical shard, by name of the parameter.
    """

    values: Mapping[str, Values] = field(default_factory=dict)

    def text(self, branch: str, logical_shard: int) -> str:
        """Return the SQL of a branch with the parameters of one logical shard."""
        for name in self.values:
            branch = branch.replace(f"%({name})s", f"%({name}_{logical_shard})s")
        return branch

    def of(self, logical_shard: int) -> dict[str, list[Any]]:
        """Return the parameters of the statement that runs on one logical shard alone."""
        return {name: values.get(logical_shard, []) for name, values in self.values.items()}

    def parameters(self, logical_shards: tuple[int, ...]) -> dict[str, list[Any]]:
        """Return the parameters that the branches of these logical shards name."""
        return {
            f"{name}_{shard}": values.get(shard, [])
            for name, values in self.values.items()
            for shard in logical_shards
        }


def _rule(column: Any) -> Rule | None:
    """Return how the values of a column place its rows, or None when they do not."""
    sharding = base_sharding(column.table) if isinstance(column, Column) else None
    return sharding.placing.get(column.name) if sharding else None


def split(statement: S, params: Params, router: Router, *, first: int = 0) -> tuple[S, KeyLists]:
    """Return the statement with split key lists, and the lists.

    A condition that every row meets and that compares a placing column with a list of values is
    split: the rows of a logical shard can only match keys that name it. Others stay as they are.

    Args:
        statement: what is asked.
        params: the values passed with it.
        router: places the keys.
        first: number of the first list, when the statement stands inside another one.

    Raises:
        InvalidShardKeyError: a key cannot place a row.
    """
    lists: dict[str, Values] = {}

    def rewritten(clause: Any) -> Any:
        if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_:
            return and_(*(rewritten(part) for part in clause.clauses))
        if not isinstance(clause, BinaryExpression):
            return clause
        column, parameter = clause.left, clause.right
        if (listed := listed_by_any(clause)) is not None:
            parameter = listed
        elif clause.operator is not operators.in_op:
            return clause
        if not isinstance(parameter, BindParameter):
            return clause
        columns = list(column.clauses) if isinstance(column, Tuple) else [column]
        place = next((i for i, c in enumerate(columns) if _rule(c) is not None), None)
        if place is None:
            return clause
        rule = _rule(columns[place])
        assert rule is not None, "it places rows"
        given = params if isinstance(params, Mapping) else {}
        values = given.get(parameter.key, parameter.effective_value) or ()
        rows = tuples_of(column, values) if isinstance(column, Tuple) else [(v,) for v in values]
        by_shard: dict[int, list[Any]] = {}
        for each in rows:
            key = checked(rule.key_type, each[place])  # an array has values of one type
            sent = list(each)
            sent[place] = key
            by_shard.setdefault(router.shard(rule, key), []).append(sent)
        binds = []
        for i, part in enumerate(columns):
            name = _NAME.format(first + len(lists))
            lists[name] = {shard: [row[i] for row in mine] for shard, mine in by_shard.items()}
            binds.append(bindparam(name, [], type_=ARRAY(part.type)))
        if not isinstance(column, Tuple):
            return column == any_(binds[0])
        return column.in_(select(*(func.unnest(bind) for bind in binds)))

    criteria: list[ColumnElement[bool]] = [rewritten(c) for c in statement._where_criteria]
    if not lists:
        return statement, KeyLists()
    split_statement = statement._generate()
    split_statement._where_criteria = tuple(criteria)
    return split_statement, KeyLists(lists)
