"""The program's own do_orm_execute listeners see every statement, wherever it goes."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event, insert, select, update
from sqlalchemy.orm import ORMExecuteState, with_loader_criteria

from shardkit import Cluster, all_shards, ids
from shardkit.session import ReadSession
from tests.models import User

pytestmark = pytest.mark.integration

EVERY = select(User).order_by(User.id).options(all_shards())
KEYS = [ids.compose(1, 8 * i, i) for i in range(8)]


@pytest.fixture
def cluster_with_users(cluster: Cluster) -> Cluster:
    """Users on both servers."""
    for key in KEYS:
        with cluster.writer() as session:
            session.add(User(id=key, name=f"user {KEYS.index(key)}"))
            session.commit()
    return cluster


def listened(session: ReadSession, *listeners: Any) -> ReadSession:
    for listener in listeners:
        event.listen(session, "do_orm_execute", listener)
    return session


def test_listeners_see_each_statement_once(cluster_with_users: Cluster) -> None:
    seen: list[str] = []

    def listener(state: ORMExecuteState) -> None:
        seen.append("select" if state.is_select else "write")

    one = select(User).where(User.id == KEYS[0])
    with listened(cluster_with_users.reader(max_lag=1.0), listener) as session:
        assert len(session.scalars(one).all()) == 1
        assert seen == ["select"]
        assert len(session.scalars(EVERY).all()) == 8
        assert len(session.scalars(EVERY, execution_options={"yield_per": 3}).all()) == 8
        assert seen == ["select"] * 3
    seen.clear()
    alpha = [key for key in KEYS
             if cluster_with_users.topology.shard_map.owner(ids.shard_of(key)) == "alpha"]  # fmt: skip
    assert len(alpha) > 1
    with listened(cluster_with_users.writer(), listener) as session:
        session.execute(update(User).where(User.id.in_(alpha)).values(name="changed"))
        session.execute(update(User).where(User.id == alpha[0]).values(name="again"))
        rows = [{"id": ids.compose(2, ids.shard_of(key), 1), "name": "new"} for key in alpha]
        session.execute(insert(User), rows)
        assert seen == ["write"] * 3
        names = {user.name for user in session.scalars(EVERY)}
        assert {"changed", "again", "new"} < names


def test_what_a_listener_changes_decides_the_route(cluster_with_users: Cluster) -> None:
    def narrowed(state: ORMExecuteState) -> None:
        statement: Any = state.statement
        state.statement = statement.where(User.id.in_(KEYS[2:4]))

    def named(state: ORMExecuteState) -> None:
        state.statement = state.statement.options(with_loader_criteria(User, User.name != "user 3"))

    with listened(cluster_with_users.reader(max_lag=1.0), narrowed, named) as session:
        assert [user.name for user in session.scalars(select(User))] == ["user 2"]


def test_a_listener_may_answer_or_run_the_statement_itself(cluster_with_users: Cluster) -> None:
    calls: list[str] = []
    kept: dict[str, Any] = {}

    def cached(state: ORMExecuteState) -> Any:
        calls.append("cached")
        key = str(state.statement)
        if key not in kept:
            kept[key] = state.invoke_statement().freeze()
        return kept[key]()

    def after(_state: ORMExecuteState) -> None:
        calls.append("after")

    one = select(User).where(User.id == KEYS[0])
    with listened(cluster_with_users.reader(max_lag=1.0), cached, after) as session:
        for statement, n in ((EVERY, 8), (one, 1)):
            calls.clear()
            assert len(session.scalars(statement).all()) == n
            assert calls == ["cached", "after"]
            assert len(session.scalars(statement).all()) == n
            assert calls == ["cached", "after", "cached"], "answered from what was kept"


def test_a_bulk_insert_tells_the_keys_of_all_its_rows(cluster: Cluster) -> None:
    shards = [key for key in range(64) if cluster.topology.shard_map.owner(key) == "alpha"][:3]
    rows = [{"id": ids.compose(3, shards[i % 3], i), "name": f"{i}"} for i in range(9)]
    table: Any = User.__table__
    with cluster.writer() as session:
        result: Any = session.execute(insert(table), rows)
        assert [key[0] for key in result.inserted_primary_key_rows] == [row["id"] for row in rows]
