"""What writers leave in the cache, on a real Memcached: rows, nothing, and never anything old."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import delete, insert, inspect, text, update

from shardkit import AsyncCluster, Cluster, ids
from shardkit.cacheable import cached_tables
from shardkit.cached import plan_of
from shardkit.caching.operations import Answer, Kind, Op, Outcome, Request
from shardkit.config import CacheConfig, PoolConfig
from shardkit.errors import ConfigurationError
from shardkit.ops import cachetriggers
from shardkit.relay import Relay
from shardkit.tokens import ASK_PRIMARIES
from shardkit.topology import Topology, schema_name
from tests.fixtures.caches import CacheServer, NewServer
from tests.fixtures.sharded import admin
from tests.models import Base, Mood, Post, Profile

pytestmark = pytest.mark.integration

PATIENT = 2.0
"""Deadline of the cache in tests that are not about it: the machine may be busy."""


@pytest.fixture
def server(cache_server: NewServer) -> CacheServer:
    return cache_server("memcached")


def config_of(*servers: CacheServer, **settings: Any) -> CacheConfig:
    kind: Any = servers[0].kind
    return CacheConfig(backend=kind, nodes=tuple(s.server for s in servers), **settings)


@pytest.fixture
def cached(topology: Topology, server: CacheServer) -> Iterator[Cluster]:
    """A cluster with one Memcached."""
    pool = PoolConfig(size=8, overflow=8, timeout=20.0)
    with Cluster(topology, pool=pool, cache=config_of(server)) as cluster:
        patient(cluster)
        yield cluster


def patient(cluster: Any) -> None:
    cluster.cache.backend.seconds = PATIENT


def entry(cluster: Cluster, obj: Any) -> Answer:
    """What the server has of an object's row."""
    plan = plan_of(inspect(type(obj)))
    assert plan is not None
    return entry_of(cluster, plan.table.name, obj.id)


def entry_of(cluster: Cluster, table: str, key: int) -> Answer:
    assert cluster.cache is not None
    name = cluster.cache.key_of(table, ids.shard_of(key), (key,))
    (answer,) = cluster.cache.run([Request(Op.READ, name)])
    assert answer.outcome is not Outcome.UNKNOWN
    return answer


def shown(cluster: Cluster, obj: Any) -> dict[str, Any]:
    """The row that the server has."""
    found = entry(cluster, obj)
    assert found.outcome is Outcome.FOUND
    assert found.kind is Kind.VALUE
    plan = plan_of(inspect(type(obj)))
    assert plan is not None
    values = plan.decode(found.payload, found.version)
    assert values is not None
    return dict(zip(plan.attributes, values, strict=True))


def stored(cluster: Cluster, cls: type[Any], key: int, column: str) -> Any:
    where = schema_name(ids.shard_of(key))
    with cluster.reader(after=ASK_PRIMARIES) as session:
        return session.execute(
            text(f"SELECT {column} FROM {where}.{cls.__tablename__} WHERE id = {key}"),
            bind_arguments={"logical_shard": ids.shard_of(key)},
        ).scalar()


def new_profile(cluster: Cluster, name: str = "ana", **values: Any) -> Profile:
    with cluster.writer() as session:
        profile = Profile(name=name, **values)
        session.add(profile)
        session.commit()
    return profile


def outbox(topology: Topology) -> int:
    """How many events wait."""
    n = 0
    for physical in topology.physical.values():
        with admin(physical) as connection:
            for shard in topology.shard_map.owned_by(physical.name):
                query = f"SELECT count(*) FROM {schema_name(shard)}.shardkit_outbox"
                row = connection.execute(query.encode()).fetchone()
                assert row is not None
                n += int(str(row[0]))
    return n


def name_of(cluster: Cluster, key: int) -> str | None:
    with cluster.reader() as session:
        found = session.get(Profile, key)
        return None if found is None else found.name


def test_an_insert_is_stored(cached: Cluster) -> None:
    profile = new_profile(cached, mood=Mood.GOOD, data={"a": [1]})
    assert profile.version > 0
    row = shown(cached, profile)
    assert row["name"] == "ana"
    assert row["data"] == {"a": [1]}
    assert row["seen_at"] is None
    assert row["version"] == profile.version == stored(cached, Profile, profile.id, "version")
    assert name_of(cached, profile.id) == "ana"


