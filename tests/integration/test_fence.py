"""The fence of a move: nothing is committed after it, its rights come back, movers exclude others."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg
from psycopg import sql

from shardkit.errors import RefusedError, TryAgainError
from shardkit.ops.moves.transactions import (
    Changed,
    Seen,
    change,
    now,
    promote,
    row_of,
    writers,
)
from shardkit.ops.moves.transitions import Claim, Decide, Fence, Lift, Move, Release, Row
from shardkit.ownership import State
from shardkit.testing import wait_until
from shardkit.topology import PhysicalShard, Topology, schema_name
from tests.fixtures.sharded import admin

pytestmark = pytest.mark.integration

SHARD = 43
USERS = f"{schema_name(SHARD)}.users"
INSERT = f"INSERT INTO {USERS} (id, name) VALUES (%s, 'x')"

Connection = psycopg.Connection[Any]

# Every right on a table, sequence or column, by whom; the order in which they were given is noise.
_RIGHTS = f"""
SELECT c.relname, coalesce(t.attname, ''), a.grantee::regrole::text, a.privilege_type, a.is_grantable
FROM pg_class AS c CROSS JOIN LATERAL (
    SELECT NULL::name AS attname, c.relacl AS acl
    UNION ALL SELECT attname, attacl FROM pg_attribute WHERE attrelid = c.oid
) AS t CROSS JOIN LATERAL aclexplode(t.acl) AS a
WHERE c.relnamespace = '{schema_name(SHARD)}'::regnamespace AND a.grantee <> c.relowner ORDER BY 1, 2, 3, 4
"""


class Source:
    """The source of a move: its owner's connection, and the application's."""

    def __init__(self, shard: PhysicalShard) -> None:
        self.shard = shard
        self.role = shard.primary.url.username or ""
        self.owner: Connection = admin(shard)
        self.move = Move(str(uuid.uuid4()))

    def app(self) -> Connection:
        url = self.shard.admin_url.set(
            drivername="postgresql", username=self.role, password=self.shard.primary.url.password
        )
        return psycopg.connect(
            url.render_as_string(hide_password=False), autocommit=True, prepare_threshold=0
        )

    def fence(self, connection: Connection | None = None, timeout: float = 0.25) -> None:
        change(
            connection or self.owner,
            SHARD,
            lambda at, timeline: Fence(self.move, "beta", at, timeline),
            roles=(self.role,),
            lock_timeout=timeout,
        )

    def lift(self) -> None:
        _, timeline = now(self.owner)
        change(self.owner, SHARD, Lift(self.move, timeline))

    @property
    def row(self) -> Row:
        found = row_of(self.owner, SHARD)
        assert found is not None
        return found

    def count(self) -> int:
        row = self.owner.execute(f"SELECT count(*) FROM {USERS}".encode()).fetchone()
        return int(row[0]) if row else -1


@pytest.fixture
def source(topology: Topology) -> Iterator[Source]:
    """A source whose move has claimed the logical shard; as before afterwards."""
    source = Source(topology.physical[topology.shard_map.owner(SHARD)])
    change(source.owner, SHARD, Claim(source.move))
    with source.owner:
        yield source
        if source.row.state is State.FENCED:
            source.lift()
        change(source.owner, SHARD, Release(source.move))


def test_a_revoke_alone_loses_what_is_under_way_and_the_fence_waits_for_it(source: Source) -> None:
    with source.app() as app:
        app.execute("BEGIN")
        app.execute(INSERT, (1,))
        # The control: REVOKE waits for nobody, and the writer commits after it has returned.
        source.owner.execute(f'REVOKE INSERT ON {USERS} FROM "{source.role}"'.encode())
        assert source.count() == 0
        app.execute("COMMIT")
        assert source.count() == 1
        source.owner.execute(f'GRANT INSERT ON {USERS} TO "{source.role}"'.encode())

        app.execute("BEGIN")
        app.execute(INSERT, (2,))
        with pytest.raises(TryAgainError, match="no lock within") as refused:
            source.fence(timeout=0.05)
        assert str(app.info.backend_pid) in str(refused.value), "who has the lock"
        assert source.row.state is State.ACTIVE
        app.execute(INSERT, (3,))
        app.execute("COMMIT")
        source.fence()
        assert source.count() == 3
        with pytest.raises(pg.InsufficientPrivilege):
            app.execute(INSERT, (4,))
        source.lift()
        app.execute(INSERT, (4,))


def test_twelve_writers_commit_nothing_after_the_fence_has_returned(source: Source) -> None:
    refused = threading.Semaphore(0)
    began = threading.Semaphore(0)

    def write(number: int) -> None:
        with source.app() as app:
            for n in range(10_000):
                try:
                    with app.transaction():
                        app.execute(INSERT, (number * 10_000 + n,))
                        app.execute("SELECT pg_sleep(0.005)")
                except pg.InsufficientPrivilege:
                    refused.release()
                    return
                if n == 2:
                    began.release()

    with ThreadPoolExecutor(12) as pool:
        writing = [pool.submit(write, number) for number in range(12)]
        for _ in range(12):
            assert began.acquire(timeout=30.0)
        for _ in range(40):  # as a mover does
            try:
                source.fence()
                break
            except TryAgainError:
                continue
        at_once = source.count()
        for future in writing:
            future.result(60.0)
    assert source.row.state is State.FENCED
    assert at_once >= 36
    assert source.count() == at_once


def test_what_is_as_it_was_seen_takes_one_round_trip_and_else_the_server_has_the_say(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_sent = 0
    execute = source.owner.execute

    def counted(*given: Any) -> Any:
        nonlocal n_sent
        n_sent += 1
        return execute(*given)

    def fence(seen: Seen) -> Changed:
        return change(
            source.owner,
            SHARD,
            lambda at, timeline: Fence(source.move, "beta", at, timeline),
            roles=(source.role,),
            seen=seen,
            then=sql.SQL("SELECT state, 'after' FROM shardkit.ownership WHERE logical_shard = {}")
            .format(SHARD),
        )  # fmt: skip

    at, timeline = now(source.owner)
    active = source.row
    monkeypatch.setattr(source.owner, "execute", counted)
    fenced = fence(Seen(active, at, timeline))
    assert n_sent == 1
    monkeypatch.undo()
    assert fenced.found == ("fenced", "after"), "it was asked when all was committed"
    assert fenced.state is not None
    assert fenced.row == source.row
    with source.app() as app, pytest.raises(pg.InsufficientPrivilege):
        app.execute(INSERT, (1,))
    source.lift()

    # Another row, and another timeline, than was seen: decided by what the server says.
    for seen in (Seen(replace(active, epoch=99), at, timeline), Seen(active, at, timeline + 1)):
        assert fence(seen).row.fence_timeline == timeline
        assert source.row == replace(
            active, state=State.FENCED, moved_to="beta", fence_timeline=timeline,
            fenced_at=source.row.fenced_at,
        )  # fmt: skip
        source.lift()
    other = replace(source.move, attempt=7)
    with pytest.raises(RefusedError, match="has not claimed it"):
        change(source.owner, SHARD, Claim(other), seen=Seen(active))
    assert source.row == active


def test_what_waits_for_the_fence_is_refused(source: Source) -> None:
    """Also where the statement is prepared, and so needs no rights at its parsing any more."""
    told: list[BaseException] = []
    with source.app() as app, admin(source.shard) as other:
        for number in range(3):
            app.execute(INSERT, (number,))

        def write() -> None:
            try:
                app.execute(INSERT, (9,))
            except pg.InsufficientPrivilege as error:
                told.append(error)

        with other.transaction():
            other.execute(f"LOCK TABLE {USERS} IN EXCLUSIVE MODE".encode())
            thread = threading.Thread(target=write)
            thread.start()
            with admin(source.shard) as looks:
                query = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = %s"
                wait_until(
                    lambda: looks.execute(query, (app.info.backend_pid,)).fetchone() != (0,),
                    10.0,
                    "the writer waits",
                )
            other.execute("SELECT shardkit.close_shard(%s, false)", (SHARD,))
        thread.join(30.0)
        other.execute("SELECT shardkit.open_shard(%s)", (SHARD,))
    assert len(told) == 1
    assert source.count() == 3


def test_no_ids_are_leased_after_the_fence(source: Source) -> None:
    lease = f"SELECT * FROM shardkit.lease_ids(ARRAY[{SHARD}], ARRAY[10])".encode()
    with source.app() as app, source.app() as older:
        assert app.execute(lease).fetchone() is not None
        older.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        older.execute("SELECT 1")
        source.fence()
        with pytest.raises(psycopg.Error) as refused:
            app.execute(lease)
        assert refused.value.sqlstate == "SK003"
        with pytest.raises(pg.SerializationFailure):  # it sees the row as it was before the fence
            older.execute(lease)
        older.rollback()


def test_every_right_comes_back(source: Source) -> None:
    source.owner.execute(f'GRANT UPDATE (name) ON {USERS} TO "{source.role}"'.encode())
    source.owner.execute(f"GRANT SELECT, UPDATE (name) ON {USERS} TO pg_monitor".encode())
    before = source.owner.execute(_RIGHTS.encode()).fetchall()
    try:
        source.fence()
        fenced = source.owner.execute(_RIGHTS.encode()).fetchall()
        assert {row[3] for row in fenced} == {"SELECT"}
        with source.app() as app:
            assert app.execute(f"SELECT count(*) FROM {USERS}".encode()).fetchone() == (0,)
        source.lift()
        assert source.owner.execute(_RIGHTS.encode()).fetchall() == before
    finally:
        source.owner.execute(f"REVOKE ALL ON {USERS} FROM pg_monitor".encode())
        source.owner.execute(f'REVOKE UPDATE (name) ON {USERS} FROM "{source.role}"'.encode())
        source.owner.execute(f'GRANT UPDATE ON {USERS} TO "{source.role}"'.encode())


def test_anybody_lifts_a_fence_that_is_too_old_and_nobody_a_young_one(source: Source) -> None:
    lift = f"SELECT shardkit.lift_expired_fence({SHARD})"
    with source.app() as app:
        source.fence()
        assert app.execute(lift.encode()).fetchone() == (False,)
        old = f"UPDATE shardkit.ownership SET fenced_at = fenced_at - interval '6 s' WHERE logical_shard = {SHARD}"
        source.owner.execute(old.encode())
        moved = f"UPDATE shardkit.ownership SET fence_timeline = fence_timeline + %s WHERE logical_shard = {SHARD}"
        source.owner.execute(moved.encode(), (1,))
        assert app.execute(lift.encode()).fetchone() == (False,), "of another timeline"
        source.owner.execute(moved.encode(), (-1,))
        assert app.execute(lift.encode()).fetchone() == (True,)
        app.execute(INSERT, (1,))
        assert source.row.state is State.ACTIVE
        with pytest.raises(RefusedError):  # the mover comes back late
            change(source.owner, SHARD, lambda _at, timeline: Decide(source.move, timeline))
        assert app.execute(lift.encode()).fetchone() == (False,)


def test_a_login_that_no_fence_stops_is_named_and_nothing_is_fenced(source: Source) -> None:
    owner = source.owner.info.user
    assert writers(source.owner, SHARD, (source.role,)) == {}
    [(named, why)] = writers(source.owner, SHARD, (source.role, owner)).items()
    assert named == owner
    assert "superuser" in why or "owns" in why
    with pytest.raises(RefusedError, match="would not stop") as refused:
        change(
            source.owner,
            SHARD,
            lambda at, timeline: Fence(source.move, "beta", at, timeline),
            roles=(source.role, owner),
        )
    assert refused.value.logical_shard == SHARD
    assert source.row.state is State.ACTIVE
    with source.app() as app:
        app.execute(INSERT, (1,))


def test_a_prepared_transaction_holds_the_fence_off(source: Source) -> None:
    with source.app() as app:
        app.execute("BEGIN")
        app.execute(INSERT, (1,))
        app.execute("PREPARE TRANSACTION 'of a test'")
        try:
            with pytest.raises(TryAgainError, match="no lock within"):
                source.fence(timeout=0.05)
        finally:
            app.execute("ROLLBACK PREPARED 'of a test'")


def test_of_two_movers_one_has_the_shard(source: Source, topology: Topology) -> None:
    physical = topology.physical[topology.shard_map.owner(SHARD)]
    change(source.owner, SHARD, Release(source.move))
    moves = [Move(str(uuid.uuid4())) for _ in range(4)]

    def claim(move: Move) -> Move | None:
        with admin(physical) as connection:
            try:
                change(connection, SHARD, Claim(move), lock_timeout=30.0)
            except RefusedError:
                return None
            return move

    with ThreadPoolExecutor(4) as pool:
        won = [move for move in pool.map(claim, moves) if move is not None]
    assert len(won) == 1
    assert source.row.move_id == won[0].id
    source.move = won[0]


def test_a_server_that_was_not_promoted_has_nothing_to_register(source: Source) -> None:
    before = source.row.epoch
    _, timeline = now(source.owner)
    assert promote(source.owner) == (timeline, [])
    source.owner.execute("UPDATE shardkit.identity SET timeline = timeline - 1")
    found, raised = promote(source.owner)
    assert found == timeline
    assert SHARD in raised
    assert source.row.epoch == before + 1
    source.owner.execute(
        "UPDATE shardkit.ownership SET epoch = epoch - 1 WHERE state = 'active' AND epoch > 1"
    )
