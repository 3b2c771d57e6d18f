"""No call ends later than its deadline and a quarter of a second, and no query is left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from shardkit import AsyncCluster, Cluster, all_shards, deadline, ids
from shardkit.config import PoolConfig
from shardkit.errors import (
    DeadlineExceededError,
    GatherError,
    OutcomeUnknownError,
    StatementTimeoutError,
    UnavailableError,
)
from shardkit.local import LocalCluster
from shardkit.testing import wait_until
from shardkit.topology import Topology, schema_name
from tests.fixtures.lateness import at_work, over_in
from tests.fixtures.sharded import Settled, admin
from tests.models import Photo, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

NEWEST = select(Photo).order_by(Photo.id.desc()).limit(10).options(all_shards())
SLOW = select(func.pg_sleep(30))


@pytest.fixture
def thawed(local_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The servers, none of them frozen afterwards."""
    yield local_cluster
    for server in local_cluster.servers:
        local_cluster.resume(server.name)


@pytest.fixture
def user(cluster: Cluster, settled: Settled) -> User:
    with cluster.writer() as session:
        user = User(name="ana", photos=[Photo(caption="dawn")])
        session.add(user)
        session.commit()
    settled()
    return user


def freeze(local: LocalCluster, user: User, cluster: Cluster, *, replicas: bool = False) -> str:
    """Freeze the primary of a user's physical shard, or its replicas; return its name."""
    physical = cluster.topology.shard_map.owner(ids.shard_of(user.id))
    for server in local.replicas(physical) if replicas else [local.primary(physical)]:
        local.pause(server.name)
    return physical


def here(user: User) -> dict[str, int]:
    return {"logical_shard": ids.shard_of(user.id)}


@pytest.mark.parametrize("role", ["reader", "writer"])
def test_a_slow_query_is_cancelled_at_the_deadline_and_its_connection_kept(
    cluster: Cluster, user: User, thawed: LocalCluster, role: str
) -> None:
    with getattr(cluster, role)() as session:
        assert session.get(User, user.id) is not None

        def is_kept() -> bool:
            before = session.scalar(text("SELECT pg_backend_pid()"), bind_arguments=here(user))
            with deadline(0.3), over_in(0.3), pytest.raises(DeadlineExceededError) as caught:
                session.execute(SLOW, bind_arguments=here(user))
            assert caught.value.retryable
            session.rollback()
            after = session.scalar(text("SELECT pg_backend_pid()"), bind_arguments=here(user))
            return bool(before == after)

        # A server on a busy machine may need longer for the cancellation than it is waited for.
        wait_until(is_kept, 30.0, "a query is cancelled in time and its connection kept")
    assert at_work(thawed) == []


def test_a_reader_whose_connection_was_given_up_takes_another(
    cluster: Cluster, user: User, thawed: LocalCluster
) -> None:
    with cluster.reader() as session:
        assert session.get(User, user.id) is not None
        assert session.scalars(NEWEST).all()
        freeze(thawed, user, cluster)
        freeze(thawed, user, cluster, replicas=True)
        with deadline(0.3), pytest.raises(UnavailableError):
            session.scalar(text("SELECT 1"), bind_arguments=here(user))
        for server in thawed.servers:
            thawed.resume(server.name)

        def goes_on() -> bool:
            try:
                return bool(session.scalars(NEWEST).all())
            except (UnavailableError, GatherError):  # until breakers close
                return False

        wait_until(goes_on, 60.0, "the same session reads again")


@pytest.mark.anyio
@pytest.mark.parametrize("role", ["reader", "writer"])
async def test_the_async_session_keeps_its_deadline_too(
    cluster: Cluster, user: User, thawed: LocalCluster, cluster_file: Path, role: str
) -> None:
    async with AsyncCluster.from_file(cluster_file) as twin, getattr(twin, role)() as session:
        assert await session.get(User, user.id) is not None
        async with deadline(0.3):
            with over_in(0.3), pytest.raises(DeadlineExceededError):
                await session.execute(SLOW, bind_arguments=here(user))
        await session.rollback()
        assert at_work(thawed) == []
        session.expunge_all()
        freeze(thawed, user, cluster)
        freeze(thawed, user, cluster, replicas=True)
        async with deadline(0.3):
            with over_in(0.3), pytest.raises(DeadlineExceededError):
                await session.get(User, user.id)


