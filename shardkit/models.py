"""What a model declares: where its rows live.

`Sharded` puts a class on logical shards and gives it the minted `id`; `Reference` marks a small
table copied whole to every physical shard. The declaration is kept in `Table.info`, where
`shardkit.statements` finds it. No I/O.
"""

from __future__ import annotations

import typing
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from sqlalchemy import (
    CHAR,
    BigInteger,
    Column,
    Enum,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Uuid,
    event,
    inspect,
)
from sqlalchemy.dialects.postgresql import CITEXT
from sqlalchemy.orm import Mapped, MappedColumn, Mapper, mapped_column
from sqlalchemy.types import NullType, TypeEngine

from shardkit.cacheable import VERSION, cacheable_columns, keep_cached, version_column
from shardkit.emitting import Announcement, announces
from shardkit.errors import ConfigurationError, NotCacheableError
from shardkit.keys import KeyType
from shardkit.router import Router
from shardkit.strategies import EMBEDDED, Embedded, Rule, Strategy, strategy_named
from shardkit.uniques import UniqueLookup, bound, keep, lookups_of

__all__ = ["REFERENCE_SCHEMA", "Reference", "Sharded", "Sharding", "rules_of", "sharding_of"]

REFERENCE_SCHEMA: Final = "reference"
"""Schema of reference tables on every physical shard."""

_INFO = "shardkit"

_KEY_TYPES: Final[dict[type[TypeEngine[Any]], KeyType]] = {
    Integer: KeyType.INTEGER,
    String: KeyType.TEXT,
    Uuid: KeyType.UUID,
    LargeBinary: KeyType.BYTES,
}


@dataclass(frozen=True, slots=True)
class Sharding:
    """How the rows of one table are placed.

    Attributes:
        key: attribute that holds the shard key.
        key_column: its column.
        rule: how the key's value names the logical shard.
        minted: attribute of the id minted at flush, or None when the class maps its own
            primary key. The minted id carries the shard whatever the strategy.
        placing: how each column that determines the shard names it: column name to rule.
        attributes: names of the attributes of those columns.
        identity: position in the primary key of the column that places, with its rule.
    """

    key: str
    key_column: Column[Any]
    rule: Rule
    minted: str | None
    placing: dict[str, Rule]
    attributes: tuple[str, ...]
    identity: tuple[int, Rule]

    def shard_of_identity(self, router: Router, identity: tuple[Any, ...]) -> int:
        """Return the logical shard of a primary key.

        Raises:
            InvalidShardKeyError: the key cannot place a row.
        """
        position, rule = self.identity
        return router.shard(rule, identity[position])

    def kept(self, value: Any) -> Any:
        """Return a key as the database will return it: the one spelling of a UUID."""
        if self.rule.key_type is not KeyType.UUID:
            return value
        key = self.rule.key(value)
        kept = key if self.key_column.type.python_type is uuid.UUID else str(key)
        return value if value == kept else kept

    @property
    def fingerprint(self) -> str:
        """How rows are placed, as text; equal as long as the same keys name the same shards."""
        return self.rule.text(self.key_column.name)


class Sharded:
    """Mixin: rows live on the logical shard that their shard key names.

    Class attributes:
        __shard_key__: the attribute whose value places a row; omit it and the row's own id
            places it, on a logical shard chosen when it is added.
        __shard_strategy__: `"embedded"` (default) when the key is a shardkit id; `"hash"`,
            `Range(…)` or `Directory(…)` for numbers, text, UUIDs and bytes.
        __unique__: columns of which no two rows of the cluster have the same value; a tuple of
            `unique_lookup(…)`.
        __events__: what the outbox announces of its objects, by `after_insert`, `after_update`
            and `after_delete`.
        __cache_ttl__: seconds for which a row may stay in the cache; omit it for no cache. The
            class gets `version`, a `bigint` that the server raises with every change.

    A class that maps no primary key of its own gets `id`, a `bigint` minted at flush. One that
    does must have the shard key in it: a primary key names one row of the whole cluster.
    """

    __shard_key__: ClassVar[str]
    __shard_strategy__: ClassVar[str | Strategy] = "embedded"
    __unique__: ClassVar[tuple[UniqueLookup, ...]] = ()
    __events__: ClassVar[Sequence[Announcement]] = ()
    __cache_ttl__: ClassVar[float | None] = None

    if TYPE_CHECKING:
        id: Mapped[int]
        version: Mapped[int]

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
        is_cached = cls.__cache_ttl__ is not None
        if is_cached and "__tablename__" in vars(cls) and not hasattr(cls, VERSION):
            cls.version = version_column()
            cls.__annotations__ = {**vars(cls).get("__annotations__", {}), VERSION: Mapped[int]}
        super().__init_subclass__(**kwargs)
        table = vars(cls).get("__table__")
        if is_cached and (table is not None or mapped_above):
            cacheable_columns(inspect(cls), is_mapped=False)
            keep_cached(inspect(cls))
        declared = vars(cls).get("__events__", ()) if mapped_above else cls.__events__
        if table is not None or mapped_above:
            for announcement in declared:
                moment = f"after_{announcement.moment}"
                event.listen(cls, moment, announces(announcement), propagate=True)
        if table is None:
            return
        if mapped_above:
            raise ConfigurationError(
                f"{cls.__name__}: joined-table inheritance is not supported on sharded classes",
                hint="map the subclass to its parent's table",
            )
        table.info[_INFO] = sharding = _sharding(cls, "id" if mints else None)
        _keep_uniques(cls, table, sharding)


