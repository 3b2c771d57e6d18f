"""What travels to the server for one transaction, and that it is one."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import generators
from psycopg.pq import Trace
from sqlalchemy import event, select, text
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError

from shardkit import AsyncCluster, Cluster, ids
from shardkit.connections import Purpose
from shardkit.strategies import hash_shard
from shardkit.testing import wait_until
from shardkit.tokens import ASK_PRIMARIES
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


class Sent:
    """What a connection sent and received, filled in when watching ends."""

    messages: Counter[str]
    texts: str
    n_round_trips: int
    """How often the server's turn came: what it answers goes back together."""


@contextmanager
def traced(driver: Any) -> Iterator[Sent]:
    sent = Sent()
    with tempfile.TemporaryFile("w+") as file:
        driver.pgconn.trace(file.fileno())
        driver.pgconn.set_trace_flags(Trace.SUPPRESS_TIMESTAMPS)
        try:
            yield sent
        finally:
            driver.pgconn.untrace()
        file.seek(0)
        sent.texts = file.read()
    lines = [line.split("\t") for line in sent.texts.splitlines()]  # and those of long SQL
    sent.messages = Counter(f"{line[0]} {line[2]}" for line in lines if len(line) > 2)
    turns = "".join(line[0] for line in lines if len(line) > 2)
    sent.n_round_trips = turns.count("FB")


def driver_of(cluster: Cluster, shard: int) -> Any:
    """The pooled connection that the next writer of a logical shard gets."""
    connections = cluster.connections
    primary = connections.primary_of(connections.physical_of(shard))
    with connections.engine(primary, Purpose.WRITE).connect() as connection:
        return connection.connection.driver_connection


def check_alone(sent: Sent, driver: Any) -> None:
    """One round trip; a pooler is sent one Sync in it."""
    assert sent.n_round_trips == 1
    assert ("BEGIN" not in sent.texts) is driver.is_direct
    assert ("COMMIT" not in sent.texts) is driver.is_direct
    assert sent.messages["F Sync"] == (2 if driver.is_direct else 1)


def test_one_new_object_is_one_round_trip(cluster: Cluster, user: User) -> None:
    driver = driver_of(cluster, ids.shard_of(user.id))
    with traced(driver) as sent, cluster.writer() as session:
        photo = Photo(owner_id=user.id, caption="dawn")
        session.add(photo)
        session.commit()
        assert session.token
    check_alone(sent, driver)
    with cluster.reader(after=ASK_PRIMARIES) as reader:
        assert reader.get_one(Photo, photo.id).caption == "dawn"


def test_a_commit_with_an_event_and_its_position_is_one_conversation(
    cluster: Cluster, user: User
) -> None:
    """Between two Syncs a pooler could give the server to somebody else: see `shardkit.gates`."""
    driver, sent = driver_of(cluster, ids.shard_of(user.id)), Sent()
    for _ in range(8):  # by then what is sent last has been prepared
        with cluster.writer() as session:
            session.get_one(User, user.id).name += "!"
            session.emit("named", user.name, key=user.id)
            session.flush()
            with traced(driver) as sent:
                session.commit()
            assert session.token
    assert sent.n_round_trips == 1
    assert sent.messages["F Sync"] == 1


def test_begin_travels_with_the_first_statement(cluster: Cluster, user: User) -> None:
    with traced(driver_of(cluster, ids.shard_of(user.id))) as sent, cluster.writer() as session:
        session.get_one(User, user.id).name = "bo"
        session.flush()
        session.add(Photo(owner_id=user.id))
        session.commit()
    assert sent.texts.count('"" "BEGIN"') == 1
    assert sent.n_round_trips == 4, "SELECT with BEGIN, UPDATE, INSERT, COMMIT"
    with cluster.writer() as session:
        assert session.get_one(User, user.id).name == "bo"


def test_it_does_so_however_often_a_statement_runs(cluster: Cluster, user: User) -> None:
    """The driver sends it whole at first, then prepares it, then names it."""
    driver = driver_of(cluster, ids.shard_of(user.id))
    transactions = []
    for n in range(1, 10):
        with traced(driver) as sent, cluster.writer() as session:
            found = session.scalars(select(User.name).where(User.id == user.id, User.name != ""))
            assert found.all() == [user.name]
            session.add(Photo(owner_id=user.id, caption=str(n)))
            session.commit()
        transactions.append(sent)
        assert driver.info.transaction_status.name == "IDLE"
    assert all("BEGIN" in sent.texts for sent in transactions)
    assert [transactions[i].n_round_trips for i in (0, -1)] == [3, 3]
    if driver.prepare_threshold is None:  # a pooler below 1.21: each is sent whole, always
        assert transactions[-1].messages == transactions[0].messages
    else:
        assert transactions[-1].messages["F Parse"] == 1, "that of BEGIN"


def test_a_first_statement_that_fails_leaves_a_failed_transaction(
    cluster: Cluster, user: User
) -> None:
    driver = driver_of(cluster, ids.shard_of(user.id))
    for _ in range(8):  # whole, prepared, named
        with cluster.writer() as session:
            where = {"bind_arguments": {"logical_shard": ids.shard_of(user.id)}}
            with pytest.raises(DataError):
                session.execute(text("SELECT 1 / CAST(:n AS integer)"), {"n": 0}, **where)
            assert driver.info.transaction_status.name == "INERROR"
            session.rollback()
            assert driver.info.transaction_status.name == "IDLE"
            with pytest.raises(ProgrammingError):
                session.execute(text("SELECT nothing FROM nowhere WHERE :n = 1"), {"n": 0}, **where)
            session.rollback()
            assert session.get_one(User, user.id).name == "ana"
    assert driver is driver_of(cluster, ids.shard_of(user.id)), "and the connection is kept"


