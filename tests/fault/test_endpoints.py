"""A server dies, comes back, or is not what the configuration says."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import URL, select
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from shardkit import AsyncCluster, Cluster, all_shards, ids
from shardkit.config import load
from shardkit.errors import (
    ConfigurationError,
    EndpointUnavailableError,
    GatherError,
    OutcomeUnknownError,
    PoolTimeoutError,
    UnavailableError,
)
from shardkit.events import EndpointFailed, Gathered
from shardkit.local import LocalCluster
from shardkit.testing import wait_until, watch
from shardkit.tokens import ASK_PRIMARIES
from shardkit.topology import Endpoint, Role, Topology, schema_name
from tests.fixtures.servers import server_of
from tests.fixtures.sharded import Settled, admin
from tests.models import Photo, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

GONE = (EndpointUnavailableError, PoolTimeoutError)
"""What a server that is gone looks like: a pooler tells only those who waited in vain before."""

NEWEST = select(Photo).order_by(Photo.id.desc()).limit(10).options(all_shards())


@pytest.fixture
def healed(local_cluster: LocalCluster, settled: Settled) -> Iterator[LocalCluster]:
    """The servers, all running again afterwards."""
    yield local_cluster
    for server in local_cluster.servers:
        if server.status != "running":
            local_cluster.start_server(server.name)
    settled()
    until_answered(local_cluster)


def until_answered(local: LocalCluster) -> None:
    """Wait for every endpoint; a pooler waits before it tries a server again."""
    _, topology = load(local.config_path)
    for endpoint in topology.endpoints:
        for url in filter(None, (endpoint.url, endpoint.read_url)):
            wait_until(partial(answers, url), 20.0, f"{endpoint} answers")


def answers(address: URL) -> bool:
    """Return whether an address runs a query, through a pooler or not."""
    url = address.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute("SELECT 1").fetchone() == (1,)
    except psycopg.Error:
        return False


@pytest.fixture
def user(cluster: Cluster, settled: Settled) -> User:
    """A user with a photo, on every replica."""
    with cluster.writer() as session:
        user = User(name="ana", photos=[Photo(caption="dawn")])
        session.add(user)
        session.commit()
    settled()
    return user


def owner(cluster: Cluster, user: User) -> str:
    return cluster.topology.shard_map.owner(ids.shard_of(user.id))


def asked(cluster: Cluster, user: User) -> Endpoint:
    """Read the user; return the endpoint that answered."""
    with cluster.reader() as session:
        assert session.get_one(User, user.id).name == "ana"
        return session._roots[owner(cluster, user)][0]


def test_reads_go_on_when_replicas_are_killed(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    first, second = healed.replicas(owner(cluster, user))
    assert {asked(cluster, user).role for _ in range(20)} == {Role.REPLICA}
    healed.kill_server(first.name)
    assert {asked(cluster, user).role for _ in range(20)} == {Role.REPLICA}
    healed.kill_server(second.name)
    assert {asked(cluster, user).role for _ in range(20)} == {Role.PRIMARY}
    with cluster.reader() as session:
        assert [photo.caption for photo in session.scalars(NEWEST)] == ["dawn"]
    healed.start_server(first.name)
    wait_until(lambda: asked(cluster, user).role is Role.REPLICA, 20.0, "the replica is read again")


def test_a_replica_killed_inside_a_session_is_replaced(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    physical = owner(cluster, user)
    with cluster.reader() as session:
        assert session.get(User, user.id) is not None
        endpoint, _ = session._roots[physical]
        healed.kill_server(server_of(healed, endpoint).name)
        session.expunge_all()
        found = session.get_one(User, user.id)
        assert [photo.caption for photo in found.photos] == ["dawn"]
        assert session._roots[physical][0] != endpoint
        assert [photo.caption for photo in session.scalars(NEWEST)] == ["dawn"]


@pytest.mark.anyio
async def test_the_async_reader_survives_too(
    cluster: Cluster, user: User, healed: LocalCluster, cluster_file: Path
) -> None:
    physical = owner(cluster, user)
    async with AsyncCluster.from_file(cluster_file) as twin, twin.reader() as session:
        assert await session.get(User, user.id) is not None
        for server in healed.replicas(physical):
            healed.kill_server(server.name)
        session.expunge_all()
        assert (await session.get_one(User, user.id)).name == "ana"
        assert [photo.caption for photo in await session.scalars(NEWEST)] == ["dawn"]


def test_a_dead_primary_leaves_the_other_physical_shard_working(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    physical = owner(cluster, user)
    with cluster.writer() as session:
        session.get_one(User, user.id).name = "changed"
        healed.kill_server(healed.primary(physical).name)
        with watch(cluster) as seen, pytest.raises(UnavailableError) as caught:
            session.commit()
        assert caught.value.retryable
        assert physical in str(caught.value)
        assert [type(event) for event in seen.events] == [EndpointFailed], "and no commit"
    with cluster.writer() as session, pytest.raises(GONE):
        session.get(User, user.id)
    with cluster.reader() as session:
        assert session.get_one(User, user.id).name == "ana", "replicas answer"
    with (
        cluster.reader(after=ASK_PRIMARIES) as session,
        pytest.raises((UnavailableError, GatherError)),
    ):
        session.scalars(NEWEST)
    other = next(name for name in cluster.topology.physical if name != physical)
    there = cluster.topology.shard_map.owned_by(other)[0]
    cluster.connections.placement = lambda _: there
    with cluster.writer() as session:
        session.add(User(name="bo"))
        session.commit()


def test_a_gather_says_who_answered_and_who_did_not(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    physical = owner(cluster, user)
    other = next(name for name in cluster.topology.physical if name != physical)
    healed.kill_server(healed.primary(other).name)
    with cluster.reader(after=ASK_PRIMARIES) as session, watch(cluster) as seen:
        with pytest.raises(GatherError, match=f"physical shard {other}") as caught:
            session.scalars(NEWEST)
        assert caught.value.retryable
        assert caught.value.answers == {physical: 1}
        assert set(caught.value.failures) == {other}
        assert isinstance(caught.value.failures[other], GONE)
        failed = [event for event in seen.events if isinstance(event, EndpointFailed)]
        assert [(event.physical, event.role) for event in failed] == [(other, "primary")]
        partly = session.scalars(NEWEST.options(all_shards(partial=True)))
        assert [photo.caption for photo in partly] == ["dawn"]
        assert set(session.failures) == {other}
        healed.kill_server(healed.primary(physical).name)
        with pytest.raises(GatherError) as caught:
            session.scalars(NEWEST.options(all_shards(partial=True)))
        assert set(caught.value.failures) == {physical, other}, "nobody answered"


@pytest.mark.parametrize("wide", [True, False])
def test_a_writer_that_lost_a_server_elsewhere_cannot_commit(
    cluster: Cluster, user: User, healed: LocalCluster, wide: bool
) -> None:
    physical = owner(cluster, user)
    with cluster.writer() as session:
        session.get_one(User, user.id).name = "lost"
        session.flush()
        healed.kill_server(healed.primary(physical).name)
        if wide:
            with pytest.raises(GatherError) as caught:
                session.scalars(NEWEST)
            assert set(caught.value.failures) == {physical}
        else:
            shard = ids.shard_of(user.id) ^ 1
            with pytest.raises(GONE):
                session.get(User, ids.compose(1, shard, 0))
        with pytest.raises(PendingRollbackError):
            session.commit()
        session.rollback()
        healed.start_server(healed.primary(physical).name)
        until_answered(healed)
        assert session.get_one(User, user.id).name == "ana"
        session.get_one(User, user.id).name = "kept"
        session.commit()


def test_a_partial_result_takes_another_replica_before_it_leaves_a_server_out(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    physical = owner(cluster, user)
    limits = all_shards(partial=True, timeout=5)
    with cluster.reader() as session, watch(cluster) as seen:
        assert len(session.scalars(NEWEST.options(limits)).all()) == 1
        name = server_of(healed, session._roots[physical][0]).name
        healed.kill_server(name)
        assert len(session.scalars(NEWEST.options(limits)).all()) == 1
        assert session.failures == {}
        again = seen.statements[-1]
        assert again.physical == (physical,), "only the server that failed was asked again"
        gathered = [event for event in seen.events if isinstance(event, Gathered)]
        assert set(gathered[-1].answers) == set(cluster.topology.physical)
        assert any(isinstance(event, EndpointFailed) for event in seen.events)


def test_a_primary_killed_before_commit_leaves_the_outcome_unknown(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    with cluster.writer() as session:
        session.get_one(User, user.id).name = "perhaps"
        session.flush()
        healed.kill_server(healed.primary(owner(cluster, user)).name)
        with pytest.raises(OutcomeUnknownError) as caught:
            session.commit()
        assert not caught.value.retryable


def test_a_primary_killed_during_a_lone_insert_leaves_the_outcome_unknown(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    """It has neither BEGIN nor COMMIT: its own answer is what is lost."""
    physical = cluster.topology.physical[owner(cluster, user)]
    table = f"{schema_name(ids.shard_of(user.id))}.photos"
    caught: list[Exception] = []

    def write() -> None:
        with cluster.writer() as session:
            session.add(Photo(owner_id=user.id, caption="perhaps"))
            try:
                session.commit()
            except Exception as error:  # noqa: BLE001 - looked at below
                caught.append(error)
            assert session.token == ""

    thread = threading.Thread(target=write)
    with closing(admin(physical)) as lock, closing(admin(physical)) as looking:
        lock.execute("BEGIN")
        lock.execute(f"LOCK TABLE {table} IN SHARE MODE".encode())
        thread.start()
        wait_until(
            lambda: bool(looking.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone()),
            10.0,
            "the INSERT waits for the lock",
        )
        healed.kill_server(healed.primary(physical.name).name)
        thread.join()
    assert [type(error) for error in caught] == [OutcomeUnknownError]


def test_a_lone_insert_that_finds_no_server_was_not_written(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    healed.kill_server(healed.primary(owner(cluster, user)).name)
    with cluster.writer() as session:
        session.add(Photo(owner_id=user.id, caption="never"))
        with pytest.raises(UnavailableError) as caught:
            session.commit()
        assert caught.value.retryable


def test_pooled_connections_to_a_restarted_primary_are_replaced_unseen(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    with cluster.writer() as session:
        assert session.get(User, user.id) is not None
    primary = healed.primary(owner(cluster, user)).name
    healed.kill_server(primary)
    healed.start_server(primary)
    until_answered(healed)
    with cluster.writer() as session:
        session.get_one(User, user.id).name = "after the restart"
        session.commit()


@pytest.mark.parametrize("role", [Role.PRIMARY, Role.REPLICA])
def test_a_server_in_the_wrong_role_is_refused_before_the_first_query(
    topology: Topology, role: Role
) -> None:
    shards = {}
    for shard in topology.physical.values():
        first = shard.replicas[0]
        primary = Endpoint(shard.name, Role.PRIMARY, first.url)
        replica = Endpoint(shard.name, Role.REPLICA, shard.primary.url)
        shards[shard.name] = (
            replace(shard, primary=primary)
            if role is Role.PRIMARY
            else replace(shard, replicas=(replica,))
        )
    wrong = Topology(topology.name, shards, topology.shard_map)
    # A pooler leads to a replica during a failover, too, and soon to the primary.
    is_pooled = wrong.physical["alpha"].pooler is not None and role is Role.PRIMARY
    error = EndpointUnavailableError if is_pooled else ConfigurationError
    with Cluster(wrong) as cluster:
        session = cluster.writer() if role is Role.PRIMARY else cluster.reader()
        with session, pytest.raises(error, match=f"configuration says {role}"):
            session.get(User, ids.compose(1, 0, 0))


def test_two_physical_shards_exchanged_are_refused(topology: Topology) -> None:
    alpha, beta = topology.physical["alpha"], topology.physical["beta"]
    exchanged = {
        "alpha": replace(alpha, primary=replace(alpha.primary, url=beta.primary.url)),
        "beta": replace(beta, primary=replace(beta.primary, url=alpha.primary.url)),
    }
    wrong = Topology(topology.name, exchanged, topology.shard_map)
    refused = pytest.raises(ConfigurationError, match="physical shard 'beta'")
    with Cluster(wrong) as cluster, cluster.writer() as session, refused:
        session.get(User, ids.compose(1, 0, 0))


def test_a_database_without_the_schema_names_the_command(
    topology: Topology, local_cluster: LocalCluster
) -> None:
    alpha = replace(topology.physical["alpha"], pooler=None)  # which knows no such database
    dsn = local_cluster.superuser_dsn(local_cluster.primary("alpha").name)
    with psycopg.connect(dsn, autocommit=True) as superuser:
        superuser.execute("DROP DATABASE IF EXISTS bare")
        superuser.execute("CREATE DATABASE bare")
    elsewhere = replace(
        alpha.primary,
        url=alpha.admin_url.set(
            username=alpha.primary.url.username,
            password=alpha.primary.url.password,
            database="bare",
        ),
    )
    shards = {**topology.physical, "alpha": replace(alpha, primary=elsewhere)}
    wrong = Topology(topology.name, shards, topology.shard_map)
    refused = pytest.raises(ConfigurationError, match="shardkit migrate apply")
    with Cluster(wrong) as cluster, cluster.writer() as session, refused:
        session.get(User, ids.compose(1, 0, 0))


def test_a_wrong_password_is_a_matter_of_configuration(topology: Topology) -> None:
    alpha = topology.physical["alpha"]
    wrong_url = alpha.primary.url.set(password="wrong")
    shards = {
        **topology.physical,
        "alpha": replace(alpha, primary=replace(alpha.primary, url=wrong_url)),
    }
    wrong = Topology(topology.name, shards, topology.shard_map)
    refused = pytest.raises(
        ConfigurationError, match=r"refuses the login: (password|SASL) authentication failed"
    )
    with Cluster(wrong) as cluster, cluster.writer() as session, refused:
        session.get(User, ids.compose(1, 0, 0))


@pytest.mark.unpooled("behind a pooler the server's refusal is in the pooler's log only")
def test_row_11_a_server_without_a_free_connection_is_a_typed_error_and_the_others_go_on(
    topology: Topology, user: User, local_cluster: LocalCluster
) -> None:
    """By a limit of the role: PostgreSQL answers both with SQLSTATE 53300."""
    alpha = topology.shard_map.owner(ids.shard_of(user.id))
    beta = next(name for name in topology.physical if name != alpha)
    login = topology.physical[alpha].primary.url.username
    assert login is not None
    dsn = local_cluster.superuser_dsn(local_cluster.primary(alpha).name)
    change = sql.SQL("ALTER ROLE {} CONNECTION LIMIT {}")
    with psycopg.connect(dsn, autocommit=True) as superuser:
        superuser.execute(change.format(sql.Identifier(login), 0))
        try:
            with Cluster(topology) as cluster:
                with (
                    cluster.writer() as writer,
                    pytest.raises(
                        EndpointUnavailableError, match="too many connections"
                    ) as refused,
                ):
                    writer.get(User, user.id)
                assert refused.value.retryable
                elsewhere = next(n for n in range(64) if topology.shard_map.owner(n) == beta)
                with cluster.writer() as writer:
                    assert writer.get(User, ids.compose(1, elsewhere, 0)) is None
        finally:
            superuser.execute(change.format(sql.Identifier(login), -1))
    with Cluster(topology) as cluster, cluster.writer() as writer:
        assert writer.get_one(User, user.id).id == user.id


@pytest.mark.usefixtures("user")
def test_servers_that_are_lost_together_are_all_named(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = psycopg.OperationalError("gone")
    lost = DBAPIError.instance("SELECT", None, gone, psycopg.Error, connection_invalidated=True)
    assert isinstance(lost, DBAPIError)
    with cluster.reader() as session:

        def asked(
            _state: object, _gathering: object, groups: Iterable[str]
        ) -> dict[str, Exception]:
            """Both servers take the statement and go away, also when it is asked again."""
            for physical in groups:
                session._scattering(physical).invalidate()
            return dict.fromkeys(groups, lost)

        monkeypatch.setattr(session, "_asked", asked)
        with pytest.raises(GatherError) as caught:
            session.scalars(NEWEST)
    assert set(caught.value.failures) == {"alpha", "beta"}
    for error in caught.value.failures.values():
        assert isinstance(error, EndpointUnavailableError)
        assert error.endpoint


def test_a_server_lost_in_the_middle_of_a_stream_is_named(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    physical = owner(cluster, user)
    other = next(name for name in cluster.topology.physical if name != physical)
    there = cluster.topology.shard_map.owned_by(other)[0]
    with cluster.writer() as session:
        photos = [Photo(caption=f"{i}") for i in range(30)]
        session.add(User(id=ids.compose(1, there, 0), name="bo", photos=photos))
        session.commit()
    every = select(Photo.id).order_by(Photo.id).options(all_shards())
    with cluster.reader(after=ASK_PRIMARIES) as session:
        stream = session.scalars(every, execution_options={"yield_per": 5})
        next(stream)
        healed.kill_server(healed.primary(other).name)
        with pytest.raises(GatherError, match=f"physical shard {other}") as caught:
            stream.all()
        assert caught.value.retryable
        assert set(caught.value.failures) == {other}
        assert set(caught.value.answers) == {physical}
        root: Any = session._roots[physical][1].connection.driver_connection
        assert root.info.transaction_status.name == "IDLE"
        assert other not in session._roots
        assert session.get_one(User, user.id).name == "ana"
