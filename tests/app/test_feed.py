"""Feeds against what one list would say, while people post, delete, follow and block."""

from __future__ import annotations

import datetime as dt
import itertools
import random
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from sqlalchemy import delete, select

from app.accounts.models import User
from app.accounts.service import Viewer
from app.database import Database
from app.errors import InvalidInputError
from app.feed import fanout
from app.feed.building import Builder
from app.feed.cursors import LIFE, Cursors, Place
from app.feed.modes import ROOT, Modes
from app.feed.ranked import RankedFeed
from app.feed.ranking.ads import add
from app.feed.rings import MOST
from app.feed.service import FeedService
from app.feed.timelines import AsyncTimelines, Timelines
from app.graph import tao
from app.graph.models import Assoc, Kind
from app.photos.models import PHOTO_ADDED, Photo
from app.workers import relay_of
from shardkit import AsyncCluster, Cluster, ids
from shardkit.local import LocalCluster
from shardkit.outbox import Event
from shardkit.testing import wait_until
from tests.fixtures.service import Service

pytestmark = pytest.mark.integration

NOW = dt.datetime(2026, 5, 1, tzinfo=dt.UTC)
NUMBERS = itertools.count(1)


class World:
    """People and photos, changed as the service does, without its pictures."""

    def __init__(self, cluster: Cluster, local: LocalCluster) -> None:
        self.cluster = cluster
        self.local = local
        self.relay = relay_of(cluster)
        self.photos: dict[int, set[int]] = {}
        self._at = 1_700_000_000_000

    def deliver(self) -> None:
        """Have every event delivered, by this relay or by that of the service."""

        def is_empty() -> bool:
            self.relay.drain()
            return not any(self._waiting())

        wait_until(is_empty, 60.0, "every event is delivered")

    def _waiting(self) -> Iterator[int]:
        for physical in ("alpha", "beta"):
            name = self.local.primary(physical).name
            with psycopg.connect(self.local.superuser_dsn(name, "shardkit")) as connection:
                for shard in self.cluster.topology.shard_map.owned_by(physical):
                    for table in ("shardkit_outbox", "shardkit_outbox_retry"):
                        query = f"SELECT count(*) FROM shard_{shard:04d}.{table}"
                        yield connection.execute(query).fetchall()[0][0]

    def person(self) -> int:
        name = f"feed{next(NUMBERS)}x"
        with self.cluster.writer() as session:
            user = User(username=name, display_name=name, password_hash="", created_at=NOW)
            session.add(user)
            session.commit()
            self.photos[user.id] = set()
            return int(user.id)

    def post(self, owner: int, n: int = 1) -> list[int]:
        with self.cluster.writer() as session:
            photos = [
                Photo(owner_id=owner, caption="", width=1, height=1, blob_key="x", created_at=NOW)
                for _ in range(n)
            ]
            session.add_all(photos)
            session.commit()
            added = [int(photo.id) for photo in photos]
        self.photos[owner] |= set(added)
        return added

    def remove(self, owner: int, photo: int) -> None:
        with self.cluster.writer() as session:
            session.execute(delete(Photo).where(Photo.owner_id == owner, Photo.id == photo))
            session.commit()
        self.photos[owner].discard(photo)

    def edge(self, kind: Kind, id1: int, id2: int, *, gone: bool = False) -> None:
        self._at += 1
        with self.cluster.writer() as session:
            user = tao.locked(session, id1)
            if gone:
                tao.assoc_delete(session, user, kind, id2)
            else:
                tao.assoc_add(session, user, kind, id2, self._at)
            session.commit()


@pytest.fixture
def world(service: Service, app_cluster: LocalCluster) -> Iterator[World]:
    with Cluster.from_file(service.settings.config) as cluster:
        yield World(cluster, app_cluster)


class Reader:
    """Somebody's feed, read page by page as a server does."""

    def __init__(self, cluster: AsyncCluster, *, timelines: AsyncTimelines | None) -> None:
        self.cluster = cluster
        self.builder = None if timelines is None else Builder(cluster, timelines, 5000)
        both = None if timelines is None or self.builder is None else (timelines, self.builder)
        self.feed = FeedService(
            Database(cluster),
            lambda: NOW,
            Cursors(),
            RankedFeed(cluster, lambda: NOW),
            max_followees=5000,
            timelines=both,
        )

    async def page(self, me: int, before: int = ids.MAX_ID, n: int = 20) -> list[int]:
        async with Database(self.cluster).reader() as session:
            photos, _ = await self.feed.photos(session, me, before, n)
            return [photo.id for photo in photos]

    async def all(self, me: int, n: int = 20) -> list[int]:
        found: list[int] = []
        before = ids.MAX_ID
        while page := await self.page(me, before, n):
            found += page
            before = page[-1]
        return found

    async def settled(self) -> None:
        if self.builder is not None:
            await self.builder.settled()


