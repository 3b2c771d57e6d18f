"""A logical shard changes hands while applications run: nothing lost, nothing twice, no errors."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import insert, select

from shardkit import AsyncCluster, Cluster, all_shards, deadline, ids
from shardkit.config import CacheConfig, PoolConfig, load
from shardkit.errors import ShardFencedError, ShardMovedError, UniqueViolationError
from shardkit.freshness import Freshness
from shardkit.local import LocalCluster
from shardkit.relay import Relay
from shardkit.testing import create_tables, wait_until
from shardkit.topology import Hold
from tests.fixtures.clients import busy, new_id, new_user
from tests.fixtures.movers import Mover
from tests.fixtures.servers import lend, options
from tests.fixtures.sharded import admin
from tests.models import Account, Base, Photo, Profile, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

SHARDS = 4
POOL = PoolConfig(size=8, overflow=8, timeout=30.0)
_NUMBERS = itertools.count(1)


class Pair:
    """Two physical shards, and who owns what."""

    def __init__(self, local: LocalCluster) -> None:
        self.local = local
        config, self.topology = load(local.config_path)
        self.cache = CacheConfig(
            backend="memcached", nodes=(config.services["memcached"],), timeout=0.05
        )
        create_tables(self.topology, Base.metadata)
        self.owners = list(self.topology.shard_map.owners)

    def mover(self, shard: int) -> Mover:
        source = self.owners[shard]
        target = "beta" if source == "alpha" else "alpha"
        self.owners[shard] = target
        return Mover(self.local, self.topology, shard, source, target)

    def cluster(self, **changes: Any) -> Cluster:
        return Cluster(self.topology, pool=POOL, map_age=1.0, **changes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, postgres_version: str) -> Iterator[Pair]:  # noqa: ARG001
    shape = options(replicas=0, logical_shards=SHARDS, redis=False, pgbouncer=False)
    with lend(tmp_path_factory.mktemp("flip") / "cluster", shape) as local:
        yield Pair(local)


class Writers:
    """Writers by `Cluster.run`, and what was acknowledged to them."""

    def __init__(self, cluster: Cluster, owner: int) -> None:
        self.cluster = cluster
        self.owner = owner
        self.acknowledged: list[str] = []

    def write(self, name: str) -> Callable[[threading.Event], None]:
        def work(stop: threading.Event) -> None:
            for n in itertools.count():
                if stop.is_set():
                    return
                caption = f"{name}-{n}"

                def unit(session: Any, caption: str = caption, n: int = n) -> None:
                    session.add(Photo(owner_id=self.owner, caption=caption))
                    if n % 2:  # more than one INSERT, and an event
                        session.flush()
                        session.emit("added", caption, key=self.owner)

                self.cluster.run(unit)
                self.acknowledged.append(caption)

        return work

    def wait(self, more: int = 30) -> None:
        goal = len(self.acknowledged) + more
        wait_until(lambda: len(self.acknowledged) >= goal, 60.0, "writers go on")

    def stored(self, pair: Pair) -> Counter[str]:
        """Return what the owner has, asked with no help of the library."""
        shard = ids.shard_of(self.owner)
        with admin(pair.topology.physical[pair.owners[shard]]) as connection:
            query = f"SELECT caption FROM shard_{shard:04d}.photos WHERE owner_id = %s"
            return Counter(str(row[0]) for row in connection.execute(query.encode(), (self.owner,)))


def test_writers_lose_nothing_repeat_nothing_and_notice_nothing(pair: Pair) -> None:
    delivered: list[str] = []
    with pair.cluster() as cluster:
        writers = Writers(cluster, new_user(cluster, 0))
        relay = Relay(cluster, {"added": lambda event: delivered.append(event.payload)}, poll=0.02)
        with relay:
            with busy(*(writers.write(f"w{n}") for n in range(6))):
                for _ in range(2):
                    writers.wait()
                    pair.mover(0).run()
                writers.wait()
            emitted = {name for name in writers.acknowledged if int(name.partition("-")[2]) % 2}
            wait_until(lambda: emitted <= set(delivered), 60.0, "every event is delivered")
    assert cluster.topology.shard_map.owner(0) == pair.owners[0]
    assert writers.stored(pair) == Counter(writers.acknowledged)
    # Once more for each hand-over at most: what the old owner's relay had in its hands.
    again = sum(n - 1 for n in Counter(delivered).values())
    assert again <= 2 * relay.batch
    with admin(pair.topology.physical["alpha" if pair.owners[0] == "beta" else "beta"]) as old:
        assert old.execute(
            "SELECT state FROM shardkit.ownership WHERE logical_shard = 0"
        ).fetchone() == ("retired",)


def test_async_writers_do_not_either(pair: Pair) -> None:
    with pair.cluster() as plain:
        owner = new_user(plain, 1)
    acknowledged: list[str] = []

    async def write(cluster: AsyncCluster, name: str, stop: threading.Event) -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            caption = f"{name}-{n}"

            async def unit(session: Any, caption: str = caption) -> None:
                session.add(Photo(owner_id=owner, caption=caption))

            await cluster.run(unit)
            acknowledged.append(caption)

    async def run(stop: threading.Event) -> None:
        async with AsyncCluster(pair.topology, pool=POOL) as cluster, asyncio.TaskGroup() as group:
            for n in range(4):
                group.create_task(write(cluster, f"a{n}", stop))

    def wait() -> None:
        goal = len(acknowledged) + 20
        wait_until(lambda: len(acknowledged) >= goal, 60.0, "writers go on")

    with busy(lambda stop: asyncio.run(run(stop))):
        for _ in range(2):
            wait()
            pair.mover(1).run()
        wait()
    with pair.cluster() as cluster:
        writers = Writers(cluster, owner)
        assert writers.stored(pair) == Counter(acknowledged)


def test_readers_through_the_cache_are_never_behind_their_token(pair: Pair) -> None:
    number = new_id(2)
    committed: list[tuple[int, str]] = [(0, "")]
    stale: list[tuple[int, int]] = []
    reads = itertools.count()
    with pair.cluster(cache=pair.cache) as writing, pair.cluster(cache=pair.cache) as reading:

        def create(session: Any) -> None:
            session.add(Profile(id=number, name="0"))

        writing.run(create)

        def write(stop: threading.Event) -> None:
            for n in itertools.count(1):
                if stop.is_set():
                    return
                tokens: list[Any] = []

                def unit(session: Any, n: int = n, tokens: list[Any] = tokens) -> None:
                    session.get(Profile, number).name = str(n)
                    tokens.append(session)

                writing.run(unit)
                committed.append((n, tokens[-1].token))

        def read(stop: threading.Event) -> None:
            while not stop.is_set():
                n, token = committed[-1]
                with reading.reader(after=token or None) as session:
                    found = session.get(Profile, number)
                if found is None or int(found.name) < n:
                    stale.append((n, -1 if found is None else int(found.name)))
                next(reads)

        def goes_on() -> None:
            writes, n_reads = len(committed) + 15, next(reads) + 50
            wait_until(
                lambda: len(committed) >= writes and next(reads) >= n_reads, 60.0, "both go on"
            )

        with busy(write, read, read):
            for _ in range(2):
                goes_on()
                pair.mover(2).run()
            goes_on()
        assert not stale
        assert reading.topology.shard_map.epochs[2] == 3
        assert reading.cache is not None
        assert reading.cache.counts.hits > 0


def renamed(cluster: Cluster, number: int) -> str:
    """Give a profile another name; return the token."""
    sessions: list[Any] = []

    def unit(session: Any) -> None:
        session.get(Profile, number).name = "new"
        sessions.append(session)

    cluster.run(unit)
    return str(sessions[-1].token)


@pytest.mark.parametrize("looks_at_tokens", [True, False])
def test_a_token_tells_a_process_that_reads_only_its_cache_of_a_move(
    pair: Pair, looks_at_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control does not look: then the entry that the old owner's time has left is shown."""
    number = new_id(3)
    reading = Cluster(pair.topology, pool=POOL, cache=pair.cache, map_age=60.0)
    with pair.cluster(cache=pair.cache) as writing, reading:
        writing.run(lambda session: session.add(Profile(id=number, name="old")))

        def reads() -> bool:
            with reading.reader() as session:
                session.get(Profile, number)
            return reading.cache is not None and reading.cache.counts.hits > 0

        wait_until(reads, 20.0, "it is cached")
        pair.mover(3).run()
        token = renamed(writing, number)
        if not looks_at_tokens:
            monkeypatch.setattr(Freshness, "is_ahead_of", lambda _self, _map: False)
        with reading.reader(after=token) as session:
            assert session.get(Profile, number).name == ("new" if looks_at_tokens else "old")


