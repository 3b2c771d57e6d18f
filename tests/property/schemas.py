"""Schemas made at random: models of every strategy and column type, and values for their columns.

Used by `tests.property.worlds`, which puts rows into them. A schema has a root that places itself,
a leaf that lives with its root, a twig that lives with its root or its leaf, and a reference
table. Nothing here talks to a server.
"""

from __future__ import annotations

import datetime as dt
import random
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Date,
    DateTime,
    Double,
    Integer,
    Numeric,
    String,
    Text,
    Uuid,
)
from sqlalchemy.orm import DeclarativeBase, foreign, mapped_column, relationship

from shardkit import Range, Reference, Sharded

__all__ = ["POOLS", "Schema", "family", "made"]

POOLS: Final[Mapping[str, tuple[Any, tuple[Any, ...]]]] = {
    "integer": (Integer(), (0, 1, 2, 2, 3, -7)),
    "bigint": (BigInteger(), (1, 2, 2, 2**40, -(2**40))),
    "numeric": (Numeric(12, 3), (Decimal("0.000"), Decimal("1.500"), Decimal("1.500"),
                                 Decimal("-2.250"), Decimal("1e8"), Decimal("NaN"))),
    "float": (Double(), (0.1, 0.2, 0.3, 1e300, -0.0, 0.0, float("nan"), float("-inf"))),
    "text": (Text(), ("", "ana", "bo", "Zoe", "é", "pt")),
    "boolean": (Boolean(), (True, False)),
    "date": (Date(), (dt.date(2026, 2, 28), dt.date(2026, 2, 28), dt.date(1999, 12, 31))),
    "timestamptz": (DateTime(timezone=True), (
        dt.datetime(2026, 3, 29, 0, 30, tzinfo=dt.UTC), dt.datetime(2026, 3, 29, 1, 30, tzinfo=dt.UTC),
        dt.datetime(2026, 3, 29, 1, 30, 0, 1, tzinfo=dt.UTC))),
    "uuid": (Uuid(), (uuid.UUID(int=0), uuid.UUID(int=7), uuid.UUID(int=2**127 + 7))),
}  # fmt: skip
"""Column types by name, with the values that rows get; some twice, so that rows tie."""

_KEYS: Final[Mapping[str, tuple[Any, tuple[Any, ...]]]] = {
    "bigint": (BigInteger(), tuple(range(-3, 30, 3))),
    "text": (Text(), ("", "a", "aa", "b", "B", "é", "z z", "0")),
    "uuid": (Uuid(), tuple(uuid.UUID(int=n << 121 | 5) for n in range(0, 128, 16))),
}
"""Types of natural keys, with the keys."""


@dataclass(frozen=True)
class Schema:
    """Models and what is known about them.

    Attributes:
        base: the declarative base; its metadata has every table.
        root: places itself.
        leaf: lives with its root.
        twig: lives with its root, or with its leaf.
        reference: on every physical shard.
        keys: names of the placing columns, by model.
        key_pool: keys of roots; empty when roots have minted ids.
        links: attributes that are relationships, with the model they lead to, by model.
    """

    base: type[DeclarativeBase]
    root: Any
    leaf: Any
    twig: Any
    reference: Any
    keys: Mapping[Any, tuple[str, ...]]
    key_pool: tuple[Any, ...]
    links: Mapping[Any, tuple[tuple[str, Any], ...]]

    @property
    def models(self) -> tuple[Any, ...]:
        """The sharded models."""
        return (self.root, self.leaf, self.twig)


def family(column: Any) -> str:
    """Return which columns a column can be compared with: those of the same family."""
    kind = column.type
    for name, types in (
        ("number", (Integer, Numeric, Double)),
        ("text", (String,)),
    ):
        if isinstance(kind, types):
            return name
    return str(kind.python_type.__name__)


