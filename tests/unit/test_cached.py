"""Which classes can be cached, what is written to remedy others, and rows to bytes and back."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import (
    ARRAY,
    CHAR,
    JSON,
    BigInteger,
    DateTime,
    Enum,
    ForeignKey,
    Integer,
    LargeBinary,
    Numeric,
    String,
    TypeDecorator,
    Uuid,
    inspect,
)
from sqlalchemy.dialects.postgresql import CITEXT, INET, JSONB
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    column_property,
    declared_attr,
    mapped_column,
    relationship,
)

from shardkit import Reference, Sharded
from shardkit.cached import CachePlan, plan_of
from shardkit.errors import NotCacheableError


class Mood(enum.Enum):
    GOOD = "g"
    BAD = "b"


class Words(TypeDecorator[list[str]]):
    impl = String
    cache_ok = True

    def process_bind_param(self, value: list[str] | None, _dialect: Any) -> str | None:
        return None if value is None else " ".join(value)

    def process_result_value(self, value: str | None, _dialect: Any) -> list[str] | None:
        return None if value is None else value.split()


class Base(DeclarativeBase):
    pass


class Author(Sharded, Base):
    __tablename__ = "authors"
    __cache_ttl__ = 300.0
    name: Mapped[str]
    mood: Mapped[Mood | None]
    role: Mapped[str] = mapped_column(Enum("editor", "writer", name="role"))
    tags: Mapped[list[str] | None] = mapped_column(Words)
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)
    numbers: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    fee: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    born: Mapped[dt.date]
    seen: Mapped[dt.datetime] = mapped_column(DateTime(timezone=True))
    token: Mapped[uuid.UUID]
    face: Mapped[bytes]
    ratio: Mapped[float]
    alarm: Mapped[dt.time]
    pause: Mapped[dt.timedelta]
    is_active: Mapped[bool]
    essay: Mapped[str] = mapped_column(deferred=True)


class Page(Sharded, Base):
    __tablename__ = "pages"
    __shard_key__ = "author_id"
    __cache_ttl__ = 60
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    author: Mapped[Author] = relationship()


def plan(cls: type[Any]) -> CachePlan:
    found = plan_of(inspect(cls))
    assert found is not None
    return found


ROW: dict[str, Any] = {
    "id": 12, "name": "Ana", "mood": Mood.BAD, "role": "editor", "tags": ["a", "b"],
    "data": {"a": [1, None, "x"]}, "numbers": [1, 2**40], "fee": Decimal("1.20"),
    "born": dt.date(1999, 1, 2), "seen": dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=dt.UTC),
    "token": uuid.UUID(int=5), "face": b"\x00\xff", "ratio": 0.1, "alarm": dt.time(1, 2),
    "pause": dt.timedelta(days=-1, seconds=3), "is_active": True, "version": 9,
}  # fmt: skip


def test_a_row_comes_back_as_it_was() -> None:
    author = plan(Author)
    assert "essay" not in author.attributes, "deferred"
    values = [ROW[name] for name in author.attributes]
    payload = author.encode(values)
    assert payload is not None
    back = author.decode(payload, 9)
    assert back == values
    assert [type(value) for value in back] == [type(value) for value in values]
    empty = [None if name in {"mood", "tags"} else ROW[name] for name in author.attributes]
    payload = author.encode(empty)
    assert payload is not None
    assert author.decode(payload, 9) == empty
    assert author.identity(values) == (12,)


def test_what_is_no_row_of_this_class_and_version_is_a_miss() -> None:
    author = plan(Author)
    values = [ROW[name] for name in author.attributes]
    payload = author.encode(values)
    assert payload is not None
    assert author.decode(payload, 8) is None, "the entry says another version than the row"
    for end in range(len(payload)):
        assert author.decode(payload[:end], 9) is None
    other = plan(Page).encode([1, 2, 9])
    assert other is not None
    assert author.decode(other, 9) is None
    unknown = payload.replace(b"\xa3BAD", b"\xa3MAD")
    assert unknown != payload
    assert author.decode(unknown, 9) is None, "a member that this program does not have"


def test_rows_that_are_too_large_or_strange_are_not_cached() -> None:
    author = plan(Author)
    assert (
        author.encode([ROW[n] if n != "name" else "x" * 2**20 for n in author.attributes]) is None
    )
    assert author.encode([ROW[n] if n != "name" else object() for n in author.attributes]) is None
    assert author.encode([ROW[n] if n != "mood" else "no" for n in author.attributes]) is None


def test_other_columns_have_other_names_of_entries() -> None:
    class OtherBase(DeclarativeBase):
        pass

    class Later(Sharded, OtherBase):
        __tablename__ = "pages"
        __shard_key__ = "author_id"
        __cache_ttl__ = 60
        author_id: Mapped[int] = mapped_column(primary_key=True)
        number: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str | None]

    now, later = plan(Page), plan(Later)
    assert now.key("c.1", 1, 3, (1, 2)) == "c.1:1:3:pages:1,2"
    assert now.schema != later.schema
    assert now.identity([4, 5, 9]) == (4, 5)


NAIVE = dt.datetime.fromisoformat("2026-01-01T00:00:00")


@pytest.mark.parametrize(
    ("name", "value"),
    [("fee", Decimal("1.2")), ("name", 5), ("seen", NAIVE), ("tags", ["a"]),
     ("ratio", 1), ("is_active", 1), ("data", {1: 2}), ("data", (1,)), ("numbers", (1,)),
     ("born", NAIVE), ("token", "text"), ("mood", "GOOD")],
)  # fmt: skip
def test_what_the_database_may_change_is_not_known(name: str, value: Any) -> None:
    author = plan(Author)
    known = {**ROW, "fee": None, "tags": None}
    assert author.image(known) == [known[each] for each in author.attributes]
    assert author.image({**known, name: value}) is None


def test_what_is_not_loaded_is_not_known() -> None:
    assert plan(Page).image({"author_id": 1, "number": 2}) is None
    assert plan(Page).image({"author_id": 1, "number": 2, "version": 3}) == [1, 2, 3]


def test_only_keys_as_the_database_writes_them_name_a_row() -> None:
    page = plan(Page)
    assert page.names_row((1, 2))
    for other in [(1, True), (1, "2"), (1.0, 2), (1,), (1, 2, 3), (1, None)]:
        assert not page.names_row(other)


def test_a_class_gets_its_version_and_says_how_its_objects_are_loaded() -> None:
    column = Author.__table__.c.version
    assert isinstance(column.type, BigInteger)
    assert not column.nullable
    assert plan(Author).loads_alone
    assert plan(Page).loads_alone
    assert plan(Author).ttl == 300.0

    class Plain(Sharded, Base):
        __tablename__ = "plain"

    assert "version" not in Plain.__table__.c
    assert plan_of(inspect(Plain)) is None


def _class(**members: Any) -> Callable[[], Any]:
    def make() -> Any:
        class OwnBase(DeclarativeBase):
            pass

        annotations = members.pop("__annotations__", {})
        names = {"__tablename__": "bad", "__cache_ttl__": 5.0, **members}
        made = type("Bad", (Sharded, OwnBase), {**names, "__annotations__": annotations})
        return plan_of(inspect(made))

    return make


def _inherited() -> Any:
    class OwnBase(DeclarativeBase):
        pass

    class Parent(Sharded, OwnBase):
        __tablename__ = "parent"
        __cache_ttl__ = 5.0
        kind: Mapped[str]

        @declared_attr.directive
        @classmethod
        def __mapper_args__(cls) -> dict[str, Any]:
            return {"polymorphic_on": "kind"}


def _reference() -> Any:
    class OwnBase(DeclarativeBase):
        pass

    class Country(Reference, OwnBase):
        __tablename__ = "countries"
        __cache_ttl__ = 5.0
        code: Mapped[str] = mapped_column(primary_key=True)


REFUSED = [
    ("no time", _class(__cache_ttl__=0), "give seconds from 1 to 2,592,000"),
    ("text for seconds", _class(__cache_ttl__="5"), "give seconds"),
    ("for ever", _class(__cache_ttl__=float("inf")), "give seconds"),
    ("a version that is none", _class(version=mapped_column(String)), "write version: Mapped[int]"),
    ("a small version", _class(version=mapped_column(Integer, nullable=False)), "mapped_column(Big"),
    ("a version without a row", _class(version=mapped_column(BigInteger, deferred=True,
     nullable=False)), "version is deferred"),
    ("a type without a codec", _class(address=mapped_column(INET)), "address, a INET"),
    ("an expression", _class(twice=column_property(mapped_column(Integer).column + 1)),
     "is an expression"),
    ("a padded key", _class(__shard_key__="code", __shard_strategy__="hash",
     code=mapped_column(CHAR(3), primary_key=True)), "by several values of code, a CHAR"),
    ("a folded part of a key", _class(__shard_key__="code", __shard_strategy__="hash",
     code=mapped_column(String, primary_key=True), name=mapped_column(CITEXT, primary_key=True)),
     "by several values of name, a CITEXT"),
    ("a key with a collation", _class(__shard_key__="code", __shard_strategy__="hash",
     code=mapped_column(String(collation="folding"), primary_key=True)), "by several values"),
    ("a UUID as text", _class(__shard_key__="code", __shard_strategy__="hash",
     code=mapped_column(Uuid(as_uuid=False), primary_key=True)), "by several values of code"),
    ("classes that share rows", _inherited, "inherit from each other"),
    ("a reference table", _reference, "reference tables are on every server"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_cannot_be_cached_says_what_to_write(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(NotCacheableError) as caught:
        make()
    assert message in str(caught.value)


def test_json_and_bytes_of_any_kind_are_cached_as_keys_or_values() -> None:
    class OwnBase(DeclarativeBase):
        pass

    class Blob(Sharded, OwnBase):
        __tablename__ = "blobs"
        __shard_key__ = "digest"
        __shard_strategy__ = "hash"
        __cache_ttl__ = 5
        digest: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
        body: Mapped[Any] = mapped_column(JSON)

    blob = plan(Blob)
    payload = blob.encode([b"\xff", [1, {"a": None}], 3])
    assert payload is not None
    assert blob.decode(payload, 3) == [b"\xff", [1, {"a": None}], 3]
    assert blob.key(1, 1, 0, (b"\xff",)).isascii()
