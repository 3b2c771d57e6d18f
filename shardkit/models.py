"""What a model declares: where its rows live.

`Sharded` puts a class on logical shards and gives it the minted `id`; `Reference` marks a small
table copied whole to every physical shard. The declaration is kept in `Table.info`, where
`shardkit.statements` finds it. No I/O.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, String, Table, Uuid, inspect
from sqlalchemy.orm import Mapped, MappedColumn, Mapper, mapped_column

from shardkit.errors import ConfigurationError
from shardkit.router import Router, Strategy

__all__ = ["REFERENCE_SCHEMA", "Reference", "Sharded", "Sharding", "sharding_of"]

REFERENCE_SCHEMA: Final = "reference"
"""Schema of reference tables on every physical shard."""

_INFO = "shardkit"
_HASHED = (String, Integer, Uuid, LargeBinary)


@dataclass(frozen=True, slots=True)
class Sharding:
    """How the rows of one table are placed.

    Attributes:
        key: attribute that holds the shard key.
        key_column: its column.
        strategy: how the key's value names the logical shard.
        minted: attribute of the id minted at flush, or None when the class maps its own
            primary key. The minted id carries the shard whatever the strategy.
        placing: how each column that determines the shard names it: column name to strategy.
        attributes: names of the attributes of those columns.
        identity: position in the primary key of the column that places, with its strategy.
    """

    key: str
    key_column: Column[Any]
    strategy: Strategy
    minted: str | None
    placing: dict[str, Strategy]
    attributes: tuple[str, ...]
    identity: tuple[int, Strategy]

    def shard_of_identity(self, router: Router, identity: tuple[Any, ...]) -> int:
        """Return the logical shard of a primary key.

        Raises:
            InvalidShardKeyError: the key cannot place a row.
        """
        position, strategy = self.identity
        return router.shard(strategy, identity[position])


class Sharded:
    """Mixin: rows live on the logical shard that their shard key names.

    Class attributes:
        __shard_key__: the attribute whose value places a row; omit it and the row's own id
            places it, on a logical shard chosen when it is added.
        __shard_strategy__: `"embedded"` (default) when the key is a shardkit id, `"hash"` for
            any other value.

    A class that maps no primary key of its own gets `id`, a `bigint` minted at flush. One that
    does must have the shard key in it: a primary key names one row of the whole cluster.
    """

    __shard_key__: ClassVar[str]
    __shard_strategy__: ClassVar[str] = Strategy.EMBEDDED

    if TYPE_CHECKING:
        id: Mapped[int]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Ids need 64 bits, and so does every column that refers to one by a bare `Mapped[int]`.
        registry = getattr(cls, "registry", None)
        if registry is not None and int not in registry.type_annotation_map:
            registry.update_type_annotation_map({int: BigInteger})
        mapped_above = any("__table__" in vars(base) for base in cls.__mro__[1:])
        mints = not (mapped_above or cls.__dict__.get("__abstract__") or _maps_primary_key(cls))
        if mints and "__tablename__" in vars(cls):
            cls.id = mapped_column(BigInteger, primary_key=True, autoincrement=False, sort_order=-1)
            cls.__annotations__ = {**vars(cls).get("__annotations__", {}), "id": Mapped[int]}
        super().__init_subclass__(**kwargs)
        table = vars(cls).get("__table__")
        if table is None:
            return
        if mapped_above:
            raise ConfigurationError(
                f"{cls.__name__}: joined-table inheritance is not supported on sharded classes",
                hint="map the subclass to its parent's table",
            )
        table.info[_INFO] = _sharding(cls, "id" if mints else None)


class Reference:
    """Mixin: a small table copied whole to every physical shard, joinable from everywhere."""

    __table_args__: ClassVar[Any] = {"schema": REFERENCE_SCHEMA}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        table = vars(cls).get("__table__")
        if table is not None and table.schema != REFERENCE_SCHEMA:
            raise ConfigurationError(
                f"{cls.__name__}: reference tables live in the schema {REFERENCE_SCHEMA!r}; "
                "name it in __table_args__"
            )


def sharding_of(table: Table) -> Sharding | None:
    """Return the placement of a table, or None when it is not sharded."""
    return typing.cast("Sharding | None", table.info.get(_INFO))


def _sharding(cls: type[Any], minted: str | None) -> Sharding:
    mapper: Mapper[Any] = inspect(cls)
    key = getattr(cls, "__shard_key__", minted)
    if key is None:
        raise ConfigurationError(
            f"{cls.__name__}: maps its own primary key, so it must name its __shard_key__"
        )
    if key not in mapper.columns:
        raise ConfigurationError(f"{cls.__name__}: __shard_key__ {key!r} is not a mapped column")
    try:
        strategy = Strategy(cls.__shard_strategy__)
    except ValueError:
        raise ConfigurationError(
            f"{cls.__name__}: __shard_strategy__ {cls.__shard_strategy__!r} is unknown; "
            f"one of: {', '.join(Strategy)}"
        ) from None
    if strategy is Strategy.HASH and key == minted:
        raise ConfigurationError(f"{cls.__name__}: a minted id carries its shard; hash another key")
    key_column = mapper.columns[key]
    kinds = _HASHED if strategy is Strategy.HASH else (Integer,)
    if not isinstance(key_column.type, kinds):
        raise ConfigurationError(
            f"{cls.__name__}: a key of type {key_column.type!r} is not the same in Python and in "
            "the database",
            hint=f"give it one of the types {', '.join(kind.__name__ for kind in kinds)}",
        )
    placing = {key_column.name: strategy}
    if minted is not None:
        placing[mapper.columns[minted].name] = Strategy.EMBEDDED
    identity = next(
        (
            (position, placing[column.name])
            for position, column in enumerate(mapper.primary_key)
            if column.name in placing
        ),
        None,
    )
    if identity is None:
        raise ConfigurationError(
            f"{cls.__name__}: the primary key does not contain the shard key {key!r}, "
            "so equal keys could name two rows",
            hint="add the shard key to the primary key, or map none and get a minted id",
        )
    attributes = (key,) if minted in (None, key) else (key, minted)
    return Sharding(key, key_column, strategy, minted, placing, attributes, identity)


def _maps_primary_key(cls: type[Any]) -> bool:
    """Tell whether a class declares a primary key column, also by annotation."""
    if "__table__" in vars(cls):
        return True
    for base in cls.__mro__:
        for value in vars(base).values():
            column = value.column if isinstance(value, MappedColumn) else value
            if isinstance(column, Column) and column.primary_key:
                return True
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except (NameError, TypeError):  # forward references to classes not yet defined
        return False
    return any(
        isinstance(extra, MappedColumn) and extra.column.primary_key
        for hint in hints.values()
        for argument in typing.get_args(hint)
        for extra in getattr(argument, "__metadata__", ())
    )
