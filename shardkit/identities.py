"""Primary keys of many rows at once: checked, and the statement that loads them.

Called by `ReadSession.get_many`. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ARRAY, Select, any_, bindparam, select, tuple_
from sqlalchemy.orm import Mapper

from shardkit.errors import InvalidShardKeyError
from shardkit.placing import sharding_of_mapper

__all__ = ["Identity", "identities", "select_identities"]

Identity = tuple[Any, ...]
"""The values of a primary key, in the order of the class's primary key columns."""


def identities(mapper: Mapper[Any], idents: Iterable[Any]) -> list[Identity]:
    """Return primary keys as tuples, in the order given.

    Args:
        mapper: the class.
        idents: single values; for a composite key tuples, or dictionaries by attribute.

    Raises:
        InvalidShardKeyError: one has not as many values as the key, or cannot place a row.
    """
    if isinstance(idents, str | bytes | Mapping):
        raise InvalidShardKeyError(
            f"{type(idents).__name__} is not a list of primary keys", hint="pass a list"
        )
    return [_identity(mapper, ident) for ident in idents]


def _identity(mapper: Mapper[Any], ident: Any) -> Identity:
    columns = mapper.primary_key
    if isinstance(ident, Mapping):
        names = [mapper.get_property_by_column(column).key for column in columns]
        if set(ident) != set(names):
            raise InvalidShardKeyError(
                f"{mapper.class_.__name__} has the primary key {', '.join(names)}, "
                f"not {', '.join(map(str, ident))}"
            )
        values = [ident[name] for name in names]
    else:
        values = list(ident) if isinstance(ident, tuple | list) else [ident]
    if len(values) != len(columns):
        raise InvalidShardKeyError(
            f"{mapper.class_.__name__} has a primary key of {len(columns)} values, "
            f"not {len(values)}"
        )
    sharding = sharding_of_mapper(mapper)
    if sharding is not None:
        position, rule = sharding.identity
        rule.key(values[position])
        if columns[position] is sharding.key_column:
            values[position] = sharding.kept(values[position])
    return tuple(values)


def select_identities(mapper: Mapper[Any], wanted: Sequence[Identity]) -> Select[Any]:
    """Return the statement that loads the rows of some primary keys, in no order."""
    columns: Sequence[Any] = mapper.primary_key
    if len(columns) == 1:
        values = [identity[0] for identity in wanted]
        listed = bindparam(None, values, type_=ARRAY(columns[0].type))
        return select(mapper).where(columns[0] == any_(listed))
    return select(mapper).where(tuple_(*columns).in_(wanted))
