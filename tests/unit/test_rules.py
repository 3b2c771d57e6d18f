"""What a model may declare about the placing of its rows."""

from __future__ import annotations

import uuid
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Boolean,
    Enum,
    Float,
    Integer,
    LargeBinary,
    Numeric,
    String,
    Text,
    Uuid,
)
from sqlalchemy.dialects.postgresql import CITEXT
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import CHAR, TypeDecorator

from shardkit import Directory, Range, Sharded
from shardkit.errors import ConfigurationError
from shardkit.models import rules_of, sharding_of
from shardkit.strategies import Hash


class Folded(TypeDecorator[str]):
    """Text that the database holds in another case."""

    impl = Text
    cache_ok = True


def declare(strategy: Any, kind: Any) -> type[Any]:
    class Base(DeclarativeBase):
        pass

    class Thing(Sharded, Base):
        __tablename__ = "things"
        __shard_key__ = "key"
        __shard_strategy__ = strategy
        key: Mapped[Any] = mapped_column(kind, primary_key=True)

    return Thing


FITTING = [
    ("embedded", BigInteger), ("hash", Integer), ("hash", Text), ("hash", String(30)),
    ("hash", Uuid), ("hash", Uuid(as_uuid=False)), ("hash", LargeBinary), (Hash(), Text),
    (Directory("d"), Text), (Range([(5, 1)]), Integer), (Range([("m", 1)]), String),
    (Range([(uuid.UUID(int=5), 1)]), Uuid),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "kind"), FITTING)
def test_a_rule_is_a_strategy_and_a_type_that_fit(strategy: Any, kind: Any) -> None:
    thing = declare(strategy, kind)
    assert (
        rules_of(thing.metadata)["things"] == rules_of(declare(strategy, kind).metadata)["things"]
    )


UNFIT = [
    ("embedded", Text), ("embedded", Uuid), ("hash", Float), ("hash", Numeric), ("hash", Boolean),
    ("hash", CHAR(5)), ("hash", CITEXT), ("hash", Enum("a", "b")), ("hash", Folded),
    (Range([(5, 1)]), Text), (Range([("5", 1)]), Uuid), (Range([("5", 1)]), Integer),
    ("range", Integer), ("directory", Text), ("Hash", Text), (None, Text), (Hash, Text), (5, Text),
    (Decimal(1), Text), ("x" * 10_000, Text),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "kind"), UNFIT)
def test_what_does_not_fit_is_refused_with_the_class_named(strategy: Any, kind: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^Thing: ") as caught:
        declare(strategy, kind)
    assert len(str(caught.value)) < 400


def test_columns_of_other_types_are_not_co_located() -> None:
    rules = [
        sharding.rule
        for kind in (Integer, BigInteger, Text, Uuid)
        if (sharding := sharding_of(declare("hash", kind).__table__)) is not None
    ]
    assert rules[0] == rules[1]
    assert len(set(rules)) == 3


def test_the_recorded_text_never_changes() -> None:
    """Golden: it is stored with the data and compared as text."""
    assert {
        name: rules_of(declare(strategy, kind).metadata)["things"]
        for name, strategy, kind in (
            ("embedded", "embedded", BigInteger),
            ("hash", "hash", Text),
            ("range", Range([(5, 1)], rest=2), Integer),
            ("directory", Directory("d"), Uuid),
        )
    } == {
        "embedded": '{"column": "key", "strategy": "embedded", "type": "integer"}',
        "hash": '{"column": "key", "strategy": "hash", "type": "text", "version": 1}',
        "range": '{"bounds": [[5, 1]], "column": "key", "rest": 2, "strategy": "range", "type": "integer"}',
        "directory": '{"column": "key", "directory": "d", "strategy": "directory", "type": "uuid", "version": 1}',
    }
