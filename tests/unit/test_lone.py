"""Which commits are one INSERT and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import pytest
from sqlalchemy import ForeignKey, event
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    WriteOnlyMapped,
    mapped_column,
    relationship,
)
from sqlalchemy.orm.attributes import instance_state

from shardkit.lone import is_lone_insert
from shardkit.writer import WriteSession
from tests.models import Account, Handle, Photo, User

T = TypeVar("T")


class Base(DeclarativeBase):
    """Models that the shared ones have no like of."""


class Stamped(Base):
    """A default may use the connection: it is handed over."""

    __tablename__ = "stamped"
    id: Mapped[int] = mapped_column(primary_key=True)
    stamp: Mapped[int] = mapped_column(default=lambda: 1)


class Parent(Base):
    __tablename__ = "parents"
    id: Mapped[int] = mapped_column(primary_key=True)
    children: WriteOnlyMapped[Child] = relationship()


class Owner(Base):
    __tablename__ = "owners"
    id: Mapped[int] = mapped_column(primary_key=True)
    children: DynamicMapped[Child] = relationship()


class Child(Base):
    __tablename__ = "children"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey(Parent.id))
    owner_id: Mapped[int] = mapped_column(ForeignKey(Owner.id))
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "child"}  # noqa: RUF012


class Grandchild(Child):
    """One object, two tables."""

    __tablename__ = "grandchildren"
    id: Mapped[int] = mapped_column(ForeignKey(Child.id), primary_key=True)
    __mapper_args__ = {"polymorphic_identity": "grandchild"}  # noqa: RUF012


@pytest.fixture
def session() -> WriteSession:
    """A session that has no servers yet."""
    return WriteSession(cast("Any", None))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Handle(name="ana", user_id=1),
        lambda: User(name="ana"),
        lambda: Photo(owner_id=1, caption="dawn"),
        lambda: Child(kind="child"),
    ],
)
def test_one_new_object_of_one_table_is_alone(
    session: WriteSession, make: Callable[[], object]
) -> None:
    session.add(make())
    assert is_lone_insert(session)


def stored(session: WriteSession) -> User:
    return keep(session, User(id=5, name="ana", photos=[]))


def keep(session: WriteSession, made: T) -> T:
    """Have the session believe that an object is in the database."""
    session.add(made)
    state = instance_state(made)
    state._commit_all(state.dict, session.identity_map)
    session._register_persistent({state})
    assert not session.new
    assert not session.dirty
    return made


def two(session: WriteSession) -> None:
    session.add_all([Handle(name="ana", user_id=1), Handle(name="bo", user_id=2)])


def unique(session: WriteSession) -> None:
    session.add(Account(name="ana"))


def changed(session: WriteSession) -> None:
    user = stored(session)
    user.name = "bo"
    session.add(Handle(name="ana", user_id=1))


def deleted(session: WriteSession) -> None:
    session.delete(stored(session))
    session.add(Handle(name="ana", user_id=1))


def with_children(session: WriteSession) -> None:
    session.add(User(name="ana", photos=[Photo()]))


def beside_stored_parent(session: WriteSession) -> None:
    session.add(Photo(owner=stored(session)))


def into_stored_collection(session: WriteSession) -> None:
    user = stored(session)
    user.photos.append(Photo())


def into_unloaded_collection(session: WriteSession) -> None:
    parent = keep(session, Parent(id=5))
    parent.children.add(Child(kind="child"))


def inside_savepoint(session: WriteSession) -> None:
    session.begin_nested()
    session.add(Handle(name="ana", user_id=1))


@pytest.mark.parametrize(
    "fill",
    [
        lambda _: None,
        two,
        unique,
        changed,
        deleted,
        with_children,
        beside_stored_parent,
        into_stored_collection,
        into_unloaded_collection,
        inside_savepoint,
        lambda session: session.add(Stamped(id=1)),
        lambda session: session.add(Parent(id=1)),
        lambda session: session.add(Owner(id=1)),
        lambda session: session.add(Grandchild(id=1)),
    ],
)
def test_anything_more_is_not(
    session: WriteSession, fill: Callable[[WriteSession], object]
) -> None:
    fill(session)
    assert not is_lone_insert(session)


@pytest.mark.parametrize(
    "name",
    [
        "after_begin",
        "after_flush",
        "after_flush_postexec",
        "after_transaction_create",
        "before_commit",
        "before_flush",
        "pending_to_persistent",
    ],
)
@pytest.mark.parametrize("on_class", [True, False])
def test_no_listener_may_come_between(session: WriteSession, name: str, on_class: bool) -> None:
    session.add(Handle(name="ana", user_id=1))
    assert is_lone_insert(session)
    target = WriteSession if on_class else session

    def listener(*_: object) -> None:
        """Might use the connection."""

    event.listen(target, name, listener)
    try:
        assert not is_lone_insert(session)
    finally:
        event.remove(target, name, listener)
    assert is_lone_insert(session)


@pytest.mark.parametrize("name", ["after_insert", "before_insert", "refresh_flush"])
def test_no_listener_of_the_class_either(session: WriteSession, name: str) -> None:
    session.add(Handle(name="ana", user_id=1))

    def listener(*_: object) -> None:
        """Might use the connection."""

    event.listen(Handle, name, listener)
    try:
        assert not is_lone_insert(session)
    finally:
        event.remove(Handle, name, listener)
    assert is_lone_insert(session)