def test_an_update_is_stored_with_what_others_have_changed_meanwhile(cached: Cluster) -> None:
    key = new_profile(cached).id
    with cached.writer() as session:
        profile = session.get_one(Profile, key)
        before = profile.version
        session.rollback()  # and it keeps what it has loaded
        session.expunge_all()
    with cached.writer() as session:
        profile = session.get_one(Profile, key)
        with cached.writer() as other:
            other.get_one(Profile, key).mood = Mood.BAD
            other.commit()
        profile.name = "eva"
        session.commit()
        assert profile.mood is Mood.BAD  # the UPDATE has returned it
    row = shown(cached, profile)
    assert (row["name"], row["mood"]) == ("eva", Mood.BAD)
    assert row["version"] == stored(cached, Profile, key, "version") > before + 1
    assert name_of(cached, key) == "eva"


def test_what_is_changed_in_place_after_the_flush_is_not_stored(cached: Cluster) -> None:
    with cached.writer() as session:
        profile = Profile(name="ana", data={"a": 1})
        session.add(profile)
        session.flush()
        profile.data["a"] = 2  # nothing tracks it
        session.commit()
    assert shown(cached, profile)["data"] == {"a": 1}
    assert stored(cached, Profile, profile.id, "data") == {"a": 1}


def test_touched_but_not_changed_is_left_alone(cached: Cluster) -> None:
    profile = new_profile(cached)
    before = entry(cached, profile)
    with cached.writer() as session:
        session.get_one(Profile, profile.id).name = "ana"
        session.commit()
    assert entry(cached, profile) == before


def test_a_delete_leaves_nothing(cached: Cluster) -> None:
    profile = new_profile(cached)
    with cached.writer() as session:
        session.delete(session.get_one(Profile, profile.id))
        session.commit()
    assert entry(cached, profile).outcome is Outcome.NOTHING
    assert name_of(cached, profile.id) is None


def test_statements_of_rows_remove_them(cached: Cluster) -> None:
    one, two, three = (new_profile(cached, name) for name in ("a", "b", "c"))
    with cached.writer() as session:
        session.execute(update(Profile).where(Profile.id == one.id).values(name="A"))
        session.commit()
    assert entry(cached, one).outcome is Outcome.NOTHING
    assert name_of(cached, one.id) == "A"
    with cached.writer() as session:
        session.execute(update(Profile), [{"id": two.id, "name": "B"}])
        session.commit()
    assert entry(cached, two).outcome is Outcome.NOTHING
    assert entry(cached, three).kind is Kind.VALUE
    with cached.writer() as session:
        session.execute(delete(Profile).where(Profile.id == three.id))
        session.commit()
    assert entry(cached, three).outcome is Outcome.NOTHING
    with cached.writer() as session:  # over a value that nobody could know
        (key,) = session.scalars(insert(Profile).returning(Profile.id), [{"name": "d"}]).all()
        session.commit()
    assert entry_of(cached, "profiles", key).outcome is Outcome.NOTHING
    assert name_of(cached, key) == "d"


def test_an_object_and_a_statement_in_one_transaction(cached: Cluster) -> None:
    profile = new_profile(cached)
    with cached.writer() as session:
        mine = session.get_one(Profile, profile.id)
        mine.name = "eva"
        session.flush()
        session.execute(
            update(Profile).where(Profile.id == profile.id).values(name="zoe"),
            execution_options={"synchronize_session": False},
        )
        session.commit()
    assert entry(cached, profile).outcome is Outcome.NOTHING
    assert name_of(cached, profile.id) == "zoe"


def test_text_of_the_program_is_asked_about(cached: Cluster) -> None:
    profile = new_profile(cached)
    table = f"{schema_name(ids.shard_of(profile.id))}.profiles"
    with cached.writer() as session:
        session.execute(
            text(f"UPDATE {table} SET name = 'eva' WHERE id = {profile.id}"),
            bind_arguments={"logical_shard": ids.shard_of(profile.id)},
        )
        session.commit()
    assert entry(cached, profile).outcome is Outcome.NOTHING
    assert name_of(cached, profile.id) == "eva"


