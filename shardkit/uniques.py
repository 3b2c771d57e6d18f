"""What a model declares to be unique in the whole cluster, and the one form of each value.

`unique_lookup` names a column; the class's table keeps the `Lookup` made of it. Rows may lie on
any logical shard, so which id has a value is kept apart, on the logical shard that the value's
hash names. Source: docs/lookup.md. Pure.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, cast, get_args

from sqlalchemy import Column, Table

from shardkit.errors import ConfigurationError, InvalidShardKeyError, InvalidUniqueValueError
from shardkit.keys import KeyType, canonical, checked, shown
from shardkit.strategies import hash_shard

__all__ = [
    "GIVEN_UP",
    "Fold",
    "Lookup",
    "UniqueLookup",
    "Value",
    "given_up",
    "lookups_of",
    "unique_lookup",
    "was_given_up",
]

MAX_VALUE_BYTES: Final = 1024
"""Longest value, encoded. Source: an entry of a PostgreSQL B-tree has at most 2704 bytes."""

_ROUNDS: Final = 4
"""Foldings until nothing changes; two do for every character of Unicode 15."""

GIVEN_UP: Final = "shardkit.lookup"
"""Topic of the events that say which values rows have given up; relays handle it by themselves."""

_VALUES_TOLD: Final = 20
"""Values that one event tells: with base64 and ids, less than half of what an event may hold."""

_INFO: Final = "shardkit_lookups"

Fold = Literal["exact", "nfc", "nfkc", "casefold"]
"""Which texts count as one value: those equal byte by byte, in Unicode's normal form NFC, in NFKC
(compatibility forms are one), or in NFKC without regard to case."""


@dataclass(frozen=True, slots=True)
class UniqueLookup:
    """What `unique_lookup` returns; an item of `__unique__`."""

    attribute: str
    fold: Fold
    complete: bool
    relayed: bool


def unique_lookup(
    attribute: str, *, fold: Fold = "exact", complete: bool = True, relayed: bool = False
) -> UniqueLookup:
    """Declare that no two rows of a class have the same value; an item of `__unique__`.

    The values are kept as they are given; which of them are one is told by `fold`. Any number of
    rows may have None.

    Args:
        attribute: the mapped attribute: text, a whole number, a UUID or bytes, of 1,024 bytes at
            most.
        fold: which texts count as one value.
        complete: whether every row has been taken in. Say False while a table has rows from
            before: then it is written and not yet read, until `shardkit lookup backfill` is
            through.
        relayed: whether a transaction that gives a value up says so in the outbox. A process that
            dies between COMMIT and its release leaves the value in its lookup row, for nobody;
            told so, a relay releases it. For values that must not outlive their row, such as
            names of people, where relays run.

    Raises:
        ConfigurationError: there is no such way to fold.

    Example:
        >>> class User(Sharded, Base):  # doctest: +SKIP
        ...     __tablename__ = "users"
        ...     __unique__ = (unique_lookup("username", fold="casefold"),)
        ...     username: Mapped[str]
    """
    if fold not in get_args(Fold):
        raise ConfigurationError(
            f"unique_lookup({attribute!r}): fold is {shown(fold)}",
            hint=f"one of {', '.join(get_args(Fold))}",
        )
    return UniqueLookup(attribute, fold, complete, relayed)


@dataclass(frozen=True, slots=True)
class Lookup:
    """One unique column of one table.

    Attributes:
        name: `table.column`, under which its rows are kept.
        table: name of the table.
        attribute: the mapped attribute.
        column: name of its column.
        id_column: name of the primary key's column.
        key_type: type of its values.
        fold: which texts count as one.
        complete: whether it may be read.
        relayed: whether relays are told of values that are given up.
    """

    name: str
    table: str
    attribute: str
    column: str
    id_column: str
    key_type: KeyType
    fold: Fold
    complete: bool
    relayed: bool

    def value(self, given: object) -> Value:
        """Return the one form of a value, which decides what it equals.

        Raises:
            InvalidUniqueValueError: it is of another type, too long, or cannot be stored.
        """
        if self.key_type is KeyType.TEXT:
            return Value(self, canonical_text(self._text(given)))
        try:
            key = checked(self.key_type, given)
        except InvalidShardKeyError:
            raise InvalidUniqueValueError(
                f"{self.name}: {shown(given)} ({type(given).__name__}) is no {self.key_type}",
                hint=f"give a value of the column's type, of {MAX_VALUE_BYTES} bytes at most",
            ) from None
        if isinstance(key, bytes) and len(key) > MAX_VALUE_BYTES:
            raise self._too_long(given)
        return Value(self, canonical(key))

    def _text(self, given: object) -> str:
        if type(given) is not str:
            raise InvalidUniqueValueError(
                f"{self.name}: {shown(given)} ({type(given).__name__}) is not text",
                hint="give a str; an SQL expression is not known before it runs",
            )
        if len(given) > MAX_VALUE_BYTES:  # before anything works through ten megabytes
            raise self._too_long(given)
        if "\0" in given:
            raise InvalidUniqueValueError(
                f"{self.name}: {shown(given)} contains NUL, which PostgreSQL cannot store",
                hint="remove it",
            )
        text = folded(given, self.fold)
        try:
            size = max(len(given.encode()), len(text.encode()))
        except UnicodeEncodeError:
            raise InvalidUniqueValueError(
                f"{self.name}: {shown(given)} contains half a surrogate pair, which is no text",
                hint='decode input with errors="replace" or refuse it',
            ) from None
        if size > MAX_VALUE_BYTES:
            raise self._too_long(given)
        return text

    def _too_long(self, given: object) -> InvalidUniqueValueError:
        return InvalidUniqueValueError(
            f"{self.name}: {shown(given)} is too long",
            hint=f"a unique value has at most {MAX_VALUE_BYTES} bytes; use a digest of it",
        )

    @property
    def rule(self) -> str:
        """What decides equality, as text; recorded, since another one would find nothing."""
        return f"unique {self.key_type} {self.fold}"


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a unique column, in its one form.

    Attributes:
        lookup: the column.
        key: the form, as bytes.
    """

    lookup: Lookup
    key: bytes

    def home(self, total: int) -> int:
        """Return the logical shard that keeps who has the value.

        Args:
            total: how many logical shards there are.
        """
        return hash_shard(self.lookup.name.encode() + b"\0" + self.key, total)