@pytest.fixture
async def reader(service: Service, app_cluster: LocalCluster) -> AsyncIterator[Reader]:
    del app_cluster
    async with AsyncCluster.from_file(service.settings.config) as cluster:
        if "redis" not in cluster.services:
            pytest.skip("redis is not installed")
        timelines = AsyncTimelines(cluster.services["redis"], patience=5.0)
        yield Reader(cluster, timelines=timelines)
        await timelines.close()


@pytest.mark.anyio
async def test_a_feed_is_what_databases_would_say(world: World, reader: Reader) -> None:
    """A reader without Redis asks databases for everything; both always agree."""
    rng = random.Random(11)
    plain = Reader(reader.cluster, timelines=None)
    me, *others = [world.person() for _ in range(6)]
    for person in others[:3]:
        world.edge(Kind.FOLLOWS, me, person)
        world.post(person, 15)
    world.deliver()
    assert len(await reader.all(me)) == 45  # databases answer, the timeline is built
    await reader.settled()
    pushed = 0
    for _ in range(25):
        person = rng.choice(others)
        match rng.randrange(6):
            case 0 | 1:
                world.post(rng.choice([me, person]), rng.randrange(1, 4))
            case 2:
                world.edge(Kind.FOLLOWS, me, person)
            case 3:
                world.edge(Kind.FOLLOWS, me, person, gone=True)
            case 4 if world.photos[person]:
                world.remove(person, rng.choice(sorted(world.photos[person])))
            case 5:
                kind_gone = rng.random() < 0.5
                world.edge(Kind.BLOCKS, *rng.choice([(person, me), (me, person)]), gone=kind_gone)
        if rng.random() < 0.6:
            world.deliver()
            pushed += 1
            assert await reader.all(me, rng.choice([3, 7, 50])) == await plain.all(me)
        if rng.random() < 0.3:
            await reader.settled()
    assert pushed > 6
    assert reader.builder is not None


@pytest.mark.anyio
async def test_more_than_a_timeline_has_is_read_from_databases(
    world: World, reader: Reader
) -> None:
    me, author = world.person(), world.person()
    world.edge(Kind.FOLLOWS, me, author)
    world.post(author, MOST - 10)
    world.deliver()
    await reader.page(me)
    await reader.settled()
    world.post(author, 60)
    world.deliver()
    found = await reader.all(me, 100)
    assert found == sorted(world.photos[author], reverse=True)


@pytest.mark.anyio
async def test_whoever_has_many_followers_is_pulled_and_has_few_again(
    world: World, reader: Reader
) -> None:
    star, fans = world.person(), [world.person() for _ in range(4)]
    modes, timelines = Modes(fewest=3, most=3), Timelines(world.cluster.services["redis"])

    def post(n: int) -> None:
        """Post and fan out by these modes; the service's own relay may have pushed before."""
        added = world.post(star, n)
        world.deliver()
        told = [{"id": str(photo), "owner_id": str(star)} for photo in added]
        events = [Event(n, PHOTO_ADDED, None, each, NOW, 0, 0) for n, each in enumerate(told)]
        fanout.deliver(world.cluster, timelines, modes, events)

    for fan in fans:
        await reader.page(fan)
        world.edge(Kind.FOLLOWS, fan, star)
    await reader.settled()
    world.deliver()

    def pulled() -> set[int]:
        statement = select(Assoc.id2).where(Assoc.id1 == ROOT, Assoc.atype == int(Kind.PULLED))
        with world.cluster.writer() as session:
            return set(session.scalars(statement)) & {star}

    post(3)
    assert pulled() == {star}
    for fan in fans:
        assert await reader.all(fan) == sorted(world.photos[star], reverse=True)
    for fan in fans[1:]:
        world.edge(Kind.FOLLOWS, fan, star, gone=True)
    world.deliver()
    post(1)
    assert pulled() == set()
    assert await reader.all(fans[0]) == sorted(world.photos[star], reverse=True)
    assert await reader.all(fans[1]) == []
    timelines.close()


