"""Finds the logical shards a statement concerns.

`shards_of` answers with the logical shards whose rows a statement can touch, or None for all of
them, and raises when rows of different logical shards would have to meet. It reads the
expression tree and the bound values and never compiles or runs anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BindParameter, Insert, TextClause, Update, select
from sqlalchemy.orm import LoaderCriteriaOption, UserDefinedOption
from sqlalchemy.sql.selectable import SelectBase
from sqlalchemy.sql.visitors import ExternallyTraversible, iterate

from shardkit.confinements import value_of
from shardkit.errors import (
    InvalidShardKeyError,
    NoShardKeyError,
    ShardKeyChangeError,
    UnsupportedStatementError,
)
from shardkit.models import Sharding
from shardkit.router import Router
from shardkit.shapes import base_sharding
from shardkit.walk import Walk

__all__ = [
    "AllShards",
    "Limits",
    "Params",
    "all_shards",
    "limits_of",
    "shards_of",
    "shards_of_rows",
]

_LONGEST_TIMEOUT = 2_147_483
"""Seconds; PostgreSQL keeps milliseconds in 32 bits."""

Params = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
"""Values passed beside a statement: none, one set, or many."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a statement may go; see `all_shards`."""

    partial: bool = False
    max_rows: int | None = None
    max_shards: int | None = None
    timeout: float | None = None


class AllShards(UserDefinedOption):
    """Says that a statement may go to every logical shard; made by `all_shards`.

    Attributes:
        payload: its `Limits`.
    """

    payload: Limits


def all_shards(
    *,
    partial: bool = False,
    max_rows: int | None = None,
    max_shards: int | None = None,
    timeout: float | None = None,
) -> AllShards:
    """Return the option that allows a statement without a shard key, within limits.

    The limits hold for the statement however many logical shards it goes to.

    Args:
        partial: whether the rows of the servers that answer are enough when others do not. Then
            `session.failures` says which are missing; a reader only.
        max_rows: rows fetched from all servers together, before they are merged; 1 or more. None
            for the cluster's own limit, `Cluster(max_rows=…)`. What
            `yield_per` streams is not held, and not counted.
        max_shards: logical shards asked; 1 or more. None for any number.
        timeout: seconds the statement may run on each server, above 0; the server enforces it.
            None for the server's own setting.

    Raises:
        ValueError: a limit is out of range, or the timeout not finite.

    Example:
        >>> from sqlalchemy import select
        >>> statement = select(Photo).order_by(Photo.id.desc()).limit(20)  # doctest: +SKIP
        >>> session.scalars(statement.options(all_shards()))  # doctest: +SKIP
    """
    counts: dict[str, Any] = {"max_rows": max_rows, "max_shards": max_shards}
    for name, limit in counts.items():
        if limit is not None and not (isinstance(limit, int) and limit >= 1):
            raise ValueError(f"{name}={limit!r}: give a whole number above 0, or None")
    if timeout is not None and not 0 < timeout <= _LONGEST_TIMEOUT:
        raise ValueError(
            f"timeout={timeout!r}: give seconds above 0, {_LONGEST_TIMEOUT:,} at most, or None"
        )
    return AllShards(Limits(partial, max_rows, max_shards, timeout))


def limits_of(statement: Any) -> Limits | None:
    """Return what `all_shards` says of a statement, the last time it does; None when it is not."""
    for option in reversed(statement._with_options):
        if isinstance(option, AllShards):
            return option.payload
    return None


def shards_of(statement: Any, params: Params, router: Router) -> frozenset[int] | None:
    """Return the logical shards a statement concerns, or None for every one.

    Args:
        statement: a SELECT, INSERT, UPDATE or DELETE, ORM or Core.
        params: the values passed with it.
        router: places the key values.

    Returns:
        At least one logical shard; a statement over reference tables only gives shard 0, since
        every server has them.

    Raises:
        NoShardKeyError: the statement names no sharded table.
        InvalidShardKeyError: a key value cannot place a row.
        ShardKeyChangeError: an UPDATE sets a placing column.
        UnsupportedStatementError: rows of several logical shards would have to meet.
    """
    if isinstance(statement, TextClause):
        raise NoShardKeyError(
            "a text() statement names no logical shard",
            hint='pass bind_arguments={"logical_shard": n}, or write it with select()',
        )
    walk = Walk(router, params if isinstance(params, Mapping) else {})
    if isinstance(statement, Insert):
        return _shards_of_insert(statement, params, walk)
    if isinstance(statement, Update):
        names: set[Any] = {getattr(column, "name", column) for column in statement._values or {}}
        for row in params if isinstance(params, Sequence) else [params or {}]:
            names.update(row)
        _refuse_key_change(statement, names)
    _refuse_hidden_subqueries(statement)
    walk.statement(statement)
    return walk.answer()


