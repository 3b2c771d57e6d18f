"""What a hit costs, how many round trips many keys take, and how much the cache answers.

On real servers of its own, wall time, interleaved. A hit as far as the row of an object, with
version and checksum checked, beside pymemcache's own `Client.get` of the same bytes; an object from
the cache beside one from the database, each in a session of its own; the same by dogpile.cache with
`Session.merge(load=False)`, as SQLAlchemy's example has it, and by hand. `cachetrace` has the hit
rates.
"""

from __future__ import annotations

import itertools
import pickle
import statistics
from datetime import UTC, datetime
from typing import Any

from dogpile.cache import make_region
from pymemcache.client.base import Client
from sqlalchemy import inspect
from sqlalchemy.orm import DeclarativeBase, Mapped

from benchmarks.cachetrace import hit_rates, memcached
from benchmarks.measure import database, interleaved, paired, report, servers
from shardkit import Cluster, Sharded, ids
from shardkit.cached import CachePlan, plan_of
from shardkit.caches.memcached import Memcached
from shardkit.caching.operations import Kind, Op, Outcome, Request
from shardkit.config import CacheConfig, load
from shardkit.rowcache import RowCache
from shardkit.testing import FaultProxy
from shardkit.topology import ShardMap, Topology

PEERS = ("pymemcache.Client.get", "dogpile.cache", "look-aside", "shardkit without a cache")
TARGETS = {
    "hit_vs_pymemcache_get": "≤ 1.5",
    "orm_hit_vs_orm_db_get": "≤ 0.5",
    "write_vs_uncached": "≤ 1.15",
    "multiget100_round_trips_per_node": "≤ 1",
    "hit_rate": "≥ 0.964",
}
SHARD = 42


class Base(DeclarativeBase):
    """Models of the benchmark."""


class Photo(Sharded, Base):
    __tablename__ = "photos"
    __shard_key__ = "owner_id"
    __cache_ttl__ = 3600.0
    owner_id: Mapped[int]
    caption: Mapped[str]
    rank: Mapped[int | None]
    is_public: Mapped[bool]
    width: Mapped[int]
    taken_at: Mapped[str]


class Plain(Sharded, Base):
    """The same without a cache, and so without triggers."""

    __tablename__ = "plain"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int]
    caption: Mapped[str]
    rank: Mapped[int | None]
    is_public: Mapped[bool]
    width: Mapped[int]
    taken_at: Mapped[str]


def row(key: int) -> list[Any]:
    """Return a row, in the order of the plan's columns."""
    caption = "a caption of some sixty characters, as people write them: dawn"
    taken = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).isoformat()
    values = {
        "id": key, "owner_id": ids.compose(1, SHARD, 0), "caption": caption, "rank": None,
        "is_public": True, "width": 1280, "taken_at": taken, "version": 7,
    }  # fmt: skip
    return [values[name] for name in plan().attributes]


def plan() -> CachePlan:
    """Return how photos are cached."""
    found = plan_of(inspect(Photo))
    assert found is not None
    return found


class Known:
    """A cluster of which nothing but the map is asked."""

    topology = Topology("bench", {}, ShardMap(("alpha",) * 64, (1,) * 64))


