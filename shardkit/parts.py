"""Splits one INSERT, UPDATE or DELETE into what each logical shard runs of it.

Keys and rows go to their own logical shard only; rows that lack a minted id get one. Called by
`WriteSession`, run by `shardkit.writes`. Pure, but for the placement and the minter it is given;
what the caller passed is copied, never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Delete, Insert, Update
from sqlalchemy.orm import Mapper

from shardkit.errors import (
    InvalidShardKeyError,
    NoShardKeyError,
    ShardKeyChangeError,
    UnsupportedStatementError,
)
from shardkit.keylists import split
from shardkit.models import Sharding
from shardkit.placement import Placement
from shardkit.router import Router
from shardkit.shapes import base_sharding
from shardkit.statements import Params, shards_of, shards_of_rows

__all__ = ["Part", "changes", "changes_of_rows", "inserts", "placed_rows", "refuse_unwritable"]

Mint = Callable[[Mapping[int, int]], Mapping[int, Sequence[int]]]
"""Mints ids: how many by logical shard in, ids by logical shard out."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one logical shard runs of a write.

    Attributes:
        shard: the logical shard.
        statement: its statement.
        params: what is passed with it.
        positions: places of its rows in the list that was given; empty where there is none.
    """

    shard: int
    statement: Any
    params: Params
    positions: tuple[int, ...] = ()


def refuse_unwritable(statement: Any, params: Params) -> None:
    """Refuse a write that names no sharded table or passes no rows.

    Raises:
        UnsupportedStatementError: always when it raises.
    """
    if base_sharding(statement.table) is None:
        raise UnsupportedStatementError(
            f"{statement.table} is not a sharded table, and its rows would change on one server",
            hint="reference tables are written by objects, in cluster.writer(atomic=True)",
        )
    if isinstance(params, list | tuple) and not params:
        raise UnsupportedStatementError(
            f"{type(statement).__name__.upper()} with an empty list of rows",
            hint="SQL has no statement for no rows: leave the call out",
        )


# -- UPDATE and DELETE


def changes(
    statement: Update | Delete, params: Params, router: Router, shards: Sequence[int]
) -> list[Part]:
    """Return the parts of an UPDATE or DELETE that goes to several logical shards.

    Args:
        statement: what is to be done.
        params: one set of values passed with it, or None.
        router: places the keys in its lists.
        shards: where it goes.
    """
    narrowed, lists = split(cast("Update", statement), params, router)
    given = params if isinstance(params, Mapping) else {}
    return [Part(shard, narrowed, {**given, **lists.of(shard)}) for shard in shards]


def changes_of_rows(
    statement: Update | Delete,
    rows: Sequence[Mapping[str, Any]],
    router: Router,
    mapper: Mapper[Any] | None,
) -> list[Part]:
    """Return the parts of an UPDATE or DELETE that is run once for each of many sets of values.

    Args:
        statement: what is to be done.
        rows: the sets of values.
        router: places keys.
        mapper: the class, when the rows are to be found by their primary key, as
            `session.execute(update(Photo), [{"id": …, "caption": …}])` does.

    Raises:
        NoShardKeyError: a row does not say where it is.
        ShardKeyChangeError: a row sets a placing column.
        UnsupportedStatementError: the values of one set go to several logical shards.
    """
    if mapper is None:
        shards = [_one(shards_of(statement, row, router)) for row in rows]
    elif isinstance(statement, Delete):
        raise UnsupportedStatementError(
            "a bulk DELETE by primary key", hint="delete(…).where(….id.in_([…]))"
        )
    else:
        # Refuses what it would refuse without the rows: subqueries, among others.
        others = {name: value for name, value in rows[0].items() if name not in mapper.attrs}
        shards_of(statement, others, router)
        shards = [_shard_of_change(mapper, row, router) for row in rows]
    return _grouped(statement, rows, shards)


def _one(shards: frozenset[int] | None) -> int:
    if shards is None or len(shards) > 1:
        raise UnsupportedStatementError(
            "one set of values for several logical shards", hint="compare a shard key with ="
        )
    return next(iter(shards))


def _shard_of_change(mapper: Mapper[Any], row: Mapping[str, Any], router: Router) -> int:
    sharding = base_sharding(mapper.local_table)
    assert sharding is not None, "the caller has looked"
    keys = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    if missing := [key for key in keys if key not in row]:
        raise NoShardKeyError(
            f"UPDATE of a {mapper.class_.__name__} without {', '.join(missing)}, its primary key"
        )
    shard = sharding.shard_of_identity(router, tuple(row[key] for key in keys))
    for name in sharding.attributes:
        if name in row and name not in keys:
            raise ShardKeyChangeError(f"{name} places its row and cannot be set")
    return shard


# -- INSERT


def placed_rows(
    statement: Insert, params: Params, router: Router, placement: Placement
) -> list[int]:
    """Return the logical shard of every row that an INSERT adds, in order.

    Raises:
        RoutingError: as `shards_of_rows` does.
    """
    shards = shards_of_rows(statement, params, router)
    return [placement(router.total) if shard is None else shard for shard in shards]


def inserts(statement: Insert, params: Params, shards: Sequence[int], mint: Mint) -> list[Part]:
    """Return the parts of an INSERT, with a minted id in every row that lacks one.

    Args:
        statement: what is to be done.
        params: the values passed with it.
        shards: where each row goes, from `placed_rows`.
        mint: mints ids; called once.
    """
    sharding = base_sharding(statement.table)
    assert sharding is not None, "the caller has looked"
    multi: list[Any] = [row for rows in statement._multi_values for row in rows]
    if isinstance(params, Sequence) or (params and not multi):
        fixed = _has_id(sharding, statement._values or {}, params=None)
        rows = [params] if isinstance(params, Mapping) else list(params)
        whole = rows if fixed else _with_ids(sharding, rows, shards, mint)
        if isinstance(params, Mapping):
            return [Part(shards[0], statement, whole[0], (0,))]
        return _grouped(statement, whole, shards)
    if not multi:
        ids = _with_ids(sharding, [statement._values or {}], shards, mint)[0]
        if sharding.minted in ids and not _has_id(sharding, statement._values or {}, params):
            statement = statement.values({sharding.minted: ids[sharding.minted]})
        return [Part(shards[0], statement, params, (0,))]
    if any(not isinstance(row, Mapping) for row in multi):
        raise InvalidShardKeyError("INSERT of rows that are not dictionaries")
    whole = _with_ids(sharding, multi, shards, mint)
    parts = []
    for part in _grouped(statement, whole, shards):
        own = statement._generate()
        own._multi_values = (cast("Any", part.params),)
        parts.append(Part(part.shard, own, params, part.positions))
    return parts


def _with_ids(
    sharding: Sharding, rows: Iterable[Mapping[Any, Any]], shards: Sequence[int], mint: Mint
) -> list[dict[Any, Any]]:
    """Return copies of rows, each with an id."""
    copies = [dict(row) for row in rows]
    wanted: dict[int, list[dict[Any, Any]]] = {}
    if sharding.minted is not None:
        for row, shard in zip(copies, shards, strict=True):
            if not _has_id(sharding, row, params=None):
                wanted.setdefault(shard, []).append(row)
    if wanted:
        minted = mint({shard: len(mine) for shard, mine in wanted.items()})
        for shard, mine in wanted.items():
            for row, new_id in zip(mine, minted[shard], strict=True):
                name = next((k for k in row if _name(k) == sharding.minted), sharding.minted)
                row[name] = new_id
    return copies


def _has_id(sharding: Sharding, row: Mapping[Any, Any], params: Params) -> bool:
    if isinstance(params, Mapping) and params.get(sharding.minted or "") is not None:
        return True
    for key, value in row.items():
        if _name(key) == sharding.minted:
            return getattr(value, "effective_value", value) is not None
    return False


def _name(key: Any) -> Any:
    return getattr(key, "key", key)


def _grouped(
    statement: Any, rows: Sequence[Mapping[Any, Any]], shards: Sequence[int]
) -> list[Part]:
    places: dict[int, list[int]] = {}
    for i, shard in enumerate(shards):
        places.setdefault(shard, []).append(i)
    return [
        Part(shard, statement, [rows[i] for i in mine], tuple(mine))
        for shard, mine in places.items()
    ]