def test_rolled_back_leaves_no_marker(cached: Cluster) -> None:
    profile = new_profile(cached)
    with cached.writer() as session:
        session.get_one(Profile, profile.id).name = "eva"
        session.flush()
        session.rollback()
    assert shown(cached, profile)["name"] == "ana"
    with cached.writer() as session:
        session.get_one(Profile, profile.id).name = "eva"

        def refuse() -> None:  # after the markers
            assert entry(cached, profile).kind is Kind.MARKER
            raise RuntimeError("no")

        session._agreement.prepare = refuse  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="no"):
            session.commit()
    assert entry(cached, profile).outcome is Outcome.NOTHING
    assert name_of(cached, profile.id) == "ana"


def test_a_savepoint_that_is_returned_to(cached: Cluster) -> None:
    owner = ids.compose(1, 1, 1)
    with cached.writer() as session:
        first, second = Post(owner_id=owner, text="a"), Post(owner_id=owner, text="b")
        session.add_all([first, second])
        session.commit()
    before = entry(cached, second)
    with cached.writer() as session:
        one = session.get_one(Post, first.id)
        one.text = "A"
        session.flush()
        savepoint = session.begin_nested()
        one.text = "no"
        session.execute(update(Post).where(Post.id == second.id).values(text="no"))
        savepoint.rollback()
        session.commit()
    assert shown(cached, first)["text"] == "A"
    assert entry(cached, second) == before
    with cached.reader() as reader:
        assert reader.get_one(Post, first.id).text == "A"


def test_psql_is_covered_by_the_relay(cached: Cluster, topology: Topology) -> None:
    profile = new_profile(cached)
    Relay(cached).drain()
    shard = ids.shard_of(profile.id)
    owner = topology.physical[topology.shard_map.owner(shard)]
    with admin(owner) as connection:
        table = f"{schema_name(shard)}.profiles"
        connection.execute(f"UPDATE {table} SET name = 'eva' WHERE id = {profile.id}".encode())
    assert shown(cached, profile)["name"] == "ana"  # nobody knows yet
    assert Relay(cached).drain() == 1
    assert entry(cached, profile).outcome is Outcome.NOTHING
    assert name_of(cached, profile.id) == "eva"
    assert outbox(topology) == 0


def test_the_relay_leaves_what_is_new(cached: Cluster, topology: Topology) -> None:
    profile = new_profile(cached)
    assert outbox(topology) == 1
    Relay(cached).drain()
    assert shown(cached, profile)["name"] == "ana"
    assert outbox(topology) == 0


def test_a_cluster_without_a_cache_acknowledges(cluster: Cluster, topology: Topology) -> None:
    new_profile(cluster)
    assert outbox(topology) == 1
    assert Relay(cluster).drain() == 1
    assert outbox(topology) == 0


def test_a_cache_that_is_gone_fails_no_commit(
    cached: Cluster, topology: Topology, server: CacheServer
) -> None:
    profile = new_profile(cached)
    server.kill()
    with cached.writer() as session:
        session.get_one(Profile, profile.id).name = "eva"
        session.commit()
    assert stored(cached, Profile, profile.id, "name") == "eva"
    assert name_of(cached, profile.id) == "eva"
    assert Relay(cached).drain() == 0  # not repaired: kept
    assert outbox(topology) >= 1


def test_over_two_servers(cached: Cluster, topology: Topology) -> None:
    here, there = (topology.shard_map.owned_by(name)[0] for name in sorted(topology.physical)[:2])
    with cached.writer(atomic=True) as session:
        posts = [Post(owner_id=ids.compose(1, shard, 1), text="a") for shard in (here, there)]
        session.add_all(posts)
        session.commit()
    for post in posts:
        assert shown(cached, post)["text"] == "a"
    with cached.writer(atomic=True) as session:
        for post in posts:
            session.get_one(Post, post.id).text = "b"
        session.commit()
    for post in posts:
        assert shown(cached, post)["text"] == "b"
    with cached.writer(atomic=True) as session:
        keys = [post.id for post in posts]
        session.execute(update(Post).where(Post.id.in_(keys)).values(text="c"))
        session.commit()
    for post in posts:
        assert entry(cached, post).outcome is Outcome.NOTHING