def test_a_process_that_reads_only_its_cache_notices_a_move_by_itself(pair: Pair) -> None:
    number = new_id(3)
    reading = Cluster(pair.topology, pool=POOL, cache=pair.cache, map_age=0.2)
    with pair.cluster(cache=pair.cache) as writing, reading:
        writing.run(lambda session: session.add(Profile(id=number, name="old")))

        def name() -> str:
            with reading.reader() as session:
                return str(session.get(Profile, number).name)

        assert name() == "old"
        pair.mover(3).run()
        renamed(writing, number)
        wait_until(lambda: name() == "new", 20.0, "the map is too old to go on with")


def test_a_session_is_told_where_a_shard_went_and_the_next_one_goes_there(pair: Pair) -> None:
    shard = 3
    with pair.cluster() as cluster, pair.cluster() as other:
        owner = new_user(cluster, shard)
        reader = other.reader()
        assert reader.get(User, owner) is not None
        with cluster.writer() as session:
            assert session.get(User, owner) is not None  # its transaction has begun
            mover = pair.mover(shard)
            mover.prepare()
            mover.fence()
            with pytest.raises(ShardFencedError) as fenced:
                session.execute(
                    insert(Photo).values(id=ids.compose(2, shard, next(_NUMBERS)), owner_id=owner)
                )
            assert fenced.value.logical_shard == shard
        assert cluster.topology.shard_map.held[shard] is Hold.FENCED
        with cluster.writer() as session, deadline(0.3):
            session.add(Photo(owner_id=owner))
            with pytest.raises(ShardFencedError, match="not open yet"):  # it has waited
                session.commit()
        assert reader.get(User, owner, populate_existing=True) is not None, "reads go on"
        with cluster.writer() as session:
            assert session.get(User, owner) is not None
            mover.copy()
            mover.decide()
            mover.activate()
            with pytest.raises(ShardMovedError) as moved:
                session.execute(
                    insert(Photo).values(id=ids.compose(2, shard, next(_NUMBERS)), owner_id=owner)
                )
            assert moved.value.logical_shard == shard
            assert repr(pair.owners[shard]) in str(moved.value)
        with cluster.writer() as session:
            session.add(Photo(owner_id=owner))
            session.commit()
            token = session.token
        assert reader.get(User, owner, populate_existing=True) is not None, "it follows by itself"
        with other.reader(after=token) as session:
            found = select(Photo).where(Photo.owner_id == owner)
            assert len(session.scalars(found).all()) == 1
            wide = select(Photo).where(Photo.owner_id == owner).options(all_shards())
            assert len(session.scalars(wide).all()) == 1
        reader.close()
        mover.close()


