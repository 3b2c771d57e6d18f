"""Strategies and placement on real servers: what is written is found again, by every spelling."""

from __future__ import annotations

import threading
import unicodedata
import uuid
from collections import Counter
from collections.abc import Mapping

import psycopg
import pytest
from sqlalchemy import func, insert, select
from sqlalchemy.exc import DBAPIError

from shardkit import AsyncCluster, Cluster, LeastLoaded, Pinned, Weighted, all_shards, ids
from shardkit.clock import Clock
from shardkit.errors import (
    ConfigurationError,
    InvalidShardKeyError,
    NoShardKeyError,
    ShardKeyChangeError,
    UnsupportedStatementError,
)
from shardkit.placement import Loads, Placement
from shardkit.testing import wait_until
from shardkit.tokens import ASK_PRIMARIES
from shardkit.topology import Topology, schema_name
from tests.fixtures.sharded import Settled, admin
from tests.models import Device, Handle, Reading, Tenant, User

pytestmark = pytest.mark.integration


def shard_of(topology: Topology, table: str, column: str, value: object) -> list[int]:
    """Return the logical shards whose table holds a row, asking each of them."""
    found = []
    for physical in topology.physical.values():
        with admin(physical) as connection:
            for n in topology.shard_map.owned_by(physical.name):
                query = f"SELECT 1 FROM {schema_name(n)}.{table} WHERE {column} = %s"
                if connection.execute(query.encode(), [value]).fetchone():
                    found.append(n)
    return found


# -- range


def test_rows_lie_in_their_range_and_comparisons_ask_only_those(
    cluster: Cluster, topology: Topology
) -> None:
    for meter in (-5, 999, 1_000, 1_999):
        with cluster.writer() as session:
            session.add(Reading(meter=meter, value=meter))
            session.commit()
    assert [shard_of(topology, "readings", "meter", m) for m in (-5, 999, 1_000)] == [
        [3],
        [3],
        [40],
    ]
    with cluster.reader(after=ASK_PRIMARIES) as session:
        low = select(Reading.meter).where(Reading.meter < 1_000).order_by(Reading.meter)
        assert session.route(low).shards == (3,)
        assert session.scalars(low).all() == [-5, 999]
        middle = select(Reading.meter).where(Reading.meter > 500, Reading.meter <= 1_000)
        assert session.route(middle).shards == (3, 40)
        assert sorted(session.scalars(middle).all()) == [999, 1_000]
        assert session.route(select(Reading).where(Reading.meter >= 1_000)).shards == (40,)
        assert session.scalars(select(Reading).where(Reading.meter > 9_000)).all() == []
        between = select(Reading.meter).where(Reading.meter.between(500, 999))
        assert session.route(between).shards == (3,)
        assert session.scalars(between).all() == [999]
        assert session.route(select(Reading).where(Reading.meter.between(999, 1_000))).shards == (
            3,
            40,
        )
        assert session.scalars(select(Reading).where(Reading.meter.between(1_500, 0))).all() == []
        for wide in (~Reading.meter.between(0, 1), Reading.meter.between(9, 0, symmetric=True)):
            assert (
                len(session.route(select(Reading).where(wide).options(all_shards())).shards) == 64
            )
        with pytest.raises(InvalidShardKeyError, match="beyond the last range"):
            session.get(Reading, 2_000)


# -- hash


def test_a_uuid_is_one_key_in_every_spelling(cluster: Cluster, topology: Topology) -> None:
    serial = uuid.uuid4()
    with cluster.writer() as session:
        device = Device(serial=f"{{{str(serial).upper()}}}")
        session.add(device)
        session.commit()
        assert device.serial == serial, "one spelling, as the database returns it"
    assert shard_of(topology, "devices", "serial", serial) == [ids.shard_of(device.id)]
    with cluster.reader(after=session.token) as reader:
        for spelling in (serial, str(serial), serial.hex, str(serial).upper()):
            found = reader.scalars(select(Device).where(Device.serial == spelling)).one()
            assert found.id == device.id
        several = [str(serial).upper(), serial, serial.hex, uuid.uuid4(), str(uuid.uuid4())]
        assert len(reader.scalars(select(Device).where(Device.serial.in_(several))).all()) == 1