def folded(text: str, fold: Fold) -> str:
    """Return a text as it counts.

    Example:
        >>> folded("Ana", "casefold") == folded("ANA", "casefold")
        True
    """
    if fold == "exact":
        return text
    if fold != "casefold":
        return unicodedata.normalize(cast("Any", fold.upper()), text)
    for _ in range(_ROUNDS):
        before, text = text, unicodedata.normalize("NFKC", text).casefold()
        text = unicodedata.normalize("NFKC", text)
        if text == before:
            break
    return text


def canonical_text(text: str) -> bytes:
    """Return a folded text as bytes."""
    return b"s" + text.encode()


def lookups_of(table: Any) -> tuple[Lookup, ...]:
    """Return the unique columns of a table, in the order declared."""
    if not isinstance(table, Table):
        return ()
    return cast("tuple[Lookup, ...]", table.info.get(_INFO, ()))


def keep(table: Table, lookups: tuple[Lookup, ...]) -> None:
    """Keep the unique columns of a table with it."""
    table.info[_INFO] = lookups


def bound(
    owner: str,
    declared: UniqueLookup,
    column: Column[Any],
    id_column: Column[Any],
    key_type: KeyType,
) -> Lookup:
    """Return the lookup of a declaration.

    Raises:
        ConfigurationError: its values would not be known before they are written.
    """
    if column.default is not None or column.server_default is not None or column.onupdate:
        raise ConfigurationError(
            f"{owner}: {declared.attribute} has a default, which is not known before it is written",
            hint="set it in the constructor",
        )
    table: Any = column.table
    return Lookup(
        name=f"{table.name}.{column.name}",
        table=table.name,
        attribute=declared.attribute,
        column=column.name,
        id_column=id_column.name,
        key_type=key_type,
        fold=declared.fold,
        complete=declared.complete,
        relayed=declared.relayed,
    )


def given_up(lookup: Lookup, values: Mapping[Value, Iterable[int]]) -> Iterator[dict[str, Any]]:
    """Yield the payloads of events that say which rows may have given up which values.

    They say all that is needed to look, so that a relay need not know the models.

    Args:
        lookup: of all the values.
        values: with the ids of the rows.
    """
    told = [[base64.b64encode(value.key).decode(), sorted(values[value])] for value in values]
    for n in range(0, len(told), _VALUES_TOLD):
        yield {"lookup": asdict(lookup), "values": told[n : n + _VALUES_TOLD]}


def was_given_up(payload: Mapping[str, Any]) -> Mapping[Value, frozenset[int]]:
    """Return what the payload of an event says; see `given_up`."""
    told = dict(payload["lookup"])
    lookup = Lookup(**{**told, "key_type": KeyType(told["key_type"])})
    return {
        Value(lookup, base64.b64decode(key)): frozenset(row_ids)
        for key, row_ids in payload["values"]
    }