def main(*, as_json: bool, quick: bool = False) -> None:
    rounds = 20 if quick else 100
    with memcached() as one, memcached() as two:
        times = hits(one, rounds=rounds)
        trips = round_trips([one, two])
    objects_times = objects(rounds=rounds)
    writes_times, write_ratio = writes(rounds=60 if quick else 300)
    rates = hit_rates(n_views=4_000 if quick else 20_000)
    get = times["pymemcache get"]
    figures = {
        "hit_vs_pymemcache_get": times["hit"] / get,
        "run_vs_pymemcache_get": times["run"] / get,
        "whole_hit_vs_pymemcache_get": times["hit, shared by readers"] / get,
        "hit_vs_dogpile_get": times["hit"] / times["dogpile get"],
        "multiget100_vs_100_gets": times["100 keys"] / (100 * get),
        "multiget100_round_trips_per_node": trips,
        "orm_hit_vs_orm_db_get": objects_times["orm hit"] / objects_times["orm db get"],
        "dogpile_merge_vs_orm_db_get": objects_times["dogpile, merge"]
        / objects_times["orm db get"],
        "write_vs_uncached": write_ratio,
        "write_cpu_vs_uncached": writes_times["cached update, our CPU"]
        / writes_times["uncached update, our CPU"],
        **rates,
    }
    medians = times | objects_times | writes_times
    report("cache", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


def hits(port: int, *, rounds: int, calls: int = 300) -> dict[str, float]:
    """Return median seconds of one call."""
    photos = plan()
    config = CacheConfig(backend="memcached", nodes=(f"127.0.0.1:{port}",))
    rows = RowCache(config, Known())
    reads = rows.reads
    client = Client(("127.0.0.1", port), no_delay=True)
    region = make_region().configure(
        "dogpile.cache.pymemcache", arguments={"url": f"127.0.0.1:{port}"}
    )
    keys = [ids.compose(2, SHARD, n) for n in range(100)]
    fill(rows, keys)
    identity = (keys[0],)
    name = rows.key(photos, SHARD, identity)
    raw = client.get(name)
    region.set("row", row(keys[0]))
    many = [(SHARD, (key,)) for key in keys]
    reader = reads.reading(photos, _no_session)

    def get() -> None:
        for _ in range(calls):
            assert client.get(name) == raw

    def run() -> None:
        ask = [Request(Op.LEASE, name, ttl=4.0)]
        for _ in range(calls):
            rows.run(ask)

    def hit() -> None:
        for _ in range(calls):
            assert reader.one(name, (SHARD, identity)).is_known

    def whole() -> None:
        for _ in range(calls):
            assert reads.one(photos, SHARD, identity, _no_session)[1] is None

    def dogpile() -> None:
        for _ in range(calls):
            assert region.get("row")

    def multi() -> None:
        for _ in range(calls // 100):
            reads.many(photos, many, _no_session)

    arms = {
        "pymemcache get": get,
        "run": run,
        "hit": hit,
        "hit, shared by readers": whole,
        "dogpile get": dogpile,
        "100 keys": multi,
    }
    times = interleaved(arms, rounds=rounds, warm_up=2)
    times = {arm: seconds / calls for arm, seconds in times.items()}
    times["100 keys"] *= 100
    client.close()
    rows.close()
    return times


def round_trips(ports: list[int]) -> float:
    """Return the most round trips that 100 keys took on any server."""
    proxies = [FaultProxy("127.0.0.1", port, protocol="tcp") for port in ports]
    try:
        for proxy in proxies:
            proxy.start()
        nodes = tuple(f"127.0.0.1:{proxy.port}" for proxy in proxies)
        rows = RowCache(CacheConfig(backend="memcached", nodes=nodes), Known())
        rows.backend.close()
        rows.backend = Memcached(nodes, deadline=5.0)  # through proxies, on a busy machine
        keys = [ids.compose(3, SHARD, n) for n in range(100)]
        fill(rows, keys)
        for proxy in proxies:
            proxy.forget()
        wanted = [(SHARD, (key,)) for key in keys]
        found, counts = rows.reads.many(plan(), wanted, _no_session)
        assert len(found) == counts.hits == 100
        trips = max(proxy.counts.round_trips for proxy in proxies)
        rows.close()
        return float(trips)
    finally:
        for proxy in proxies:
            proxy.stop()


def objects(*, rounds: int, calls: int = 20) -> dict[str, float]:
    """Return median seconds of one object by primary key, in a session of its own."""
    with memcached() as port, servers(logical_shards=64) as local:
        _, topology = load(local.config_path)
        small = database(local, topology, "bench", logical_shards=64, metadata=Base.metadata)
        config = CacheConfig(backend="memcached", nodes=(f"127.0.0.1:{port}",))
        region = make_region().configure(
            "dogpile.cache.pymemcache", arguments={"url": f"127.0.0.1:{port}"}
        )
        client = Client(("127.0.0.1", port), no_delay=True)
        with Cluster(small) as plain, Cluster(small, cache=config) as cluster:
            numbers = itertools.count(ids.compose(2, SHARD, 0))
            key = next(numbers)
            values = dict(zip(plan().attributes, row(key), strict=True))
            with plain.writer() as session:
                session.add(Photo(**values))
                session.commit()

            def load_photo() -> Photo:
                with plain.reader() as session:
                    photo = session.get_one(Photo, key)
                    session.expunge(photo)
                    return photo

            def hit() -> None:
                for _ in range(calls):
                    with cluster.reader() as session:
                        session.get_one(Photo, key)

            def get() -> None:
                for _ in range(calls):
                    with plain.reader() as session:
                        session.get_one(Photo, key)

            def dogpile() -> None:
                for _ in range(calls):
                    photo = region.get_or_create(f"photo:{key}", load_photo)
                    with plain.reader() as session:
                        session.merge(photo, load=False)

            def by_hand() -> None:
                for _ in range(calls):
                    held = client.get(f"by-hand:{key}")
                    if held is None:
                        client.set(f"by-hand:{key}", pickle.dumps(load_photo()))
                    else:
                        with plain.reader() as session:
                            session.merge(pickle.loads(held), load=False)  # noqa: S301  our own

            arms = {
                "orm hit": hit,
                "orm db get": get,
                "dogpile, merge": dogpile,
                "look-aside by hand, merge": by_hand,
            }
            times = interleaved(arms, rounds=rounds, warm_up=3)
            assert cluster.cache is not None
            assert cluster.cache.counts.fills == 1
        client.close()
    return {name: seconds / calls for name, seconds in times.items()}


def writes(*, rounds: int, calls: int = 5) -> tuple[dict[str, float], float]:
    """Return median seconds of a transaction that reads an object and changes it; with fsync.

    Both arms use one cluster, its connections and so the same backend of PostgreSQL; one class is
    cached. And the median of the ratios of the two, each of one round: other programs of the
    machine slow both arms of a round, so that it says more than the ratio of the medians.
    """
    with memcached() as port, servers(logical_shards=64, fsync=True) as local:
        _, topology = load(local.config_path)
        small = database(local, topology, "bench", logical_shards=64, metadata=Base.metadata)
        config = CacheConfig(backend="memcached", nodes=(f"127.0.0.1:{port}",))
        with Cluster(small, cache=config) as cluster:
            values = dict(zip(plan().attributes, row(0), strict=True))
            del values["id"], values["version"]
            with cluster.writer() as session:
                photo, plain = Photo(**values), Plain(**values)
                session.add_all([photo, plain])
                session.commit()
            numbers = itertools.count()

            def change(cls: type[Any], key: int) -> None:
                for _ in range(calls):
                    with cluster.writer() as session:
                        session.get_one(cls, key).caption = f"caption {next(numbers)}"
                        session.commit()

            arms = {
                "cached update": lambda: change(Photo, photo.id),
                "uncached update": lambda: change(Plain, plain.id),
            }
            walls, cpus = paired(arms, rounds=rounds, warm_up=5)
            with cluster.reader() as reader:
                reader.get_one(Photo, photo.id)
            assert cluster.cache is not None
            assert cluster.cache.counts.hits == 1, "what was written last is in the cache"
    times = {name: statistics.median(found) / calls for name, found in walls.items()}
    for name, found in cpus.items():
        times[f"{name}, our CPU"] = statistics.median(found) / calls
    both = zip(walls["cached update"], walls["uncached update"], strict=True)
    return times, statistics.median(cached / uncached for cached, uncached in both)


def fill(rows: RowCache, keys: list[int]) -> None:
    """Store rows."""
    photos = plan()
    for key in keys:
        name = rows.key(photos, SHARD, (key,))
        payload = photos.encode(row(key))
        assert payload is not None
        won = rows.run([Request(Op.LEASE, name, ttl=4.0)])[0]
        value = Request(Op.STORE, name, won.cas, Kind.VALUE, 7, payload, 3600.0)
        assert rows.run([value])[0].outcome is Outcome.DONE


def _no_session(_shards: Any) -> Any:
    raise AssertionError("everything is in the cache")