class Reference:
    """Mixin: a small table copied whole to every physical shard, joinable from everywhere."""

    __table_args__: ClassVar[Any] = {"schema": REFERENCE_SCHEMA}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        table = vars(cls).get("__table__")
        if getattr(cls, "__cache_ttl__", None) is not None:
            raise NotCacheableError(
                f"{cls.__name__}: reference tables are on every server, and not cached",
                hint="leave out __cache_ttl__",
            )
        if table is not None and table.schema != REFERENCE_SCHEMA:
            raise ConfigurationError(
                f"{cls.__name__}: reference tables live in the schema {REFERENCE_SCHEMA!r}; "
                "name it in __table_args__"
            )


def sharding_of(table: Table) -> Sharding | None:
    """Return the placement of a table, or None when it is not sharded."""
    return cast("Sharding | None", table.info.get(_INFO))


def rules_of(metadata: MetaData) -> dict[str, str]:
    """Return how the rows of every sharded table are placed, as text by name of the table.

    Unique columns are among them, as `table.column`, with what decides which values are equal.
    """
    rules: dict[str, str] = {}
    for table in metadata.sorted_tables:
        if (sharding := sharding_of(table)) is not None:
            rules[table.name] = sharding.fingerprint
            rules |= {lookup.name: lookup.rule for lookup in lookups_of(table)}
    return rules


def _sharding(cls: type[Any], minted: str | None) -> Sharding:
    mapper: Mapper[Any] = inspect(cls)
    key = getattr(cls, "__shard_key__", minted)
    if key is None:
        raise ConfigurationError(
            f"{cls.__name__}: maps its own primary key, so it must name its __shard_key__"
        )
    if key not in mapper.columns:
        raise ConfigurationError(f"{cls.__name__}: __shard_key__ {key!r} is not a mapped column")
    key_column = mapper.columns[key]
    try:
        rule = _rule(strategy_named(cls.__shard_strategy__), key_column)
    except ConfigurationError as error:
        raise ConfigurationError(f"{cls.__name__}: {error.message}", hint=error.hint) from None
    if rule != EMBEDDED and key == minted:
        raise ConfigurationError(
            f"{cls.__name__}: a minted id carries its shard", hint="name another __shard_key__"
        )
    placing = {key_column.name: rule}
    if minted is not None:
        placing[mapper.columns[minted].name] = EMBEDDED
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
    return Sharding(key, key_column, rule, minted, placing, attributes, identity)


def _keep_uniques(cls: type[Sharded], table: Table, sharding: Sharding) -> None:
    """Keep the unique columns of a class with its table.

    Raises:
        ConfigurationError: a column cannot be kept unique.
    """
    declared = cls.__unique__
    if not declared:
        return
    mapper: Mapper[Any] = inspect(cls)
    id_column: Any = mapper.primary_key[0]
    if len(mapper.primary_key) > 1 or sharding.identity[1] != EMBEDDED:
        raise ConfigurationError(
            f"{cls.__name__}: a class with unique columns needs an id that carries its shard",
            hint="map no primary key and get a minted id",
        )
    lookups = []
    for unique in declared:
        if (
            not isinstance(cast("Any", unique), UniqueLookup)
            or unique.attribute not in mapper.columns
        ):
            raise ConfigurationError(
                f"{cls.__name__}: __unique__ has {unique!r}, which names no mapped column",
                hint='write __unique__ = (unique_lookup("username"),), with a comma',
            )
        column = mapper.columns[unique.attribute]
        if column.name in sharding.placing:
            raise ConfigurationError(
                f"{cls.__name__}: {unique.attribute} places its row",
                hint="equal shard keys lie together: a unique index keeps them unique",
            )
        key_type = _key_type(column)
        if key_type is None:
            raise ConfigurationError(
                f"{cls.__name__}: a column of type {type(column.type).__name__} cannot be unique",
                hint="use BigInteger, Integer, Text, String, Uuid or LargeBinary",
            )
        lookups.append(bound(cls.__name__, unique, column, id_column, key_type))
    keep(table, tuple(lookups))


def _rule(strategy: Strategy, column: Column[Any]) -> Rule:
    """Return the rule of a shard key column.

    Raises:
        ConfigurationError: its type cannot place rows, or not by this strategy.
    """
    if isinstance(column.type, NullType) and isinstance(strategy, Embedded):
        return EMBEDDED  # a foreign key to an id, whose type SQLAlchemy resolves later
    key_type = _key_type(column)
    if key_type is None:
        raise ConfigurationError(
            f"a column of type {type(column.type).__name__} cannot be a shard key",
            hint="use BigInteger, Integer, Text, String, Uuid or LargeBinary",
        )
    return Rule(strategy, key_type)


def _key_type(column: Column[Any]) -> KeyType | None:
    """Return the type of a column's values, or None when equal there is not equal here."""
    kind = column.type
    # PostgreSQL pads CHAR, folds CITEXT, and stores an Enum's name.
    if isinstance(kind, CHAR | CITEXT | Enum):
        return None
    return next((found for known, found in _KEY_TYPES.items() if isinstance(kind, known)), None)


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
