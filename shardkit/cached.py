"""Which rows are cached and how: the plan of a class that declares `__cache_ttl__`.

Sessions that read and sessions that write ask here for the name of a row's entry, for the bytes of
its values and back. A class whose rows cannot be cached exactly is refused when it is mapped, or
on its first use, with what to write instead. No I/O.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import ARRAY, Column, Table, any_, bindparam, select, tuple_
from sqlalchemy.orm import Mapper

from shardkit.cacheable import VERSION, cacheable_columns
from shardkit.caching.keys import cache_key, schema_hash
from shardkit.caching.lives import DEFAULT_LIVES, Lives
from shardkit.caching.rows import decode_row, encode_row
from shardkit.errors import NotCacheableError

__all__ = ["CachePlan", "Question", "plan_of"]

Question = tuple[Any, Mapping[str, Any], int | None]
"""A statement, its parameters, and the logical shard it is bound to, if it does not say that."""

_LAZY: Final = frozenset({"select", True, "raise", "raise_on_sql", "dynamic", "write_only"})
"""What a relationship may do when its parent is loaded: nothing."""


class CachePlan:
    """How the rows of one class are cached.

    Attributes:
        mapper: the class.
        name: of the class.
        table: its table.
        ttl: seconds a row lives in the cache.
        lives: of its entries.
        columns: what is cached, in the order of the table; deferred columns are not.
        attributes: their attributes, in the same order.
        schema: `schema_hash` of them.
        key_indexes: where the values of the primary key stand among them, in its own order.
        version_index: where the version stands.
        one_row: reads the row of the primary key `key_0`, `key_1` and so on.
        loads_alone: whether loading an object is reading its row and no more; objects of other
            classes, with relationships that are loaded eagerly, are not made of cached rows.

    *Invariant:* what `decode` returns is what the database would have returned.
    """

    __slots__ = (
        "_codecs",
        "_key_types",
        "_plain",
        "_restored",
        "_shape",
        "_single",
        "attributes",
        "columns",
        "key_indexes",
        "lives",
        "loads_alone",
        "mapper",
        "name",
        "one_row",
        "schema",
        "table",
        "ttl",
        "version_index",
    )

    def __init__(self, mapper: Mapper[Any]) -> None:
        self.mapper = mapper
        self.name = mapper.class_.__name__
        for attribute in mapper.column_attrs:
            if not isinstance(attribute.columns[0], Column):
                raise NotCacheableError(
                    f"{self.name}: {attribute.key} is an expression, which changes without its row",
                    hint="leave out __cache_ttl__, or make it a query of its own",
                )
        found = cacheable_columns(mapper, is_mapped=True)
        table = mapper.local_table
        assert isinstance(table, Table)
        self.table = table
        self.ttl: float = mapper.class_.__cache_ttl__
        self.lives: Lives = DEFAULT_LIVES._replace(value=self.ttl)
        self.attributes = tuple(found)
        self.columns = tuple(column for column, _ in found.values())
        self._codecs = tuple(codec for _, codec in found.values())
        self.schema = schema_hash((column.name, codec.kind) for column, codec in found.values())
        places: dict[Any, int] = {column: index for index, column in enumerate(self.columns)}
        self._shape = bytes.fromhex(self.schema)
        self.key_indexes = tuple(places[column] for column in mapper.primary_key)
        self._key_types = tuple(column.type.python_type for column in mapper.primary_key)
        self._single = len(self.key_indexes) == 1
        by_key = [c == bindparam(f"key_{n}") for n, c in enumerate(mapper.primary_key)]
        self.one_row = select(*self.columns).where(*by_key)
        self.version_index = self.attributes.index(VERSION)
        codecs = list(enumerate(self._codecs))
        self._plain = tuple((i, codec.plain) for i, codec in codecs if codec.plain is not None)
        self._restored = tuple(
            (i, codec.restore) for i, codec in codecs if codec.restore is not None
        )
        self.loads_alone = all(each.lazy in _LAZY for each in mapper.relationships)

    def names_row(self, identity: Sequence[Any]) -> bool:
        """Tell whether a primary key is written as the database writes it.

        Others may find the row too, as `True` finds 1, but nobody who writes it knows that name.
        """
        return [type(value) for value in identity] == list(self._key_types)

    def key(
        self, generation: int | str, epoch: int, logical_shard: int, identity: Sequence[Any]
    ) -> str:
        """Return the name of a row's entry.

        Args:
            generation: of the whole cache.
            epoch: of the logical shard's owner.
            logical_shard: the row's.
            identity: its primary key, for which `names_row` holds.
        """
        return cache_key(generation, epoch, logical_shard, self.table.name, identity)

    @property
    def entry(self) -> str:
        """What names of its entries begin with: the table."""
        return self.table.name

    def questions(
        self,
        wanted: Sequence[tuple[int, tuple[Any, ...]]],
        group: Callable[[Sequence[int]], Mapping[str, Sequence[int]]],
    ) -> Iterable[Question]:
        """Yield the statements that read rows, in no order; few, whatever their number.

        Args:
            wanted: logical shard and primary key of each.
            group: returns logical shards by physical shard.
        """
        if len(wanted) == 1:
            ((shard, identity),) = wanted
            yield self.one_row, {f"key_{n}": value for n, value in enumerate(identity)}, shard
            return
        keys: Sequence[Any] = self.mapper.primary_key
        statement = select(*self.columns)
        identities = [identity for _, identity in wanted]
        if self._single:
            listed = bindparam(None, [value for (value,) in identities], type_=ARRAY(keys[0].type))
            yield statement.where(keys[0] == any_(listed)), {}, None
        else:
            yield statement.where(tuple_(*keys).in_(identities)), {}, None

    def answered(self, row: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
        """Return the values of a row that a question has found."""
        return list(row)

    def identity(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Return the primary key of a row."""
        if self._single:
            return (values[self.key_indexes[0]],)
        return tuple([values[index] for index in self.key_indexes])

    def encode(self, values: Sequence[Any]) -> bytes | None:
        """Return the payload of a row, or None when it cannot be cached: too large, or strange.

        Args:
            values: as the database returned them, in the order of `columns`.
        """
        if self._plain:
            values = list(values)
            try:
                for index, plain in self._plain:
                    if values[index] is not None:
                        values[index] = plain(values[index])
            except Exception:  # noqa: BLE001 - the program's own types may raise anything
                return None
        packed = encode_row(values if isinstance(values, list) else tuple(values))
        return None if packed is None else self._shape + packed

    def decode(self, payload: bytes, version: int | None = None) -> list[Any] | None:
        """Return the values of a row in the order of `columns`, or None for what is none.

        Args:
            payload: of an entry.
            version: of the entry, which the row has to have; None for any.
        """
        if not payload.startswith(self._shape):  # of a program with other columns
            return None
        values = decode_row(payload[len(self._shape) :], len(self.columns))
        if values is None or (version is not None and values[self.version_index] != version):
            return None
        if self._restored:
            try:
                for index, restore in self._restored:
                    if values[index] is not None:
                        values[index] = restore(values[index])
            except Exception:  # noqa: BLE001 - the program's own types may raise anything
                return None
        return values

    def image(self, state: Mapping[str, Any]) -> list[Any] | None:
        """Return the values of an object as the database will return them, if that is known.

        Args:
            state: values by attribute, as in the `__dict__` of an object that was flushed.

        Returns:
            None when one is not loaded, or the database may round, pad or convert it.
        """
        values = []
        for attribute, codec in zip(self.attributes, self._codecs, strict=True):
            if attribute not in state:
                return None
            value = state[attribute]
            if value is not None and not codec.is_stored(value):
                return None
            values.append(value)
        return values


@functools.cache
def plan_of(mapper: Mapper[Any]) -> CachePlan | None:
    """Return how the rows of a class are cached, or None when it declares no `__cache_ttl__`.

    Raises:
        NotCacheableError: they cannot be.
    """
    if getattr(mapper.class_, "__cache_ttl__", None) is None:
        return None
    return CachePlan(mapper)
