"""Feeds are paged to their end while people post, delete, block and follow: `make feed-paging`.

Ten million items, or a tenth of a percent of that with --quick. Each walk is judged by what was
certain: what had been delivered before it began and was there until it ended is in it, once;
nothing whose deletion had been acknowledged before a page began is on that page; nobody is on it
who had been blocked before it began. Timelines are shorter than the feeds, so every walk ends in
databases.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete

from app.clock import utc_now
from app.database import Database
from app.feed.building import Builder
from app.feed.cursors import Cursors
from app.feed.ranked import RankedFeed
from app.feed.service import FeedService
from app.feed.timelines import AsyncTimelines
from app.graph import tao
from app.graph.models import Kind
from app.partial import FAILED, is_partial
from app.photos.models import Photo
from app.workers import relay_of
from benchmarks.measure import report
from benchmarks.socialworld import World, patient, world
from shardkit import AsyncCluster, Cluster, ids

TARGETS = {"duplicates": "≤ 0", "gaps": "≤ 0", "blocked": "≤ 0", "deleted": "≤ 0"}
ITEMS = 10_000_000
N_READERS, N_AUTHORS, PHOTOS, MANY_PHOTOS = 4, 30, 40, 200
PAGE, LARGE_PAGE = 100, 1000
"""One reader turns small pages; for ten million items the others turn large ones of longer feeds,
which takes a quarter of the CPU an item."""
EVERY = 10.0
"""Seconds between two lines of progress."""

FOREVER = float("inf")


@dataclass
class Known:
    """What is certain of the world, by the clock of this process.

    Attributes:
        delivered: by photo, its owner and when every push of it had ended.
        deleted: by photo, when its deletion began and ended.
        apart: by reader and author, spans in which they may not see each other: when the block
            began, had ended, was about to be lifted, and when the author was followed again.
    """

    delivered: dict[int, tuple[int, float]] = field(default_factory=dict)
    deleted: dict[int, list[float]] = field(default_factory=dict)
    apart: dict[tuple[int, int], list[list[float]]] = field(default_factory=dict)


@dataclass
class Verdict:
    """What was found in all walks."""

    items: int = 0
    walks: int = 0
    duplicates: int = 0
    gaps: int = 0
    blocked: int = 0
    deleted: int = 0


class Writer(threading.Thread):
    """Changes the world until it is told to stop; one change after the other, each noted."""

    def __init__(self, here: World, known: Known, readers: list[int], authors: list[int]) -> None:
        super().__init__(name="writer", daemon=True)
        self._cluster = patient(Cluster(here.topology, cache=here.cache))
        self._cluster.services["redis"] = here.redis
        self._relay = relay_of(self._cluster)
        self._known, self._readers, self._authors = known, readers, authors
        self._rng = random.Random(3)
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.changes = 0

    def run(self) -> None:
        """Change things."""
        try:
            while not self.ended.is_set():
                kind = self._rng.randrange(10)
                if kind < 5:
                    self._post()
                elif kind < 8:
                    self._remove()
                else:
                    self._block()
                self.changes += 1
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self.error = error
        finally:
            self._cluster.close()

    def _post(self) -> None:
        owner = self._rng.choice(self._authors)
        with self._cluster.writer() as session:
            photo = Photo(
                owner_id=owner, caption="", width=1, height=1, blob_key="x", created_at=utc_now()
            )
            session.add(photo)
            session.commit()
            photo_id = int(photo.id)
        self._relay.drain()
        self._known.delivered[photo_id] = (owner, time.monotonic())

    def _remove(self) -> None:
        photo_id = self._rng.choice(list(self._known.delivered))
        if photo_id in self._known.deleted:
            return
        owner, _ = self._known.delivered[photo_id]
        times = self._known.deleted[photo_id] = [time.monotonic(), FOREVER]
        with self._cluster.writer() as session:
            session.execute(delete(Photo).where(Photo.owner_id == owner, Photo.id == photo_id))
            session.commit()
        times[1] = time.monotonic()

    def _block(self) -> None:
        """Block an author, or be blocked, for a while; then all is as before."""
        reader, author = self._rng.choice(self._readers), self._rng.choice(self._authors)
        pair = (reader, author) if self._rng.random() < 0.5 else (author, reader)
        times = [time.monotonic(), FOREVER, FOREVER, FOREVER]
        self._known.apart.setdefault((reader, author), []).append(times)
        self._edge(Kind.BLOCKS, *pair)
        times[1] = time.monotonic()
        self._relay.drain()
        self._post()
        times[2] = time.monotonic()
        self._edge(Kind.BLOCKS, *pair, gone=True)
        self._relay.drain()
        self._edge(Kind.FOLLOWS, reader, author)
        self._relay.drain()
        times[3] = time.monotonic()

    def _edge(self, kind: Kind, id1: int, id2: int, *, gone: bool = False) -> None:
        with self._cluster.writer() as session:
            user = tao.locked(session, id1)
            if gone:
                tao.assoc_delete(session, user, kind, id2)
            else:
                if kind is Kind.BLOCKS:  # as the service does
                    tao.assoc_delete(session, user, Kind.FOLLOWS, id2)
                at = tao.next_time(session, id1, kind, int(time.time() * 1000))
                tao.assoc_add(session, user, kind, id2, at)
            session.commit()


def main(*, as_json: bool, quick: bool = False) -> None:
    verdict, changes = paged(ITEMS // 1000) if quick else paged(ITEMS, is_large=True)
    figures = {name: float(value) for name, value in vars(verdict).items()}
    figures["changes"] = float(changes)
    report("feedpaging", figures, peers=(), medians={}, targets=TARGETS, as_json=as_json)


def paged(n_items: int, *, is_large: bool = False) -> tuple[Verdict, int]:
    """Page feeds until so many items were seen; return what was found, and how much was changed."""
    with world(replicas=0) as here:
        readers, authors = here.people(N_READERS), here.people(N_AUTHORS)
        here.edges((reader, author) for reader in readers for author in authors)
        known = Known()
        for owner, photos in here.photos(authors, MANY_PHOTOS if is_large else PHOTOS).items():
            known.delivered |= dict.fromkeys(photos, (owner, 0.0))
        writer = Writer(here, known, readers, authors)
        writer.start()
        try:
            verdict = asyncio.run(walked(here, known, readers, n_items, writer, is_large=is_large))
        finally:
            writer.ended.set()
            writer.join()
        if writer.error is not None:
            raise writer.error
        return verdict, writer.changes


async def walked(
    here: World, known: Known, readers: list[int], n_items: int, writer: Writer, *, is_large: bool
) -> Verdict:
    verdict = Verdict()
    async with AsyncCluster(here.topology, cache=here.cache) as cluster:
        patient(cluster)
        timelines = AsyncTimelines(here.redis, patience=5.0)
        builder = Builder(cluster, timelines, 5000)
        feed = FeedService(
            Database(cluster, timeout=60.0),
            utc_now,
            Cursors(),
            RankedFeed(cluster, utc_now),
            max_followees=5000,
            timelines=(timelines, builder),
        )

        told = time.monotonic()

        async def read(reader: int) -> None:
            nonlocal told
            size = LARGE_PAGE if is_large and reader != readers[0] else PAGE
            while verdict.items < n_items and writer.error is None:
                judge(verdict, known, reader, await walk(cluster, feed, reader, size))
                if is_large and time.monotonic() - told > EVERY:
                    told = time.monotonic()
                    print(f"{verdict.items:,} of {n_items:,} items", file=sys.stderr, flush=True)

        await asyncio.gather(*map(read, readers))
        await builder.close()
        await timelines.close()
    return verdict


Walked = list[tuple[float, float, list[tuple[int, int]]]]
"""Of each page when it was begun and had, and the ids and owners on it."""


async def walk(cluster: Any, feed: FeedService, reader: int, size: int) -> Walked:
    """Read a feed to its end; return the pages."""
    pages: Walked = []
    before = ids.MAX_ID
    while True:
        at = time.monotonic()
        try:
            async with Database(cluster, timeout=60.0).reader() as session:
                photos, last = await feed.photos(session, reader, before, size)
                shown = [(photo.id, photo.owner_id) for photo in photos]
                if is_partial(session):
                    continue  # it says so; one reads it again
        except FAILED:  # on a machine that is too busy; a client is told to come back
            continue
        pages.append((at, time.monotonic(), shown))
        if last is None:
            return pages
        before = last


def judge(verdict: Verdict, known: Known, reader: int, pages: Walked) -> None:
    """Add what a walk shows to the verdict."""
    began, ended = pages[0][0], pages[-1][1]
    seen: set[int] = set()
    for at, had, shown in pages:
        for photo, owner in shown:
            verdict.duplicates += photo in seen
            seen.add(photo)
            verdict.deleted += known.deleted.get(photo, [FOREVER, FOREVER])[1] <= at
            spans = known.apart.get((reader, owner), ())
            verdict.blocked += any(span[1] <= at and had <= span[2] for span in spans)
    # The writer goes on meanwhile, and a dictionary's copy is taken at one moment.
    torn = {
        author
        for (who, author), spans in known.apart.copy().items()
        if who == reader and any(span[0] <= ended and began <= span[3] for span in spans)
    }
    for photo, (owner, delivered) in known.delivered.copy().items():
        stays = known.deleted.get(photo, [FOREVER])[0] > ended
        verdict.gaps += delivered <= began and stays and owner not in torn and photo not in seen
    verdict.items += len(seen)
    verdict.walks += 1
