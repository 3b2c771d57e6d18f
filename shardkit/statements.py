"""Finds the logical shards a statement concerns.

`shards_of` answers with the logical shards whose rows a statement can touch, or None for all of
them, and raises when rows of different logical shards would have to meet. It reads the
expression tree and the bound values and never compiles or runs anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sqlalchemy import BindParameter, Insert, TextClause, Update, select
from sqlalchemy.orm import UserDefinedOption

from shardkit.errors import (
    NoShardKeyError,
    ShardKeyChangeError,
    UnsupportedStatementError,
)
from shardkit.models import Sharding
from shardkit.router import Router
from shardkit.walk import Walk, base_sharding

__all__ = ["AllShards", "Params", "all_shards", "shards_of"]

Params = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
"""Values passed beside a statement: none, one set, or many."""


class AllShards(UserDefinedOption):
    """Says that a statement may go to every logical shard; made by `all_shards`."""


def all_shards() -> AllShards:
    """Return the option that allows a statement without a shard key.

    Example:
        >>> from sqlalchemy import select
        >>> statement = select(Photo).order_by(Photo.id.desc()).limit(20)  # doctest: +SKIP
        >>> session.scalars(statement.options(all_shards()))  # doctest: +SKIP
    """
    return AllShards()


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
        _refuse_key_change(statement)
    walk.statement(statement)
    return walk.answer()


def _shards_of_insert(statement: Insert, params: Params, walk: Walk) -> frozenset[int] | None:
    sharding = base_sharding(statement.table)
    if sharding is None:
        walk.statement(select(statement.table))
        return walk.answer()
    if statement.select is not None:
        raise UnsupportedStatementError(
            "INSERT from SELECT is not routed", hint="read the rows, then session.add_all()"
        )
    rows: list[Mapping[Any, Any]]
    if isinstance(params, Sequence):
        rows = list(params)
    else:
        multi = [row for rows in statement._multi_values for row in rows]
        given = cast("list[Mapping[Any, Any]]", multi or [statement._values or {}])
        rows = [{**row, **(params or {})} for row in given]
    shards = frozenset(_shard_of_row(sharding, row, walk) for row in rows)
    if len(shards) > 1:
        raise UnsupportedStatementError(
            f"one INSERT for {len(shards)} logical shards", hint="use session.add_all()"
        )
    return shards


def _shard_of_row(sharding: Sharding, row: Mapping[Any, Any], walk: Walk) -> int:
    values = {getattr(name, "key", name): value for name, value in row.items()}
    for name in (sharding.key, *sharding.placing):
        if name in values:
            value = values[name]
            if isinstance(value, BindParameter):
                value = walk.value(value)
            return walk.router.shard(sharding.placing.get(name, sharding.rule), value)
    raise NoShardKeyError(
        f"INSERT without {sharding.key}, the shard key", hint="name it in values()"
    )


def _refuse_key_change(statement: Update) -> None:
    sharding = base_sharding(statement.table)
    if sharding is None:
        return
    for column in statement._values or {}:
        name = getattr(column, "name", column)
        if name in sharding.placing or name == sharding.key:
            raise ShardKeyChangeError(f"{name} places its row and cannot be set")
