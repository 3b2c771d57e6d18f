"""A unit of work is committed once, or is known to have failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from shardkit import AsyncCluster, AsyncWriteSession, Cluster, WriteSession, ids
from shardkit.errors import (
    EndpointUnavailableError,
    OperationMismatchError,
    OutcomeUnknownError,
    UnsupportedStatementError,
)
from shardkit.topology import Topology, schema_name
from tests.fixtures.sharded import admin
from tests.models import Photo, User

pytestmark = pytest.mark.integration


@pytest.fixture
def user(cluster: Cluster) -> User:
    with cluster.writer() as session:
        user = User(name="ana")
        session.add(user)
        session.commit()
    return user


def n_photos(cluster: Cluster, user: User) -> int:
    with cluster.writer() as session:
        return len(session.scalars(select(Photo).where(Photo.owner_id == user.id)).all())


def posting(user: User) -> Callable[[WriteSession], dict[str, Any]]:
    def post(session: WriteSession) -> dict[str, Any]:
        photo = Photo(owner_id=user.id, caption="dawn")
        session.add(photo)
        session.flush()
        return {"id": str(photo.id), "tags": ("a", "b")}

    return post


def test_a_unit_is_committed_and_returns_what_it_returns(cluster: Cluster, user: User) -> None:
    value = object()

    def post(session: WriteSession) -> object:
        session.add(Photo(owner_id=user.id, caption="dawn"))
        return value

    assert cluster.run(post) is value
    assert n_photos(cluster, user) == 1


def test_a_named_unit_works_once_and_returns_its_first_result(cluster: Cluster, user: User) -> None:
    post = posting(user)
    first = cluster.run(post, operation="post-1", near=user.id)
    assert first == {"id": first["id"], "tags": ["a", "b"]}, "as JSON has it"
    assert cluster.run(post, operation="post-1", near=user.id) == first
    assert cluster.run(post, operation="post-1", near=(Photo, user.id)) == first
    assert n_photos(cluster, user) == 1
    assert cluster.run(post, operation="post-2", near=user.id) != first
    assert n_photos(cluster, user) == 2


@pytest.mark.anyio
async def test_the_async_twin_works_once_too(
    cluster: Cluster, user: User, cluster_file: Path
) -> None:
    async def post(session: AsyncWriteSession) -> str:
        photo = Photo(owner_id=user.id, caption="dawn")
        session.add(photo)
        await session.flush()
        return str(photo.id)

    async with AsyncCluster.from_file(cluster_file) as twin:
        first = await twin.run(post, operation="post-1", near=user.id)
        assert await twin.run(post, operation="post-1", near=user.id) == first
        assert n_photos(cluster, user) == 1
        await twin.run(post)
        assert n_photos(cluster, user) == 2


def test_a_unit_that_fails_leaves_neither_rows_nor_record(cluster: Cluster, user: User) -> None:
    def fail(session: WriteSession) -> None:
        session.add(Photo(owner_id=user.id, caption="dawn"))
        session.flush()
        raise LookupError("no such album")

    for _ in range(2):
        with pytest.raises(LookupError):
            cluster.run(fail, operation="post-1", near=user.id)
    assert n_photos(cluster, user) == 0
    cluster.run(posting(user), operation="post-1", near=user.id)
    assert n_photos(cluster, user) == 1


def test_a_name_with_another_fingerprint_is_refused(cluster: Cluster, user: User) -> None:
    post = posting(user)
    cluster.run(post, operation="post-1", near=user.id, fingerprint="a")
    with pytest.raises(OperationMismatchError) as caught:
        cluster.run(post, operation="post-1", near=user.id, fingerprint="b")
    assert not caught.value.retryable
    assert n_photos(cluster, user) == 1


def test_a_second_run_waits_for_the_first_and_returns_its_result(
    cluster: Cluster, user: User
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    results: list[object] = []

    def slow(session: WriteSession) -> str:
        session.add(Photo(owner_id=user.id, caption="dawn"))
        session.flush()
        inside.set()
        assert go_on.wait(10)
        return "first"

    def other(_: WriteSession) -> str:
        raise AssertionError("runs although the first is under way")

    def start(fn: Callable[[WriteSession], str]) -> threading.Thread:
        thread = threading.Thread(
            target=lambda: results.append(cluster.run(fn, operation="post-1", near=user.id))
        )
        thread.start()
        return thread

    first = start(slow)
    assert inside.wait(10)
    second = start(other)
    go_on.set()
    first.join()
    second.join()
    assert results == ["first", "first"]


def test_a_deadlock_is_run_again(cluster: Cluster, user: User) -> None:
    runs = []
    schema = schema_name(ids.shard_of(user.id))
    raised = text("DO $$ BEGIN RAISE EXCEPTION USING errcode = '40P01'; END $$")

    def post(session: WriteSession) -> int:
        session.add(Photo(owner_id=user.id, caption="dawn"))
        session.flush()
        runs.append(schema)
        if len(runs) < 3:
            session.execute(raised, bind_arguments={"logical_shard": ids.shard_of(user.id)})
        return len(runs)

    assert cluster.run(post) == 3
    assert n_photos(cluster, user) == 1


def test_what_cannot_succeed_is_run_once(cluster: Cluster) -> None:
    runs = []

    def post(session: WriteSession) -> None:
        runs.append(1)
        session.execute(text("SELECT 1 / 0"), bind_arguments={"logical_shard": 0})

    with pytest.raises(DBAPIError, match="division"):
        cluster.run(post)
    assert runs == [1]


def test_a_killed_backend_is_run_again_elsewhere(
    cluster: Cluster, user: User, topology: Topology
) -> None:
    runs = []
    shard = ids.shard_of(user.id)
    physical = topology.physical[topology.shard_map.owner(shard)]

    def post(session: WriteSession) -> None:
        session.add(Photo(owner_id=user.id, caption="dawn"))
        session.flush()
        pid = session.scalar(
            text("SELECT pg_backend_pid()"), bind_arguments={"logical_shard": shard}
        )
        runs.append(pid)
        if len(runs) == 1:
            with admin(physical) as other:
                other.execute("SELECT pg_terminate_backend(%s)", [pid])
            session.scalar(text("SELECT 1"), bind_arguments={"logical_shard": shard})

    cluster.run(post)
    assert len(set(runs)) == 2
    assert n_photos(cluster, user) == 1


def test_a_unit_does_not_commit_itself(cluster: Cluster, user: User) -> None:
    def post(session: WriteSession) -> None:
        session.add(Photo(owner_id=user.id, caption="dawn"))
        session.commit()

    with pytest.raises(UnsupportedStatementError, match=r"run\(\)"):
        cluster.run(post)
    assert n_photos(cluster, user) == 0


def test_expired_names_are_forgotten_and_cleaned_up(
    cluster: Cluster, user: User, topology: Topology
) -> None:
    shard = ids.shard_of(user.id)
    post = posting(user)
    for number in range(15):
        cluster.run(post, operation=f"post-{number}", near=user.id)
    table = f"{schema_name(shard)}.shardkit_operations"
    with admin(topology.physical[topology.shard_map.owner(shard)]) as owner:
        owner.execute(f"UPDATE {table} SET expires_at = now() - interval '1 second'")
        cluster.run(post, operation="post-0", near=user.id)
        assert n_photos(cluster, user) == 16, "it means something new"
        assert _count(owner, table) == 5, "ten are deleted, and what is run is kept"
        cluster.run(post, operation="new", near=user.id)
        assert _count(owner, table) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operation": "x"}, "near which id"),
        ({"near": 1}, "go with operation"),
        ({"fingerprint": "f"}, "go with operation"),
        ({"operation": "", "near": True}, "1 to 255"),
        ({"operation": "x" * 256, "near": True}, "1 to 255"),
        ({"operation": "a\0b", "near": True}, "without NUL"),
    ],
)
def test_a_bad_name_is_refused(
    cluster: Cluster, user: User, arguments: dict[str, Any], message: str
) -> None:
    if arguments.get("near") is True:
        arguments = {**arguments, "near": user.id}
    with pytest.raises(ValueError, match=message):
        cluster.run(posting(user), **arguments)
    assert n_photos(cluster, user) == 0


@pytest.mark.parametrize("result", [object(), float("nan"), "x" * 70_000, {1, 2}])
def test_a_result_that_cannot_be_kept_undoes_the_unit(
    cluster: Cluster, user: User, result: object
) -> None:
    def post(session: WriteSession) -> object:
        session.add(Photo(owner_id=user.id, caption="dawn"))
        return result

    with pytest.raises(ValueError, match=r"JSON|Out of range"):
        cluster.run(post, operation="post-1", near=user.id)
    assert n_photos(cluster, user) == 0


@pytest.mark.parametrize("is_named", [True, False])
def test_a_lost_answer_to_commit_is_settled_by_the_record(
    cluster: Cluster, user: User, monkeypatch: pytest.MonkeyPatch, is_named: bool
) -> None:
    """The server commits, and the connection is cut before the client reads its answer."""
    from shardkit import waits

    lost: list[int] = []
    commit = waits.Connection.commit

    def lossy(connection: waits.Connection) -> None:
        commit(connection)
        if not lost:
            lost.append(1)
            connection.pgconn.finish()
            raise psycopg.OperationalError("the answer was lost")

    monkeypatch.setattr(waits.Connection, "commit", lossy)
    if is_named:
        found = cluster.run(posting(user), operation="post-1", near=user.id)
        assert found["tags"] == ["a", "b"]
    else:
        with pytest.raises(OutcomeUnknownError):
            cluster.run(posting(user))
    assert lost
    assert n_photos(cluster, user) == 1


@pytest.mark.slow
def test_an_outcome_stays_unknown_where_nobody_can_be_asked(
    cluster: Cluster, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the last attempt has committed nothing says nothing of the first."""
    from shardkit import units, waits

    lost: list[int] = []
    commit, begin = waits.Connection.commit, units.Unit.begin

    def lossy(connection: waits.Connection) -> None:
        commit(connection)
        lost.append(1)
        connection.pgconn.finish()
        raise psycopg.OperationalError("the answer was lost")

    def unasked(unit: units.Unit) -> Any:
        if lost:
            raise EndpointUnavailableError("it does not answer")
        return begin(unit)

    monkeypatch.setattr(waits.Connection, "commit", lossy)
    monkeypatch.setattr(units.Unit, "begin", unasked)
    with pytest.raises(OutcomeUnknownError) as raised:
        cluster.run(posting(user), operation="post-2", near=user.id)
    assert isinstance(raised.value.__cause__, EndpointUnavailableError)
    assert n_photos(cluster, user) == 1


def _count(owner: psycopg.Connection[tuple[object, ...]], table: str) -> object:
    found = owner.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert found is not None
    return found[0]
