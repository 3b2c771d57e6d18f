"""The tables that the clients of the history test write to, and the rows that are there at first.

Every row is placed by its own id, or lives with one whose id every process can compose: nobody
has to tell the others where something is.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import ARRAY, BigInteger, Identity, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardkit import Sharded, ids, unique_lookup

__all__ = [
    "ACCOUNTS", "OPENED", "STAMP", "Account", "Base", "Chain", "Counter", "Effect", "Element", "Holder",
    "Note", "Page", "Register", "first_rows", "place",
]  # fmt: skip

ACCOUNTS = 4
OPENED = 1000
"""What each account has at first."""

# What a database says of itself, for the judge of owners: system, timeline, epoch. Written with
# the row, by the database that keeps it; takes no lock.
STAMP = """
CREATE SCHEMA IF NOT EXISTS history;
GRANT USAGE ON SCHEMA history TO PUBLIC;
CREATE OR REPLACE FUNCTION history.stamp(logical_shard integer) RETURNS text
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT s.system_identifier || ':' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)
        || ':' || o.epoch
    FROM pg_control_system() AS s, shardkit.ownership AS o WHERE o.logical_shard = $1
$$
"""


class Base(DeclarativeBase):
    """What the models of the history test derive from."""


class Chain(Sharded, Base):
    """A list to which values are appended."""

    __tablename__ = "chains"
    items: Mapped[list[int]] = mapped_column(ARRAY(BigInteger), server_default=text("'{}'"))


class Register(Sharded, Base):
    """One value, overwritten."""

    __tablename__ = "registers"
    value: Mapped[int | None]


class Element(Sharded, Base):
    """An element of a set; the set is nothing but an id."""

    __tablename__ = "elements"
    __shard_key__ = "set_id"
    set_id: Mapped[int] = mapped_column(index=True)
    value: Mapped[str]
    stamp: Mapped[str]
    number: Mapped[int] = mapped_column(BigInteger, Identity())


class Account(Sharded, Base):
    """An account of a bank; all accounts of a bank are on one logical shard."""

    __tablename__ = "accounts"
    __shard_key__ = "bank_id"
    bank_id: Mapped[int]
    balance: Mapped[int]


class Holder(Sharded, Base):
    """Who has a name that nobody else has."""

    __tablename__ = "holders"
    __shard_key__ = "home_id"
    __unique__ = (unique_lookup("name"),)
    home_id: Mapped[int]
    name: Mapped[str]
    owner: Mapped[str]


class Page(Sharded, Base):
    """A row that is cached; its number grows with every write."""

    __tablename__ = "pages"
    __cache_ttl__ = 300.0
    number: Mapped[int]


class Note(Sharded, Base):
    """A row that is not cached, and read from replicas."""

    __tablename__ = "notes"
    number: Mapped[int]


class Counter(Sharded, Base):
    """The position of the last event of a key."""

    __tablename__ = "counters"
    number: Mapped[int]


class Effect(Sharded, Base):
    """What an event has brought about, elsewhere."""

    __tablename__ = "effects"
    __shard_key__ = "home_id"
    home_id: Mapped[int]
    event: Mapped[str]


_TABLES = (Chain, Register, Account, Page, Note, Counter)


def place(model: type[Base] | str, shard: int, number: int) -> int:
    """Return the id of the nth row of a class on a logical shard, the same in every process."""
    # Each class has milliseconds of its own, long past: no minted id is like it.
    kinds = ("sets", "homes", "banks", *(each.__tablename__ for each in _TABLES))
    name = model if isinstance(model, str) else model.__tablename__
    ms, sequence = divmod(number, 1024)
    return ids.compose(1 + kinds.index(name) * 1000 + ms, shard, sequence)


def first_rows(shard: int, n_lists: int) -> Iterator[Base]:
    """Yield the rows that a logical shard has at first."""
    for n in range(n_lists):
        yield Chain(id=place(Chain, shard, n), items=[])
    for n in range(3):
        yield Register(id=place(Register, shard, n), value=None)
        yield Page(id=place(Page, shard, n), number=1)
        yield Note(id=place(Note, shard, n), number=1)
        yield Counter(id=place(Counter, shard, n), number=0)
    for n in range(ACCOUNTS):
        bank = place("banks", shard, 0)
        yield Account(id=place(Account, shard, n), bank_id=bank, balance=OPENED)