def test_a_text_in_another_normal_form_is_refused_not_missed(cluster: Cluster) -> None:
    name = "caf\u00e9"
    decomposed = unicodedata.normalize("NFD", name)
    with cluster.writer() as session:
        session.add(Handle(name=name, user_id=1))
        session.commit()
        assert session.get(Handle, name) is not None
        for refused in (decomposed, 1, None, True, b"a", "a\0", "\ud800", "x" * 10_000_000):
            session.add(Handle(name=refused, user_id=1))
            with pytest.raises(NoShardKeyError if refused is None else InvalidShardKeyError):
                session.flush()
            session.expunge_all()
            if (
                refused is not None and refused is not True
            ):  # `IS NULL` and `= true` name no key at all
                with pytest.raises(InvalidShardKeyError):
                    session.scalars(select(Handle).where(Handle.name == refused))
                with pytest.raises(InvalidShardKeyError):
                    session.scalars(select(Handle).where(Handle.name.in_([name, refused])))
                with pytest.raises(InvalidShardKeyError):
                    session.execute(insert(Handle).values(name=refused, user_id=1))
        longest = "k" * 2048
        session.rollback()
        session.add(Handle(name=longest, user_id=1))
        session.commit()
        assert session.get(Handle, longest) is not None


# -- directory


def test_a_directory_places_a_key_once_and_finds_it_again(
    cluster: Cluster, topology: Topology, settled: Settled
) -> None:
    names = [f"tenant {i}" for i in range(12)]
    for name in names:
        with cluster.writer() as session:
            session.add(Tenant(name=name))
            session.commit()
    settled()
    with Cluster(topology) as other, other.reader() as session:
        assert {t.name for t in session.scalars(select(Tenant).where(Tenant.name.in_(names)))} == {
            *names
        }
        for name in names:
            route = session.route(select(Tenant).where(Tenant.name == name))
            assert list(route.shards) == shard_of(topology, "tenants", "name", name)
            assert session.get(Tenant, name) is not None
    with cluster.writer() as session:
        tenant = session.get_one(Tenant, names[0])
        tenant.plan = "paid"
        session.commit()
        tenant.name = "another"
        with pytest.raises(ShardKeyChangeError):
            session.flush()


def test_a_key_without_an_entry_has_no_rows_and_gets_none_by_reading(
    cluster: Cluster, topology: Topology
) -> None:
    with cluster.reader() as session:
        assert session.get(Tenant, "nobody") is None
        statement = select(Tenant).where(Tenant.name == "nobody")
        assert session.route(statement).kind == "one"
        assert session.scalars(statement).all() == []
    assert _entries(topology) == {}
    with cluster.writer() as session:
        session.add(Tenant(name="nobody"))
        session.commit()
    with cluster.reader(after=session.token) as reader:
        assert reader.get(Tenant, "nobody") is not None, "no answer was remembered"


def test_a_reader_sees_a_new_entry_that_its_replica_lacks(
    cluster: Cluster, topology: Topology
) -> None:
    with cluster.writer() as session:
        session.add(Tenant(name="new"))
        session.commit()
    with Cluster(topology) as other, other.reader(after=session.token) as reader:
        assert reader.get(Tenant, "new") is not None