@pytest.mark.anyio
async def test_a_cancelled_task_leaves_no_query_behind(
    user: User, thawed: LocalCluster, cluster_file: Path
) -> None:
    async with AsyncCluster.from_file(cluster_file) as twin, twin.reader() as session:
        assert await session.get(User, user.id) is not None
        with over_in(0.2), pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await session.execute(SLOW, bind_arguments=here(user))
        assert at_work(thawed) == []


@pytest.mark.parametrize("is_pooled", [True, False])
def test_a_frozen_primary_is_given_up_at_the_deadline(
    cluster: Cluster, user: User, thawed: LocalCluster, is_pooled: bool
) -> None:
    if not is_pooled:
        cluster.close()
    with cluster.writer() as session:
        if is_pooled:
            session.get_one(User, user.id).name = "never"
        freeze(thawed, user, cluster)
        with deadline(0.3), over_in(0.3), pytest.raises(DeadlineExceededError):
            session.execute(select(User).where(User.id == user.id))
    for server in thawed.servers:
        thawed.resume(server.name)
    with cluster.writer() as session:
        assert session.get_one(User, user.id).name == "ana"


def test_a_scatter_over_a_frozen_server_ends_at_the_deadline(
    cluster: Cluster, user: User, thawed: LocalCluster
) -> None:
    with cluster.reader(after="the primaries") as session:
        assert len(session.scalars(NEWEST).all()) == 1
        physical = freeze(thawed, user, cluster)
        with deadline(0.3), over_in(0.3), pytest.raises(GatherError) as caught:
            session.scalars(NEWEST)
        assert {n: type(e) for n, e in caught.value.failures.items()} == {
            physical: DeadlineExceededError
        }
    # A new connection may take half of the time, so that the others still have the rest.
    with cluster.reader(after="the primaries") as session, deadline(0.3), over_in(0.15):
        assert session.scalars(NEWEST.options(all_shards(partial=True))).all() == []
        assert set(session.failures) == {physical}


@pytest.mark.usefixtures("user")
def test_a_scatter_that_waits_for_locks_is_cancelled_everywhere(
    cluster: Cluster, topology: Topology, thawed: LocalCluster
) -> None:
    with ExitStack() as stack, cluster.reader(after="the primaries") as session:
        for physical in topology.physical.values():
            locks = stack.enter_context(admin(physical))
            schema = schema_name(topology.shard_map.owned_by(physical.name)[0])
            stack.enter_context(locks.transaction())
            locks.execute(f"LOCK TABLE {schema}.photos IN ACCESS EXCLUSIVE MODE")
        with deadline(0.4), over_in(0.4), pytest.raises(GatherError) as caught:
            session.scalars(NEWEST)
        assert set(caught.value.failures) == set(cluster.topology.physical)
        assert at_work(thawed) == []


def test_a_commit_that_gets_no_answer_is_unknown_and_not_cancelled(
    cluster: Cluster, user: User, thawed: LocalCluster
) -> None:
    with cluster.writer() as session:
        session.get_one(User, user.id).name = "perhaps"
        session.flush()
        freeze(thawed, user, cluster)
        with deadline(0.3), over_in(0.3), pytest.raises(OutcomeUnknownError):
            session.commit()
    for server in thawed.servers:
        thawed.resume(server.name)

    def holds() -> bool:
        with cluster.writer() as session:
            return session.get_one(User, user.id).name == "perhaps"

    wait_until(holds, 5.0, "the COMMIT that was sent is carried out")


@pytest.fixture
def lone(cluster: Cluster, user: User) -> User:
    """A new object whose commit is one INSERT; its id is minted and a connection is open."""
    shard = ids.shard_of(user.id)
    ((given,),) = cluster.connections.ids.mint({shard: 1}).values()
    with cluster.writer() as session:
        assert session.get(User, user.id) is not None
    return User(id=given, name="alone")