def shards_of_rows(statement: Insert, params: Params, router: Router) -> list[int | None]:
    """Return the logical shard of each row that an INSERT into a sharded table adds, in order.

    None stands for a row that lacks the id it would be placed by.

    Raises:
        NoShardKeyError: a row has no shard key.
        InvalidShardKeyError: a key cannot place its row, or its id carries another shard.
        ShardKeyChangeError: ON CONFLICT would set a placing column.
        UnsupportedStatementError: it reads other rows.
    """
    sharding = base_sharding(statement.table)
    assert sharding is not None, "the caller has looked"
    if statement.select is not None:
        raise UnsupportedStatementError(
            "INSERT from SELECT is not routed", hint="read the rows, then session.add_all()"
        )
    _refuse_subqueries_of_insert(statement)
    conflict: Any = statement._post_values_clause
    _refuse_key_change(
        statement,
        {getattr(c, "name", c) for c in getattr(conflict, "update_values_to_set", None) or ()},
    )
    walk = Walk(router, params if isinstance(params, Mapping) else {})
    given: Any = [row for rows in statement._multi_values for row in rows]
    given = given or [statement._values or {}]
    if isinstance(params, Sequence):
        rows = [{**_by_name(given[0]), **row} for row in params]
    else:
        rows = [{**_by_name(row), **(params or {})} for row in given]
    return [_shard_of_row(sharding, row, walk) for row in rows]


def _shards_of_insert(statement: Insert, params: Params, walk: Walk) -> frozenset[int] | None:
    sharding = base_sharding(statement.table)
    if sharding is None:
        walk.statement(select(statement.table))
        return walk.answer()
    shards = shards_of_rows(statement, params, walk.router)
    if None in shards:
        raise NoShardKeyError(
            f"INSERT without {sharding.key} goes where it is placed when it runs",
            hint="name it in values()",
        )
    return frozenset(shard for shard in shards if shard is not None)


def _by_name(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {getattr(name, "key", name): value for name, value in row.items()}


def _shard_of_row(sharding: Sharding, row: Mapping[str, Any], walk: Walk) -> int | None:
    shards = set()
    for name in {sharding.key: None, **sharding.placing}:
        if name in row:
            value = row[name]
            if isinstance(value, BindParameter):
                value = value_of(value, walk.params)
            if value is None and name == sharding.minted:
                continue
            shards.add(walk.router.shard(sharding.placing.get(name, sharding.rule), value))
    if sharding.key != sharding.minted and not row.keys() & {
        sharding.key,
        sharding.key_column.name,
    }:
        raise NoShardKeyError(
            f"INSERT without {sharding.key}, the shard key", hint="name it in values()"
        )
    if len(shards) > 1:
        raise InvalidShardKeyError(
            f"INSERT of an id that carries another logical shard than {sharding.key} names",
            hint="leave the id out; it is minted",
        )
    return shards.pop() if shards else None


def _refuse_key_change(statement: Update | Insert, names: Iterable[str]) -> None:
    sharding = base_sharding(statement.table)
    if sharding is None:
        return
    for name in names:
        if name in sharding.placing or name == sharding.key:
            raise ShardKeyChangeError(f"{name} places its row and cannot be set")


def _refuse_subqueries_of_insert(statement: Insert) -> None:
    """Refuse what an INSERT would read of other tables."""
    multi: list[Any] = [row for rows in statement._multi_values for row in rows]
    rows: list[Mapping[Any, Any]] = [statement._values or {}, *multi]
    parts = [value for row in rows for value in row.values()]
    parts += [*statement._returning, statement._post_values_clause]
    conflict: Any = statement._post_values_clause
    parts += [*(getattr(conflict, "update_values_to_set", None) or {}).values()]
    parts.append(getattr(conflict, "update_whereclause", None))
    if statement._independent_ctes or any(_has_subquery(part) for part in parts):
        raise UnsupportedStatementError(
            "a subquery in an INSERT is not routed", hint="read its value first"
        )


def _refuse_hidden_subqueries(statement: Any) -> None:
    for option in statement._with_options:
        if isinstance(option, LoaderCriteriaOption):
            criteria = getattr(option.where_criteria, "_resolved", option.where_criteria)  # lambda
            if _has_subquery(criteria):
                raise UnsupportedStatementError(
                    "with_loader_criteria() with a subquery is not routed",
                    hint="write the condition into the statement",
                )


def _has_subquery(element: Any) -> bool:
    return isinstance(element, ExternallyTraversible) and any(
        isinstance(part, SelectBase) for part in iterate(element)
    )