def test_several_statements_in_one_text_may_come_first(cluster: Cluster, user: User) -> None:
    shard = ids.shard_of(user.id)
    with cluster.writer() as session:
        session._connection_to(shard).exec_driver_sql(
            f"UPDATE shard_{shard:04}.users SET name = 'bo'; SELECT 1"
        )
        session.rollback()
        assert session.get_one(User, user.id).name == "ana", "they were in the transaction"


def test_a_lone_insert_that_fails_leaves_nothing(cluster: Cluster, user: User) -> None:
    driver = driver_of(cluster, hash_shard(b"ana", 64))
    with cluster.writer() as session:
        session.add(Photo(owner_id=ids.compose(1, ids.shard_of(user.id), 0)))
        with pytest.raises(IntegrityError):
            session.commit()
        session.rollback()
        assert session.token == ""
        session.add(Photo(owner_id=user.id, caption="after"))
        session.commit()
        assert session.token
    with cluster.writer() as session:
        assert session.scalars(select(Photo.caption).where(Photo.owner_id == user.id)).all() == [
            "after"
        ]
    assert not driver.is_alone


def test_what_a_listener_refuses_is_not_committed(cluster: Cluster, user: User) -> None:
    def refuse(*_: object) -> None:
        raise LookupError

    for name in ("before_commit", "after_flush", "after_flush_postexec"):
        with cluster.writer() as session:
            event.listen(session, name, refuse)
            session.add(Photo(owner_id=user.id))
            with pytest.raises(LookupError):
                session.commit()
    with cluster.writer() as session:
        assert not session.scalars(select(Photo).where(Photo.owner_id == user.id)).all()


def test_a_flush_before_the_commit_can_still_be_undone(cluster: Cluster, user: User) -> None:
    with cluster.writer() as session:
        session.add(Photo(owner_id=user.id))
        session.flush()
        session.rollback()
        assert not session.scalars(select(Photo).where(Photo.owner_id == user.id)).all()


def test_what_fails_in_the_middle_of_a_conversation_is_not_talked_on(
    cluster: Cluster, user: User
) -> None:
    """Whoever came next would take the answers that are still to come for its own."""
    driver = driver_of(cluster, ids.shard_of(user.id))

    def half() -> Iterator[Any]:
        driver.pgconn.enter_pipeline_mode()
        driver.pgconn.send_query_params(b"BEGIN", None)
        yield from generators.send(driver.pgconn)
        raise psycopg.OperationalError("there is no more of it")

    with pytest.raises(psycopg.OperationalError, match="no more of it"):
        driver.wait(half())
    assert driver.closed
    with cluster.writer() as session:
        assert session.scalars(select(User.name).where(User.id == user.id)).one() == "ana"
        session.commit()


def test_the_next_transaction_of_a_session_is_whole_again(cluster: Cluster, user: User) -> None:
    with cluster.writer() as session:
        session.add(Photo(owner_id=user.id, caption="kept"))
        session.commit()
        session.add(Photo(owner_id=user.id, caption="undone"))
        session.flush()
        session.rollback()
        found = session.scalars(select(Photo.caption).where(Photo.owner_id == user.id)).all()
        assert found == ["kept"]


@pytest.mark.anyio
async def test_the_async_session_does_the_same(
    cluster: Cluster, user: User, cluster_file: Path
) -> None:
    async with AsyncCluster.from_file(cluster_file) as twin:
        async with twin.writer() as session:
            await session.get_one(User, user.id)
            (_, root) = next(iter(session.sync_session._roots.values()))
            driver: Any = root.connection.driver_connection
        with traced(driver) as lone:
            async with twin.writer() as session:
                session.add(Photo(owner_id=user.id, caption="dawn"))
                await session.commit()
        with traced(driver) as several:
            async with twin.writer() as session:
                (await session.get_one(User, user.id)).name = "bo"
                await session.commit()
        with traced(driver) as undone:
            async with twin.writer() as session:
                (await session.get_one(User, user.id)).name = "cy"
                await session.flush()
    check_alone(lone, driver)
    assert several.n_round_trips == 3
    assert undone.texts.count("ROLLBACK") >= 1
    with cluster.writer() as reader:
        assert reader.get_one(User, user.id).name == "bo"


def test_two_writers_of_one_row_wait_for_each_other(cluster: Cluster, user: User) -> None:
    """A lone INSERT meets locks like any other, and is undone when it loses."""
    shard = ids.shard_of(user.id)
    physical = cluster.topology.physical[cluster.topology.shard_map.owner(shard)]
    photo = Photo(id=ids.compose(5, shard, 0), owner_id=user.id, caption="second")
    failures: list[BaseException] = []

    def write() -> None:
        try:
            with cluster.writer() as session:
                session.add(photo)
                session.commit()
        except IntegrityError as error:
            failures.append(error)

    thread = threading.Thread(target=write)
    with admin(physical) as first, admin(physical) as looking:
        with first.transaction():
            first.execute(
                f"INSERT INTO shard_{shard:04}.photos (id, owner_id, caption)"
                f" VALUES ({photo.id}, {user.id}, 'first')".encode()
            )
            thread.start()
            waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
            wait_until(
                lambda: bool(looking.execute(waiting).fetchone()), 10.0, "the second writer waits"
            )
        thread.join()
    assert [type(error) for error in failures] == [IntegrityError]