@pytest.mark.anyio
async def test_asyncio(topology: Topology, server: CacheServer) -> None:
    with Cluster(topology, cache=config_of(server)) as looker:
        patient(looker)
        async with AsyncCluster(topology, cache=config_of(server)) as cluster:
            patient(cluster)
            async with cluster.writer() as session:
                profile = Profile(name="ana")
                session.add(profile)
                await session.commit()
            assert shown(looker, profile)["name"] == "ana"
            async with cluster.writer() as session:
                mine = await session.get_one(Profile, profile.id)
                mine.name = "eva"
                await session.commit()
            assert shown(looker, profile)["name"] == "eva"
            async with cluster.writer() as session:
                await session.execute(
                    update(Profile).where(Profile.id == profile.id).values(name="zoe")
                )
                await session.commit()
            assert entry(looker, profile).outcome is Outcome.NOTHING


def test_migrations_make_what_is_missing_and_writers_notice(
    cached: Cluster, topology: Topology
) -> None:
    shard = 7
    owner = ids.compose(1, shard, 1)
    tables = cached_tables(Base.metadata)
    assert tables["posts"] == (":id",)
    with admin(topology.physical[topology.shard_map.owner(shard)]) as connection:
        table = f"{schema_name(shard)}.posts"
        for name in ("version", "inserted", "updated", "deleted"):
            connection.execute(f"DROP TRIGGER shardkit_{name} ON {table}".encode())
        try:
            with cached.writer() as session:
                session.add(Post(owner_id=owner, text="a"))
                with pytest.raises(ConfigurationError, match="shardkit migrate apply"):
                    session.commit()
        finally:
            for _ in range(2):  # the second time nothing is missing
                cachetriggers.complete(connection, [shard], tables, lock_timeout=5.0, attempts=5)
    with cached.writer() as session:
        post = Post(owner_id=owner, text="a")
        session.add(post)
        session.commit()
    assert shown(cached, post)["text"] == "a"


SECONDS = 5.0


@pytest.mark.slow
def test_nobody_is_shown_what_was_before_an_acknowledged_commit(
    cached: Cluster, topology: Topology, server: CacheServer
) -> None:
    keys = [new_profile(cached, "0").id for _ in range(3)]
    acknowledged = dict.fromkeys(keys, 0)
    stale: list[tuple[int, int, int]] = []
    failures: list[BaseException] = []
    reads = [0]
    until = time.monotonic() + SECONDS

    def write(key: int, seed: int) -> None:
        n = 0
        while time.monotonic() < until:
            n += 1
            with cached.writer() as session:
                if (n + seed) % 5:
                    session.get_one(Profile, key).name = str(n)
                else:
                    session.execute(update(Profile).where(Profile.id == key).values(name=str(n)))
                if n % 7 == 0:
                    session.flush()
                    session.rollback()
                    continue
                session.commit()
            acknowledged[key] = n

    def read(cluster: Cluster) -> None:
        while time.monotonic() < until:
            for key in keys:
                least = acknowledged[key]
                found = name_of(cluster, key)
                reads[0] += 1
                if found is None or int(found) < least:
                    stale.append((key, least, int(found or -1)))

    def kept(work: Any, *args: Any) -> None:
        try:
            work(*args)
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    pool = PoolConfig(size=8, overflow=8, timeout=20.0)
    with ExitStack() as stack:
        other = stack.enter_context(Cluster(topology, pool=pool, cache=config_of(server)))
        patient(other)
        stack.enter_context(Relay(cached))
        threads = [
            threading.Thread(target=kept, args=(write, key, n)) for n, key in enumerate(keys)
        ]
        threads += [threading.Thread(target=kept, args=(read, c)) for c in (cached, other, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = other.cache.counts if other.cache is not None else None
    print(f"{reads[0]} reads, {sum(acknowledged.values())} writes, {counts}")
    assert not failures, failures
    assert not stale
    assert counts is not None
    assert counts.hits > 0
    assert all(n > 0 for n in acknowledged.values())