def test_a_lone_insert_is_cancelled_and_known_to_have_left_nothing(
    cluster: Cluster, lone: User, thawed: LocalCluster
) -> None:
    physical = cluster.topology.physical[cluster.topology.shard_map.owner(ids.shard_of(lone.id))]
    with admin(physical) as locks, cluster.writer() as session:
        session.add(lone)
        with locks.transaction():
            locks.execute(f"LOCK TABLE {schema_name(ids.shard_of(lone.id))}.users IN SHARE MODE")
            with deadline(0.3), over_in(0.3), pytest.raises(DeadlineExceededError):
                session.commit()
            found = [query for query in at_work(thawed) if "INSERT" in query]
            assert found == []
    with cluster.writer() as session:
        assert session.get(User, lone.id) is None


def test_a_lone_insert_that_gets_no_answer_is_unknown(
    cluster: Cluster, lone: User, thawed: LocalCluster
) -> None:
    with cluster.writer() as session:
        session.add(lone)
        freeze(thawed, lone, cluster)
        with deadline(0.3), over_in(0.3), pytest.raises(OutcomeUnknownError):
            session.commit()


def test_commit_is_not_sent_without_time_for_its_answer(cluster: Cluster, user: User) -> None:
    with cluster.writer() as session:
        session.get_one(User, user.id).name = "never"
        session.flush()
        with deadline(0.01), pytest.raises(DeadlineExceededError):
            session.commit()
    with cluster.writer() as session:
        assert session.get_one(User, user.id).name == "ana"


def test_waiting_for_a_pooled_connection_ends_at_the_deadline(
    topology: Topology, user: User
) -> None:
    with (
        Cluster(topology, pool=PoolConfig(size=1, overflow=0, timeout=30.0)) as small,
        small.writer() as first,
        small.writer() as second,
    ):
        assert first.get(User, user.id) is not None
        with deadline(0.3), over_in(0.3), pytest.raises(DeadlineExceededError):
            second.get(User, user.id)


@pytest.mark.anyio
async def test_waiting_for_a_pooled_connection_ends_for_tasks_too(
    topology: Topology, user: User
) -> None:
    async with (
        AsyncCluster(topology, pool=PoolConfig(size=1, overflow=0, timeout=30.0)) as small,
        small.writer() as first,
        small.writer() as second,
    ):
        assert await first.get(User, user.id) is not None
        with deadline(0.3), over_in(0.3), pytest.raises(DeadlineExceededError):
            await second.get(User, user.id)


def test_the_server_bounds_a_writer_itself_and_nobody_after_it(
    cluster: Cluster, user: User
) -> None:
    show = text("SHOW statement_timeout")
    with cluster.writer() as session:
        with deadline(2.0):
            left = session.scalar(show, bind_arguments=here(user))
            assert left == "2s" or 1500 < int(left.removesuffix("ms")) < 2000  # of a busy machine
            session.rollback()
        assert session.scalar(show, bind_arguments=here(user)) == "0"


def test_without_a_deadline_patience_has_an_end(
    topology: Topology, user: User, thawed: LocalCluster
) -> None:
    with Cluster(topology, statement_timeout=0.3) as hasty, hasty.reader() as session:
        assert session.get(User, user.id) is not None
        with over_in(0.3), pytest.raises(StatementTimeoutError, match=r"within 0\.3 seconds"):
            session.execute(SLOW, bind_arguments=here(user))
    assert at_work(thawed) == []


def test_a_query_cut_off_from_its_reader_is_ended_by_the_server(
    cluster: Cluster, user: User, thawed: LocalCluster
) -> None:
    with cluster.reader() as session:
        assert session.get(User, user.id) is not None
        physical = freeze(thawed, user, cluster, replicas=True)
        with deadline(0.2), over_in(0.2), pytest.raises(DeadlineExceededError):
            session.execute(SLOW, bind_arguments=here(user))
    for server in thawed.replicas(physical):
        thawed.resume(server.name)
    wait_until(lambda: at_work(thawed) == [], 3.0, "the server sees that nobody waits")