def test_racing_writers_agree_on_one_logical_shard(topology: Topology) -> None:
    names = [f"race {i}" for i in range(8)]
    barrier = threading.Barrier(4)
    answers: list[dict[str, int]] = []

    def run(place: int) -> None:
        with Cluster(topology, placement=Pinned(place)) as cluster, cluster.writer() as session:
            barrier.wait(30)
            mine = {}
            for name in names:
                mine[name] = session._route(insert(Tenant).values(name=name, plan="x"), None)[0]
            answers.append(mine)

    threads = [threading.Thread(target=run, args=(place,)) for place in (0, 1, 40, 41)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 4
    assert all(answer == answers[0] for answer in answers)
    assert set(_entries(topology)) == {f"s{name}".encode() for name in names}


def test_the_application_can_only_add_entries(cluster: Cluster, topology: Topology) -> None:
    with cluster.writer() as session:
        session.add(Tenant(name="fixed"))
        session.commit()
    physical = topology.physical["alpha"]
    url = physical.primary.url.set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
        for change in ("UPDATE {} SET shard = 1", "DELETE FROM {}", "TRUNCATE {}"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(change.format("shard_0000.shardkit_directory").encode())


@pytest.mark.anyio
async def test_directories_under_asyncio(topology: Topology) -> None:
    async with AsyncCluster(topology, placement=Pinned("beta")) as cluster:
        async with cluster.writer() as session:
            session.add(Tenant(name="async"))
            await session.commit()
        statement = select(Tenant).where(Tenant.name == "async")
        async with cluster.reader(after=session.token) as reader:
            assert await reader.get(Tenant, "async") is not None
            assert reader.route(statement).shards[0] >= 32
            with pytest.raises(UnsupportedStatementError, match="run_sync"):
                reader.route(select(Tenant).where(Tenant.name == "unknown"))


def _entries(topology: Topology) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for physical in topology.physical.values():
        with admin(physical) as connection:
            for n in topology.shard_map.owned_by(physical.name):
                query = f"SELECT key, shard FROM {schema_name(n)}.shardkit_directory"
                found.update(connection.execute(query.encode()).fetchall())  # type: ignore[arg-type]
    return found


# -- placement


def test_policies_decide_where_new_rows_go(topology: Topology) -> None:
    def placed(cluster: Cluster, n_users: int) -> Counter[int]:
        with cluster.writer() as session:
            users = [User(name=f"user {i}") for i in range(n_users)]
            session.add_all(users)
            session.commit()
        return Counter(ids.shard_of(user.id) for user in users)

    with Cluster(topology, placement=Pinned(7)) as cluster:
        assert placed(cluster, 5) == {7: 5}
    with Cluster(topology, placement=Weighted({"beta": 1})) as cluster:
        assert min(placed(cluster, 20)) >= 32
    with Cluster(topology, placement=Weighted({1: 1, 2: 1})) as cluster:
        assert set(placed(cluster, 40)) == {1, 2}
        with pytest.raises(ConfigurationError, match="gamma"):
            Cluster(topology, placement=Weighted({"gamma": 1}))
        with pytest.raises(ConfigurationError):
            Cluster(topology, placement=Pinned(64))


def test_the_least_loaded_logical_shards_get_the_next_rows(topology: Topology) -> None:
    with Cluster(topology, placement=Pinned(7)) as cluster, cluster.writer() as session:
        session.add_all([User(name=f"user {i}") for i in range(50)])
        session.commit()
    seen: list[Mapping[int, float]] = []

    class Recorded(LeastLoaded):
        """Servers' statistics of other tests may still change: what counts is what it saw."""

        def bind(self, topology: Topology, loads: Loads, clock: Clock) -> Placement:
            def recorded() -> Mapping[int, float]:
                seen.append(loads())
                return seen[-1]

            return super().bind(topology, recorded, clock)

    with Cluster(topology, placement=Recorded()) as cluster:
        wait_until(
            lambda: cluster.connections._loads()[7] >= 50,
            20.0,
            "the server's statistics show the rows",
        )
        with cluster.reader() as reader:
            assert reader.scalar(select(func.count()).select_from(User).options(all_shards()))
        chosen = [cluster.connections.placement(64) for _ in range(10)]
        (measured,) = seen
        assert len(measured) == 64
        assert 7 not in chosen
        counted = dict(measured)
        for shard in chosen:
            assert counted[shard] == min(counted.values())
            counted[shard] += 1  # what this process places counts until the next measurement


def test_a_key_out_of_the_columns_range_is_the_databases_to_refuse(cluster: Cluster) -> None:
    with cluster.writer() as session:
        session.add(Reading(meter=5, value=1 << 70))
        with pytest.raises(DBAPIError):
            session.flush()