def made(chance: random.Random, number: int, n_logical: int) -> Schema:
    """Return a schema; the same one for the same generator.

    Args:
        chance: decides.
        number: distinguishes its classes from those of other schemas.
        n_logical: how many logical shards ranges may name.
    """
    base: Any = type(f"Base{number}", (DeclarativeBase,), {"__doc__": "A base."})
    key_kind = ["minted", *_KEYS][number % 4]  # neighbours differ
    pool = () if key_kind == "minted" else _KEYS[key_kind][1]
    strategy = _strategy(chance, pool, n_logical)
    placed: dict[str, Any] = {"__shard_key__": "root", "__shard_strategy__": strategy}
    if key_kind == "minted":
        root: Any = _model("Root", number, base, chance, {})
        key, kind = "id", BigInteger()
    else:
        kind = _KEYS[key_kind][0]
        root = _model("Root", number, base, chance,
                      {**placed, "root": mapped_column(kind, primary_key=True)})  # fmt: skip
        key = "root"
    keys: dict[Any, tuple[str, ...]] = {root: (key,)}
    leaf, keys[leaf] = _below("Leaf", number, base, chance, placed, kind)
    has_id = "id" in keys[leaf]
    if has_id and chance.random() < 0.5:
        twig = _model("Twig", number, base, chance, {
            "__shard_key__": "leaf_id",
            "leaf_id": mapped_column(BigInteger(), primary_key=True),
            "seat": mapped_column(Integer(), primary_key=True),
        })  # fmt: skip
        keys[twig] = ("leaf_id",)
        twigs = relationship(twig, primaryjoin=foreign(twig.leaf_id) == leaf.id, viewonly=True)
    else:
        twig, keys[twig] = _below("Twig", number, base, chance, placed, kind)
        twigs = relationship(
            twig, primaryjoin=leaf.root == foreign(twig.root), viewonly=True, uselist=True
        )
    leaf.twigs = twigs
    root.leaves = relationship(
        leaf, primaryjoin=getattr(root, key) == foreign(leaf.root), viewonly=True, uselist=True
    )
    leaf.parent = relationship(
        root, primaryjoin=foreign(leaf.root) == getattr(root, key), viewonly=True, uselist=False
    )
    reference: Any = type(f"Reference{number}", (Reference, base), {
        "__tablename__": "lands", "__doc__": "A reference table.",
        "code": mapped_column(Text(), primary_key=True), "size": mapped_column(Integer()),
    })  # fmt: skip
    links = {root: (("leaves", leaf),), leaf: (("parent", root), ("twigs", twig)), twig: ()}
    return Schema(base, root, leaf, twig, reference, keys, pool, links)


def _strategy(chance: random.Random, pool: tuple[Any, ...], n_logical: int) -> Any:
    if not pool:
        return "embedded"
    if chance.random() < 0.5:
        return "hash"
    bounds = sorted(chance.sample(sorted(pool), 3))
    return Range([(b, chance.randrange(n_logical)) for b in bounds], chance.randrange(n_logical))


def _below(
    name: str, number: int, base: Any, chance: random.Random, placed: dict[str, Any], kind: Any
) -> tuple[Any, tuple[str, ...]]:
    """Return a model that lives with its root, and the names of its placing columns."""
    if chance.random() < 0.5:
        return _model(name, number, base, chance, {**placed, "root": mapped_column(kind)}), (
            "root", "id",
        )  # fmt: skip
    natural = {
        "root": mapped_column(kind, primary_key=True),
        "seat": mapped_column(Integer(), primary_key=True, autoincrement=False),
    }
    return _model(name, number, base, chance, {**placed, **natural}), ("root",)


def _model(name: str, number: int, base: Any, chance: random.Random, body: dict[str, Any]) -> Any:
    """Return a sharded model with some columns of any type beside its keys."""
    kinds = chance.sample(sorted(POOLS), 3)
    columns = {f"v_{kind}": mapped_column(POOLS[kind][0], nullable=chance.random() < 0.7)
               for kind in kinds}  # fmt: skip
    columns["n"] = mapped_column(Integer(), nullable=True)
    columns["label"] = mapped_column(Text(), nullable=chance.random() < 0.5)
    return type(f"{name}{number}", (Sharded, base), {
        "__tablename__": name.lower(), "__doc__": f"A {name.lower()}.", **body, **columns,
    })  # fmt: skip