def test_a_cancelled_wait_for_a_standby_is_no_success(
    cluster: Cluster, user: User, thawed: LocalCluster
) -> None:
    physical = cluster.topology.shard_map.owner(ids.shard_of(user.id))
    dsn = thawed.superuser_dsn(thawed.primary(physical).name)
    with psycopg.connect(dsn, autocommit=True) as superuser:
        superuser.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        superuser.execute("SELECT pg_reload_conf()")
        try:
            waiting: Callable[[], bool] = lambda: bool(  # noqa: E731
                superuser.execute(
                    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                ).fetchall()
            )
            wait_until(
                lambda: waits_for_a_standby(superuser, dsn), 20.0, "commits wait for a standby"
            )
            with cluster.writer() as session:
                session.get_one(User, user.id).name = "here only"
                session.flush()
                cancel = threading.Thread(
                    target=wait_until, args=(waiting, 20.0, "COMMIT waits for a standby")
                )
                cancel.start()
                with pytest.raises(OutcomeUnknownError):
                    session.commit()
                cancel.join()
        finally:
            superuser.execute("ALTER SYSTEM RESET synchronous_standby_names")
            superuser.execute("SELECT pg_reload_conf()")


def waits_for_a_standby(superuser: psycopg.Connection[tuple[object, ...]], dsn: str) -> bool:
    """Tell whether a commit waits; the checkpointer says so, which may be later than SHOW does."""
    with psycopg.connect(dsn, autocommit=True) as probe:
        probe.pgconn.send_query(b"SELECT pg_logical_emit_message(true, 'probe', '')")
        waiting = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event = 'SyncRep'"

        def is_answered() -> bool:
            probe.pgconn.consume_input()
            return not probe.pgconn.is_busy()

        def is_waiting() -> bool:
            return superuser.execute(waiting, [probe.info.backend_pid]).fetchone() is not None

        wait_until(lambda: is_answered() or is_waiting(), 20.0, "a commit is answered, or waits")
        found = is_waiting()
        probe.cancel_safe(timeout=20.0)
        probe.close()
        return found


@pytest.mark.parametrize("is_lone", [False, True])
def test_row_7_without_its_standby_a_commit_is_unknown_at_the_deadline(
    cluster: Cluster, lone: User, thawed: LocalCluster, is_lone: bool
) -> None:
    """It is on the primary's disk and nowhere else; cancelling the wait would call it a success."""
    physical = cluster.topology.shard_map.owner(ids.shard_of(lone.id))
    dsn = thawed.superuser_dsn(thawed.primary(physical).name)
    with psycopg.connect(dsn, autocommit=True) as superuser:
        superuser.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        superuser.execute("SELECT pg_reload_conf()")
        try:
            with cluster.writer() as session:
                wait_until(
                    lambda: (
                        session.scalar(
                            text("SHOW synchronous_standby_names"), bind_arguments=here(lone)
                        )
                        == "nobody"
                    ),
                    5.0,
                    "the server has read its settings",
                )
                wait_until(
                    lambda: waits_for_a_standby(superuser, dsn), 20.0, "commits wait for a standby"
                )
                if is_lone:
                    session.rollback()
                session.add(lone)
                with deadline(0.3), over_in(0.3), pytest.raises(OutcomeUnknownError):
                    session.commit()
        finally:
            superuser.execute("ALTER SYSTEM RESET synchronous_standby_names")
            superuser.execute("SELECT pg_reload_conf()")


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_a_bad_deadline_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds above 0"):
        deadline(seconds)


def test_an_error_of_sql_stays_what_it_is(cluster: Cluster, user: User) -> None:
    with deadline(5.0), cluster.reader() as session, pytest.raises(DBAPIError, match="division"):
        session.execute(text("SELECT 1 / 0"), bind_arguments=here(user))
