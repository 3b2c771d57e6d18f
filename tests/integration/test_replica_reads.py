"""Reads with a token, on replicas that replay late, stand still, or never had the write."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import psycopg
import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import selectinload

from shardkit import AsyncCluster, Cluster, ReadSession, all_shards, ids, tokens
from shardkit.config import ReplicasConfig
from shardkit.events import Event, ReplicaPassedOver
from shardkit.local import LocalCluster
from shardkit.testing import wait_until, watch
from shardkit.topology import Role, Topology
from tests.fixtures.sharded import Settled, admin
from tests.models import Photo, User

pytestmark = pytest.mark.integration

SHARD = 3
KEY = ids.compose(1, SHARD, 0)
OTHER = ids.compose(1, 40, 0)
WIDE = select(User.name).order_by(User.id).options(all_shards())


@contextmanager
def replay_paused(local: LocalCluster, *servers: str) -> Iterator[None]:
    """Stop replicas from replaying; they go on receiving."""
    with ExitStack() as stack:
        for name in servers:
            connection = stack.enter_context(
                psycopg.connect(local.superuser_dsn(name), autocommit=True)
            )
            stack.callback(connection.execute, "SELECT pg_wal_replay_resume()")
            connection.execute("SELECT pg_wal_replay_pause()")
            wait_until(partial(_is_paused, connection), 10.0, "replay is paused")
        yield


@contextmanager
def setting(local: LocalCluster, server: str, name: str, value: str) -> Iterator[None]:
    """Change a setting of one server for a while."""
    with psycopg.connect(local.superuser_dsn(server), autocommit=True) as connection:

        def reload(command: str) -> None:
            connection.execute(command.encode())
            connection.execute("SELECT pg_reload_conf()")

        reload(f"ALTER SYSTEM SET {name} = '{value}'")
        wait_until(lambda: _shows(connection, name, value), 10.0, f"{name} is {value}")
        try:
            yield
        finally:
            reload(f"ALTER SYSTEM RESET {name}")


def _is_paused(connection: psycopg.Connection[tuple[object, ...]]) -> bool:
    found = connection.execute("SELECT pg_get_wal_replay_pause_state()").fetchone()
    return found == ("paused",)


def _shows(connection: psycopg.Connection[tuple[object, ...]], name: str, value: str) -> bool:
    return connection.execute(f"SHOW {name}".encode()).fetchone() == (value,)


@pytest.fixture
def patient(topology: Topology) -> Iterator[Cluster]:
    """A cluster whose replicas may take as long as a busy machine needs."""
    with Cluster(topology, replicas=ReplicasConfig(patience=10.0)) as cluster:
        yield cluster


@pytest.fixture
def users(cluster: Cluster, settled: Settled) -> None:
    """Two users, on both physical shards and all replicas."""
    for key in (KEY, OTHER):
        with cluster.writer() as session:
            session.add(User(id=key, name="old", photos=[Photo(caption="old")]))
            session.commit()
    settled()


def rename(cluster: Cluster, name: str, key: int = KEY) -> str:
    with cluster.writer() as session:
        session.execute(update(User).where(User.id == key).values(name=name))
        session.commit()
        return session.token


def role_of(session: ReadSession, physical: str = "alpha") -> Role:
    endpoint = session.endpoint_of(physical)
    assert endpoint is not None
    return endpoint.role


def names_of(local: LocalCluster, physical: str = "alpha") -> list[str]:
    return [server.name for server in local.replicas(physical)]


@pytest.mark.usefixtures("users")
def test_a_replica_that_has_replayed_the_write_answers(patient: Cluster) -> None:
    for number in range(50):
        token = rename(patient, f"name {number}")
        with patient.reader(after=token) as session:
            assert session.get_one(User, KEY).name == f"name {number}"
            assert role_of(session) is Role.REPLICA


@pytest.mark.anyio
@pytest.mark.usefixtures("users")
async def test_so_it_does_under_asyncio(topology: Topology) -> None:
    async with AsyncCluster(topology, replicas=ReplicasConfig(patience=10.0)) as cluster:
        for number in range(50):
            async with cluster.writer() as writer:
                await writer.execute(
                    update(User).where(User.id == KEY).values(name=f"name {number}")
                )
                await writer.commit()
            async with cluster.reader(after=writer.token) as session:
                assert (await session.get_one(User, KEY)).name == f"name {number}"
                assert role_of(session.sync_session) is Role.REPLICA
                found = await session.scalars(WIDE)
                assert found.all() == [f"name {number}", "old"]
                assert role_of(session.sync_session, "beta") is Role.REPLICA


Read = Callable[[ReadSession], object]
READS: dict[str, Read] = {
    "get": lambda session: session.get_one(User, KEY).name,
    "get_many": lambda session: session.get_many(User, [KEY])[0].name,
    "select": lambda session: session.scalars(select(User.name).where(User.id == KEY)).one(),
    "scatter": lambda session: session.scalars(WIDE).all()[0],
    "timeout": lambda session: session.scalars(
        select(User.name).where(User.id == KEY).options(all_shards(timeout=10))
    ).one(),
    "scatter with timeout": lambda session: session.scalars(
        select(User.name).order_by(User.id).options(all_shards(timeout=10))
    ).all()[0],
    "stream": lambda session: session.scalars(WIDE.execution_options(yield_per=10)).all()[0],
    "lazy load": lambda session: session.get_one(Photo, ids_of_photo(session)).owner.name,
    "eager load": lambda session: session.scalars(
        select(User).where(User.id == KEY).options(selectinload(User.photos))
    ).one().photos[0].caption,
}  # fmt: skip


def ids_of_photo(session: ReadSession) -> int:
    return session.scalars(select(Photo.id).where(Photo.owner_id == KEY)).one()


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_replicas_that_stand_still_are_not_believed(
    cluster: Cluster, local_cluster: LocalCluster, read: Read
) -> None:
    with replay_paused(local_cluster, *names_of(local_cluster)):
        with cluster.writer() as writer:
            user = writer.get_one(User, KEY)
            user.name = "new"
            user.photos[0].caption = "new"
            writer.commit()
        with cluster.reader() as session:
            assert read(session) == "old"  # the control: without a token, replicas are believed
        for _ in range(3):
            with cluster.reader(after=writer.token) as session:
                assert read(session) == "new"
                assert role_of(session) is Role.PRIMARY


@pytest.mark.anyio
@pytest.mark.usefixtures("users")
async def test_nor_are_they_under_asyncio(topology: Topology, local_cluster: LocalCluster) -> None:
    async with AsyncCluster(topology) as cluster:
        with replay_paused(local_cluster, *names_of(local_cluster)):
            async with cluster.writer() as writer:
                await writer.execute(update(User).where(User.id == KEY).values(name="new"))
                await writer.commit()
            async with cluster.reader() as session:
                assert (await session.get_one(User, KEY)).name == "old"
            for _ in range(3):
                async with cluster.reader(after=writer.token) as session:
                    assert (await session.get_one(User, KEY)).name == "new"
                async with cluster.reader(after=writer.token) as session:
                    assert (await session.scalars(WIDE)).all() == ["new", "old"]
                    assert role_of(session.sync_session) is Role.PRIMARY
                    assert role_of(session.sync_session, "beta") is Role.REPLICA


@pytest.mark.usefixtures("users")
def test_only_the_server_that_was_written_to_is_asked(
    cluster: Cluster, local_cluster: LocalCluster
) -> None:
    passed_over: list[Event] = []
    cluster.listen(passed_over.append)
    with replay_paused(local_cluster, *names_of(local_cluster), *names_of(local_cluster, "beta")):
        token = rename(cluster, "new")
        with cluster.reader(after=token) as session:
            assert session.get_one(User, KEY).name == "new"
            assert session.get_one(User, OTHER).name == "old"
            assert role_of(session, "beta") is Role.REPLICA
    refused = [event for event in passed_over if isinstance(event, ReplicaPassedOver)]
    assert [event.physical for event in refused] == ["alpha"]


@pytest.mark.usefixtures("users")
def test_a_replica_that_is_known_to_stand_still_is_not_tried(
    cluster: Cluster, local_cluster: LocalCluster
) -> None:
    events: list[Event] = []
    cluster.listen(events.append)
    with replay_paused(local_cluster, *names_of(local_cluster)):
        token = rename(cluster, "new")

        def is_known() -> bool:
            events.clear()
            with cluster.reader(after=token) as session:
                session.get_one(User, KEY)
            return not any(isinstance(event, ReplicaPassedOver) for event in events)

        wait_until(is_known, 10.0, "the probe has seen it stand still")


@pytest.mark.usefixtures("users")
def test_a_replica_that_replays_a_moment_later_is_waited_for(
    patient: Cluster, local_cluster: LocalCluster
) -> None:
    with ExitStack() as stack:
        for name in names_of(local_cluster):
            stack.enter_context(setting(local_cluster, name, "recovery_min_apply_delay", "50ms"))
        for number in range(10):
            token = rename(patient, f"name {number}")
            with patient.reader(after=token) as session:
                assert session.get_one(User, KEY).name == f"name {number}"
                assert role_of(session) is Role.REPLICA


@pytest.mark.usefixtures("users")
def test_a_commit_that_does_not_wait_for_the_disk_is_seen_all_the_same(cluster: Cluster) -> None:
    for number in range(50):
        with cluster.writer() as writer:
            writer.execute(
                text("SET LOCAL synchronous_commit = off"),
                bind_arguments={"logical_shard": SHARD},
            )
            writer.execute(update(User).where(User.id == KEY).values(name=f"name {number}"))
            writer.commit()
        with cluster.reader(after=writer.token) as session:
            assert session.get_one(User, KEY).name == f"name {number}"


@pytest.mark.usefixtures("users")
def test_reads_never_go_back_over_replicas_of_different_age(
    cluster: Cluster, local_cluster: LocalCluster, topology: Topology
) -> None:
    """Two processes, each with a replica of its own, of which one stands still."""
    alpha = topology.physical["alpha"]
    still, _ = names_of(local_cluster)

    def only(n: int) -> Cluster:
        physical = {**topology.physical, "alpha": replace(alpha, replicas=(alpha.replicas[n],))}
        return Cluster(Topology(topology.name, physical, topology.shard_map))

    def version(session: ReadSession) -> int:
        return int(session.get_one(User, KEY).name.replace("old", "0"))

    went_back, seen, last, roles = 0, tokens.NOTHING, 0, set()
    with replay_paused(local_cluster, still), only(0) as one, only(1) as other:
        for number in range(1, 100):
            rename(cluster, str(number))
            for process in (one, other, one):
                with process.reader() as session:
                    went_back += version(session) < last
                with process.reader(after=seen) as session:
                    found = version(session)
                    roles.add((process is one, role_of(session)))
                assert found >= last
                seen, last = session.token, found
    assert last > 0
    assert (False, Role.REPLICA) in roles
    assert went_back  # the control: without a token they do


@pytest.mark.usefixtures("users")
def test_a_primary_that_was_read_is_gone_on_from(
    cluster: Cluster, local_cluster: LocalCluster
) -> None:
    with replay_paused(local_cluster, *names_of(local_cluster)):
        written = rename(cluster, "new")
        with cluster.reader(after=written) as session:
            assert session.get_one(User, KEY).name == "new"
        assert tokens.covers(session.token, written)
        with cluster.reader(after=session.token) as session:
            assert session.get_one(User, KEY).name == "new"


def forged(token: str) -> dict[str, str]:
    (mark,) = tokens.parse(token).marks
    far = replace(mark, lsn=2**64 - 1)
    return {
        "truncated": token[:-5],
        "empty": "",
        "of version 0": "0:alpha",
        "of the future": tokens.Token((far,)).text,
        "of another cluster": tokens.Token((replace(mark, system=1),)).text,
        "of another timeline": tokens.Token((replace(mark, timeline=9),)).text,
        "of 10 MB": token * 200_000,
        "of bytes": "\x00\ud800",
    }


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize("kind", forged(tokens.mint(10, 1, 24, {3: 1}).text))
def test_a_token_that_is_not_ours_reads_the_primary(
    cluster: Cluster, local_cluster: LocalCluster, kind: str
) -> None:
    with replay_paused(local_cluster, *names_of(local_cluster)):
        token = rename(cluster, "new")
        with cluster.reader(after=forged(token)[kind]) as session:
            assert session.get_one(User, KEY).name == "new"
            assert role_of(session) is Role.PRIMARY


@pytest.mark.usefixtures("users")
def test_a_bound_in_seconds_is_kept(cluster: Cluster, local_cluster: LocalCluster) -> None:
    def reads_a_replica(max_lag: float) -> bool:
        with cluster.reader(max_lag=max_lag) as session:
            session.get_one(User, KEY)
            return role_of(session) is Role.REPLICA

    wait_until(lambda: reads_a_replica(1.0), 10.0, "the lag is known and small")
    with replay_paused(local_cluster, *names_of(local_cluster)):
        rename(cluster, "new")
        wait_until(lambda: not reads_a_replica(0.3), 10.0, "the replicas are too old")
        with cluster.reader(max_lag=0.3) as session:
            assert session.get_one(User, KEY).name == "new"
        assert reads_a_replica(3600.0)
        with cluster.reader(max_lag=3600.0) as session:
            assert session.get_one(User, KEY).name == "old"


@pytest.mark.usefixtures("users")
def test_a_stream_goes_on_with_what_it_began_with(
    cluster: Cluster, local_cluster: LocalCluster, settled: Settled
) -> None:
    """Its snapshot was new enough when it was taken, and grows no younger."""
    with cluster.writer() as writer:
        writer.add_all(Photo(owner_id=KEY, caption=f"{n}") for n in range(50))
        writer.commit()
    settled()
    captions = select(Photo.caption).where(Photo.owner_id == KEY).order_by(Photo.id)

    def reads_a_replica(max_lag: float) -> bool:
        with cluster.reader(max_lag=max_lag) as session:
            session.get_one(User, KEY)
            return role_of(session) is Role.REPLICA

    wait_until(lambda: reads_a_replica(0.5), 10.0, "the lag is known and small")
    with cluster.reader(max_lag=0.5) as session:
        rows = iter(session.scalars(captions, execution_options={"yield_per": 5}))
        seen = [next(rows)]
        assert role_of(session) is Role.REPLICA
        with replay_paused(local_cluster, *names_of(local_cluster)):
            rename(cluster, "new")
            wait_until(lambda: not reads_a_replica(0.5), 10.0, "the replicas are too old")
            seen += rows
        assert seen == ["old", *(str(n) for n in range(50))]


@pytest.mark.usefixtures("users")
def test_a_statement_that_replay_cancels_is_run_on_the_primary(
    cluster: Cluster, local_cluster: LocalCluster, topology: Topology
) -> None:
    events: list[Event] = []
    cluster.listen(events.append)
    slow = (
        select(User.name)
        .where(User.id == KEY)
        .where(text("CASE WHEN pg_is_in_recovery() THEN pg_sleep(30) IS NOT NULL ELSE true END"))
    )
    with ExitStack() as stack:
        for name in names_of(local_cluster):
            stack.enter_context(
                setting(local_cluster, name, "max_standby_streaming_delay", "100ms")
            )
        dsns = [local_cluster.superuser_dsn(name) for name in names_of(local_cluster)]
        stop = _lock_when_it_sleeps(dsns, topology)
        with cluster.reader() as session:
            assert session.scalars(slow).one() == "old"
            assert role_of(session) is Role.PRIMARY
        stop()
    assert any(isinstance(event, ReplicaPassedOver) for event in events)


def _lock_when_it_sleeps(dsns: list[str], topology: Topology) -> Callable[[], None]:
    """In a thread: lock the table exclusively, which replay repeats, once a replica sleeps."""
    import threading

    def sleeps() -> bool:
        for dsn in dsns:
            with psycopg.connect(dsn, autocommit=True) as connection:
                query = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_sleep(30)%' AND state = 'active' AND pid <> pg_backend_pid()"
                if connection.execute(query.encode()).fetchone():
                    return True
        return False

    def lock() -> None:
        wait_until(sleeps, 20.0, "a replica sleeps")
        with admin(topology.physical["alpha"]) as connection, connection.transaction():
            connection.execute("LOCK TABLE shard_0003.users IN ACCESS EXCLUSIVE MODE")

    thread = threading.Thread(target=lock)
    thread.start()
    return thread.join


@pytest.mark.usefixtures("users")
def test_a_watched_test_knows_which_reads_are_safe(cluster: Cluster) -> None:
    with watch(cluster, stale_reads=False):
        token = rename(cluster, "new")
        with cluster.reader(after=token) as session:
            assert session.get_one(User, KEY).name == "new"
        with cluster.reader(after=tokens.merge(token, tokens.NOTHING)) as session:
            assert session.get_one(User, KEY).name == "new"


@pytest.mark.usefixtures("users")
def test_a_session_that_is_left_open_asks_nothing_of_the_next(cluster: Cluster) -> None:
    session = cluster.reader(after=tokens.Token((tokens.Mark(1, 9, 1, 9),)).text)
    session.get_one(User, KEY)
    del session
    for _ in itertools.repeat(None, 10):
        with cluster.reader() as again:
            again.get_one(User, KEY)
            assert role_of(again) is Role.REPLICA


@pytest.mark.fault
@pytest.mark.usefixtures("users")
@pytest.mark.parametrize("read", [READS["get"], READS["scatter"]], ids=["get", "scatter"])
def test_replicas_that_are_frozen_are_given_up(
    cluster: Cluster, local_cluster: LocalCluster, topology: Topology, read: Read
) -> None:
    token = rename(cluster, "new")
    members = cluster.connections.replica_sets["alpha"]
    with cluster.reader(after=token) as session:
        assert read(session) == "new"
    wait_until(
        lambda: all(members.lag(e) is not None for e in topology.physical["alpha"].replicas),
        10.0,
        "the probes run",
    )
    for name in names_of(local_cluster):
        local_cluster.pause(name)
    try:
        for _ in range(3):
            with cluster.reader(after=token) as session:
                assert read(session) == "new"
                assert role_of(session) is Role.PRIMARY
    finally:
        for name in names_of(local_cluster):
            local_cluster.resume(name)

    def comes_back() -> bool:
        with cluster.reader(after=token) as session:
            return read(session) == "new" and role_of(session) is Role.REPLICA

    wait_until(comes_back, 20.0, "the replicas are read again")