def test_the_threshold_is_what_a_delivery_costs() -> None:
    modes = Modes()
    assert 99_000 < modes.threshold <= 100_000
    for _ in range(200):
        modes.measured(10_000, 10_000 * 2e-6)
    assert 240_000 < modes.threshold <= 250_000
    assert [modes.decide(n, pulled=True) for n in (130_000, 120_000)] == [True, False]
    assert [modes.decide(n, pulled=False) for n in (240_000, 260_000)] == [False, True]


def test_cursors_are_ours_and_for_one_person_and_a_day() -> None:
    cursors, now = Cursors(["a key of sixteen bytes"]), 1_800_000_000.0
    place = Place(12345, True, (3, 2, 4 * ids.MAX_ID + 2), 2, 7)
    text = cursors.text(place, viewer_id=9, now=now)
    other = Cursors(["another key, newer", "a key of sixteen bytes"])
    assert other.place(text, viewer_id=9, now=now + LIFE - 1) == place
    refused = [
        (cursors, text, 8, now),
        (cursors, text, 9, now + LIFE + 1),
        (Cursors(), text, 9, now),
        *((cursors, text[:n] + ("A" if text[n] != "A" else "B") + text[n + 1 :], 9, now)
          for n in range(0, len(text) - 1, 7)),
        *((cursors, junk, 9, now) for junk in ("", "x", "=", "\u00e9", "A" * 2000, text + "AAAA")),
    ]  # fmt: skip
    for who, given, viewer_id, at in refused:
        with pytest.raises(InvalidInputError):
            who.place(given, viewer_id=viewer_id, now=at)


@pytest.mark.anyio
async def test_without_redis_the_feed_is_whole(world: World, reader: Reader) -> None:
    me = world.person()
    world.post(me, 3)
    silent = Reader(reader.cluster, timelines=AsyncTimelines("redis://127.0.0.1:1/0"))
    viewer = Viewer(me, "me", "me", "", 1)
    page = await silent.feed.home(viewer, None, 2)
    assert page.partial is False
    place = silent.feed.place(viewer, str(page.next_cursor))
    rest = await silent.feed.home(viewer, place, 2)
    assert [item.id for item in [*page.items, *rest.items]] == sorted(
        world.photos[me], reverse=True
    )
    assert rest.next_cursor is None


@pytest.mark.anyio
async def test_a_ranked_feed_shows_all_once_whatever_happens_between_pages(
    world: World, reader: Reader
) -> None:
    rng = random.Random(4)
    me, *friends = [world.person() for _ in range(4)]
    star, stranger = world.person(), world.person()
    for friend in friends:
        world.edge(Kind.FOLLOWS, me, friend)
        world.post(friend, 60)
    paid = world.post(star)[0]
    suggested = set(world.post(stranger, 3))
    add(world.cluster, paid, bid=9.0, days=1e5, now=NOW - dt.timedelta(days=1))
    world.deliver()
    await reader.page(me)
    await reader.settled()
    viewer = Viewer(me, "me", "me", "", 1)
    seen: list[int] = []
    reasons: dict[int, str] = {}
    place = None
    was_there, gone = {p for f in friends for p in world.photos[f]}, set[int]()
    for _ in range(60):
        page = await reader.feed.home(viewer, place, 15, is_ranked=True)
        seen += [item.id for item in page.items]
        reasons |= {item.id: item.reason for item in page.items}
        if page.next_cursor is None:
            break
        place = reader.feed.place(viewer, str(page.next_cursor))
        if len(seen) > 40:  # likes and posts change what a new ranking would say
            late = world.post(rng.choice(friends), 1)
            lost = rng.choice(sorted(was_there - gone - set(seen)) or late)
            owner = next(f for f in friends if lost in world.photos[f])
            world.remove(owner, lost)
            gone.add(lost)
    else:
        raise AssertionError("it does not end")
    assert len(seen) == len(set(seen)), "nothing twice"
    assert was_there - gone <= set(seen), "nothing left out"
    assert seen[:100] != sorted(seen[:100], reverse=True), "ranked"
    assert reasons[paid] == "sponsored"
    assert seen.index(paid) == 3
    assert suggested & {id_ for id_, reason in reasons.items() if reason == "suggested"}
    assert not {id_ for id_ in seen if reasons[id_] == "following"} & suggested
