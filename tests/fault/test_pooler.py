"""PgBouncer between clients and servers: what is said through it leaves nothing behind.

Rows 20, 22 and 24 of the fault matrix: killed, exhausted, and one server connection that several
clients share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import psycopg
import pytest
from sqlalchemy import URL, insert, select, update

from shardkit import AsyncCluster, Cluster, ReadSession, all_shards, deadline
from shardkit.clock import SYSTEM
from shardkit.config import PoolConfig, load
from shardkit.errors import ConfigurationError, PoolTimeoutError, UnavailableError
from shardkit.local import LocalCluster
from shardkit.testing import create_tables, wait_until
from shardkit.topology import Topology
from tests.fixtures.lateness import in_time
from tests.fixtures.pauses import within
from tests.fixtures.servers import lend, options
from tests.models import Base, Handle, Photo, Reading, Tenant, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

NEWEST = select(Photo).order_by(Photo.id.desc()).limit(10)

# Settings that PgBouncer itself carries from client to client are no leak.
_LEFT = """
SELECT pg_backend_pid(), ARRAY(
    SELECT format('setting %s = %s', name, setting) FROM pg_settings
    WHERE source = 'session' AND name NOT IN ('application_name', 'client_encoding', 'DateStyle',
        'TimeZone', 'standard_conforming_strings', 'default_transaction_read_only')
    UNION ALL SELECT 'advisory lock' FROM pg_locks
    WHERE locktype = 'advisory' AND pid = pg_backend_pid()
    UNION ALL SELECT 'prepared ' || statement FROM pg_prepared_statements
    UNION ALL SELECT 'cursor ' || name FROM pg_cursors WHERE name <> ''
    UNION ALL SELECT 'listens to ' || channel FROM pg_listening_channels() AS channel
    UNION ALL SELECT 'temporary tables' WHERE pg_my_temp_schema() <> 0
), current_setting('search_path'), current_setting('statement_timeout')
"""


@dataclass(frozen=True)
class Pooled:
    """A cluster with one server connection per database of each PgBouncer."""

    local: LocalCluster
    topology: Topology

    def left(self) -> dict[str, tuple[object, ...]]:
        """Return what the one server connection behind each address holds, by address."""
        found = {}
        for endpoint in self.topology.endpoints:
            for url in (endpoint.url, endpoint.read_url):
                if url is not None:
                    found[f"{url.port}/{url.database}"] = asked(url, _LEFT)
        return found


def asked(url: URL, query: str) -> tuple[object, ...]:
    """Ask through the pooler, as another client."""
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True, prepare_threshold=None) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row


@pytest.fixture(scope="module")
def pooled(
    postgres_version: str,  # noqa: ARG001  skips when there is none
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pooled]:
    settings = {"default_pool_size": "1", "query_wait_timeout": "3"}
    shape = options(replicas=0, redis=False, memcached=False, pgbouncer_settings=settings)
    with lend(tmp_path_factory.mktemp("pooler") / "cluster", shape) as local:
        if "pgbouncer" in local.missing:
            pytest.skip("PgBouncer is not installed")
        _, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        yield Pooled(local, topology)


def write_and_read(cluster: Cluster, name: str) -> None:
    """Run every kind of statement that sessions emit."""
    with cluster.writer() as session:
        user = User(name=name, photos=[Photo(caption=name)])
        session.add(user)
        session.commit()
    with cluster.writer() as session:
        # Its id is minted before the only server connection is in a transaction.
        session.add(Photo(owner_id=user.id, caption="second"))
        found = session.get_one(User, user.id, with_for_update=True)
        found.name = f"{name}!"
        session.flush()
        with session.begin_nested():
            session.execute(update(Photo).where(Photo.owner_id == user.id).values(rank=1))
        session.scalars(
            select(Photo).where(Photo.owner_id == user.id).options(all_shards(timeout=5))
        ).all()
        session.rollback()
    with cluster.writer() as session:
        session.execute(insert(Handle), [{"name": f"{name}{n}", "user_id": 1} for n in range(1)])
        session.commit()
    with cluster.writer() as session:
        session.add_all([Tenant(name=name), Reading(meter=len(name), value=1)][:1])
        session.commit()
    with cluster.reader() as session:
        assert session.get_one(User, user.id).name == name
        assert len(session.scalars(NEWEST.options(all_shards())).all()) >= 1
        assert session.scalars(NEWEST.options(all_shards(timeout=5, partial=True))).all()
        assert session.get_one(Tenant, name).plan == "free"
        one = select(Photo).where(Photo.owner_id == user.id).options(all_shards(timeout=5))
        for _ in range(7):  # would be prepared from the sixth on
            assert [photo.caption for photo in session.scalars(one)] == [name]


@pytest.mark.anyio
async def test_row_24_nothing_is_left_on_a_server_connection_that_clients_share(
    pooled: Pooled,
) -> None:
    before = pooled.left()
    pool = PoolConfig(timeout=5)
    with Cluster(pooled.topology, pool=pool) as one, Cluster(pooled.topology, pool=pool) as two:
        for turn in range(3):
            write_and_read(one, f"ana{turn}")
            write_and_read(two, f"bo{turn}")
            left = pooled.left()
            assert {place: row[0] for place, row in left.items()} == {
                place: row[0] for place, row in before.items()
            }, "one server connection serves everybody"
            assert left == before
        async with AsyncCluster(pooled.topology, pool=pool) as third:
            async with third.writer() as session:
                session.add(User(name="cy"))
                await session.commit()
            async with third.reader() as session:
                assert (
                    len((await session.scalars(NEWEST.options(all_shards()))).all()) == 6
                )  # cy has none
    left = pooled.left()
    assert left == before
    assert all(row[1] == [] for row in left.values())
    assert {row[3] for row in left.values()} == {"0"}


@pytest.mark.parametrize(
    ("leak", "found"),
    [
        ("SET search_path = shard_0001", "setting search_path = shard_0001"),
        ("SELECT pg_advisory_lock(1)", "advisory lock"),
        ("PREPARE p AS SELECT 1", "prepared PREPARE p AS SELECT 1"),
        ("SET statement_timeout = 1234", "setting statement_timeout = 1234"),
    ],
)
def test_row_24_the_judge_sees_what_is_left(pooled: Pooled, leak: str, found: str) -> None:
    url = pooled.topology.physical["alpha"].primary.url
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(leak.encode())
    try:
        assert asked(url, _LEFT)[1] == [found]
    finally:
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute("DISCARD ALL")


def test_row_20_a_killed_pooler_comes_back(pooled: Pooled) -> None:
    with Cluster(pooled.topology, pool=PoolConfig(timeout=2)) as cluster:
        write_and_read(cluster, "killed")
        for name in ("pgbouncer_alpha", "pgbouncer_beta"):
            pooled.local.kill_server(name)
        with within(1.0), cluster.writer() as session:
            session.add(User(name="bo"))
            with pytest.raises(UnavailableError) as caught:
                session.commit()
        assert caught.value.retryable
        for name in ("pgbouncer_alpha", "pgbouncer_beta"):
            pooled.local.start_server(name)

        names = (f"again{n}" for n in count())

        def works() -> bool:
            try:
                write_and_read(cluster, next(names))
            except UnavailableError:
                return False
            return True

        wait_until(works, 5.0, "the pools are made anew")


def test_row_21_a_frozen_pooler_holds_nobody_beyond_the_deadline(pooled: Pooled) -> None:
    with Cluster(pooled.topology, pool=PoolConfig(timeout=2)) as cluster:
        with cluster.writer() as session:
            user = User(name="frozen")
            session.add(user)
            session.commit()
        names = ("pgbouncer_alpha", "pgbouncer_beta")
        for name in names:
            pooled.local.pause(name)
        try:
            purpose: Callable[[], ReadSession]
            for purpose in (cluster.writer, cluster.reader):
                for _ in range(3):
                    with (
                        in_time(0.3),
                        deadline(0.3),
                        purpose() as asking,
                        pytest.raises(UnavailableError) as e,
                    ):
                        asking.get(User, user.id)
                    assert e.value.retryable
        finally:
            for name in names:
                pooled.local.resume(name)

        def works() -> bool:
            try:
                with cluster.writer() as session:
                    return session.get_one(User, user.id).name == "frozen"
            except UnavailableError:
                return False

        wait_until(works, 15.0, "the breaker probes, and the pooler answers again")


def test_row_22_an_exhausted_pooler_is_a_bounded_wait(pooled: Pooled) -> None:
    url = pooled.topology.physical["alpha"].primary.url
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with (
        psycopg.connect(plain) as holder,
        Cluster(pooled.topology, pool=PoolConfig(timeout=1)) as cluster,
    ):
        holder.execute("SELECT 1")  # and its transaction stays open
        begun = SYSTEM.monotonic()
        cluster.connections.placement = lambda _: 0
        with cluster.writer() as session:
            session.add(User(name="ana"))
            with pytest.raises(PoolTimeoutError) as caught:
                session.commit()
        assert caught.value.retryable
        assert "default_pool_size" in str(caught.value.hint)
        assert SYSTEM.monotonic() - begun < 5.0
        holder.rollback()
        with cluster.writer() as session:
            session.add(User(name="ana"))
            session.commit()


def test_a_reader_that_could_write_is_refused(pooled: Pooled) -> None:
    alpha = pooled.topology.physical["alpha"]
    shards = {
        **pooled.topology.physical,
        "alpha": replace(alpha, primary=replace(alpha.primary, read_url=None)),
    }
    topology = Topology(pooled.topology.name, shards, pooled.topology.shard_map)
    refused = pytest.raises(ConfigurationError, match="lets readers")
    with Cluster(topology) as cluster, cluster.reader() as session, refused:
        session.scalars(NEWEST.options(all_shards())).all()


def test_a_wrong_login_is_a_matter_of_configuration(pooled: Pooled) -> None:
    alpha = pooled.topology.physical["alpha"]
    for url in (alpha.primary.url.set(password="wrong"), alpha.primary.url.set(database="none")):
        wrong = replace(alpha, primary=replace(alpha.primary, url=url, read_url=None))
        topology = Topology(
            pooled.topology.name,
            {**pooled.topology.physical, "alpha": wrong},
            pooled.topology.shard_map,
        )
        with Cluster(topology) as cluster:
            cluster.connections.placement = lambda _: 0
            with cluster.writer() as session:
                session.add(User(name="ana"))
                with pytest.raises(ConfigurationError, match="login"):
                    session.commit()