def test_a_reader_follows_by_itself_whatever_it_asks(pair: Pair) -> None:
    with Cluster(pair.topology, pool=POOL, map_age=60.0) as cluster:
        owner = new_user(cluster, 3)
        users = select(User.id).options(all_shards())
        streamed = users.execution_options(yield_per=2)
        with cluster.reader() as session:
            before = sorted(session.scalars(users))
            asks: list[Callable[[], bool]] = [
                lambda: session.get(User, owner, populate_existing=True) is not None,
                lambda: sorted(session.scalars(users)) == before,
                lambda: sorted(session.scalars(streamed)) == before,
                lambda: len(session.scalars(select(User).where(User.id.in_([owner]))).all()) == 1,
            ]
            for ask in asks:
                pair.mover(3).run()
                assert ask()


def test_unique_names_stay_unique_across_a_flip(pair: Pair) -> None:
    names = itertools.count()
    taken: list[str] = []
    twice: list[str] = []

    def account(name: str, email: str) -> Callable[[Any], None]:
        return lambda session: session.add(Account(name=name, email=email))

    with pair.cluster() as cluster:

        def write(stop: threading.Event) -> None:
            while not stop.is_set():
                name = f"name {next(names)}"
                cluster.run(account(name, f"{name}@x"))
                taken.append(name)
                try:
                    cluster.run(account(name.upper(), f"{name}@y"))
                except UniqueViolationError:
                    continue
                twice.append(name)

        def goes_on() -> None:
            goal = len(taken) + 15
            wait_until(lambda: len(taken) >= goal, 60.0, "names are taken")

        with busy(write, write):
            for _ in range(2):
                goes_on()
                pair.mover(0).run()
            goes_on()
        assert not twice
        with cluster.writer() as session:
            assert all(session.get_by(Account, name=name) is not None for name in taken)


def _add(account: Account, session: Any) -> None:
    session.add(account)


def test_a_name_is_asked_for_where_a_hand_over_takes_its_time(pair: Pair) -> None:
    """Who has it is on a logical shard that is not open yet, and no session's own."""
    found: list[BaseException] = []
    with pair.cluster() as cluster, deadline(60.0):
        holders = {}
        for n in range(8 * SHARDS):
            account = Account(name=f"held {n}", email=None)
            cluster.run(partial(_add, account))
            holders[ids.shard_of(account.id)] = account.name
        elsewhere = new_id(1)
        mover = pair.mover(2)
        mover.prepare()
        mover.fence()
        mover.copy()
        mover.decide()

        def claim() -> None:
            try:
                with deadline(60.0):
                    again = {"id": elsewhere, "name": holders[2], "email": None}
                    cluster.run(lambda session: session.add(Account(**again)))
            except Exception as error:  # noqa: BLE001  looked at below
                found.append(error)

        thread = threading.Thread(target=claim)
        thread.start()
        asked: set[float] = set()

        def has_waited() -> bool:
            asked.add(cluster.connections.held.heard_at[pair.owners[2]])
            return len(asked) > 40 or not thread.is_alive()

        wait_until(has_waited, 60.0, "it is asked again and again whether it is open")
        mover.activate()
        thread.join()
        mover.close()
    assert [type(error) for error in found] == [UniqueViolationError]


def test_a_fence_whose_mover_died_is_lifted_by_who_waits_for_it(pair: Pair) -> None:
    with pair.cluster() as cluster:
        writers = Writers(cluster, new_user(cluster, 1))
        mover = pair.mover(1)
        mover.prepare()
        mover.fence()  # and nothing more is heard of it
        old = "UPDATE shardkit.ownership SET fenced_at = fenced_at - interval '4 s' WHERE logical_shard = 1"
        mover.on_source.execute(old)
        with busy(writers.write("late")):
            writers.wait(10)
        pair.owners[1] = "alpha" if pair.owners[1] == "beta" else "beta"
        assert writers.stored(pair) == Counter(writers.acknowledged)
        mover.close()
