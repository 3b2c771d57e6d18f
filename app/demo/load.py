"""Loads the demo into a cluster, skipping what is there already.

Called by `python -m app.demo` and by tests. Rows are grouped so that a transaction stays on one
logical shard: the photos and their likes and comments by owner, the follows by follower; the relay
writes their other side. What happened in the demo is past: nobody is notified but the account to
try. Interrupting it at any point is safe: a rerun adds what is missing.
"""

from __future__ import annotations

import asyncio
import bisect
import datetime as dt
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from sqlalchemy import select

from app.accounts.models import User
from app.accounts.repository import AccountRepository
from app.accounts.service import AccountService
from app.clock import Clock
from app.database import Database
from app.demo.plan import DEMO_PERSON, DemoPlan
from app.demo.scenes import draw
from app.graph import tao
from app.graph.models import Assoc, Kind
from app.photos.images import SIZES
from app.photos.likes import Reaction, react
from app.photos.models import Comment, Like, Photo
from app.photos.store import NAME_DIGITS, BlobStore
from app.tags.parser import tags
from app.tags.repository import add_tags
from shardkit import WriteSession

__all__ = ["DemoCounts", "DemoLoader", "Progress"]

SMALLEST = f"{SIZES[-1]}.jpg"
PARALLEL = 4
"""Transactions at the same time; a pool keeps five connections per server."""

Progress = Callable[[str, int, int], None]
"""Called with the step, how many are done, and of how many."""


@dataclass(slots=True)
class DemoCounts:
    """What a load added; all zero when everything was there."""

    people: int = 0
    photos: int = 0
    pictures: int = 0
    follows: int = 0
    likes: int = 0
    comments: int = 0


class DemoLoader:
    """One load of one plan.

    Args:
        plan: what there shall be.
        database: where the rows go.
        accounts: creates people, with their names.
        blobs: where the pictures go.
        clock: the time.
        workers: processes that draw.
        progress: told about every step.
    """

    def __init__(
        self,
        plan: DemoPlan,
        *,
        database: Database,
        accounts: AccountService,
        blobs: BlobStore,
        clock: Clock,
        workers: Executor,
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._database = database
        self._accounts = accounts
        self._blobs = blobs
        self._now = clock()
        self._workers = workers
        self._progress = progress
        self._added = DemoCounts()
        self._user_ids: list[int] = []
        self._photo_ids: list[int] = []
        self._times: list[tuple[int, dt.datetime]] = []

    async def run(self, password_hash: str) -> DemoCounts:
        """Load everything that is missing and return how much that was.

        Args:
            password_hash: of every account of the demo.
        """
        await self._people(password_hash)
        await asyncio.gather(self._photos(), self._follows())
        await self._reactions()
        return self._added

    async def _people(self, password_hash: str) -> None:
        found: dict[int, int] = {}

        async def one(number: int) -> None:
            person = self._plan.people[number]
            async with self._database.primary() as session:
                user = await AccountRepository(session).user_by_name(person.username)
            if user is None:
                user = await self._accounts.create(
                    person.username, person.display_name, password_hash, person.bio
                )
                self._added.people += 1
            found[number] = user.id

        await self._each("people", range(len(self._plan.people)), one)
        self._user_ids = [found[number] for number in range(len(found))]

    async def _photos(self) -> None:
        there = await self._existing_photos()
        loop = asyncio.get_running_loop()
        gate = asyncio.Semaphore(PARALLEL)

        async def picture(number: int) -> tuple[str, int, int] | None:
            """Draw and store a picture, unless it is there."""
            planned = self._plan.photos[number]
            async with gate:
                if planned.name in there:
                    key, _ = there[planned.name]
                    if await self._blobs.get(key, SMALLEST) is not None:
                        return None
                variants, width, height = await loop.run_in_executor(
                    self._workers, draw, planned.seed
                )
                self._added.pictures += 1
                return await self._blobs.put(planned.name, variants), width, height

        total = len(self._plan.photos)
        async with asyncio.TaskGroup() as group:
            drawn = [group.create_task(picture(number)) for number in range(total)]
            for number, task in enumerate(drawn):
                made = await task
                _, photo_id = there.get(self._plan.photos[number].name, ("", None))
                # One after the other: ids are given in this order, and feeds sort by them.
                if made is not None and photo_id is None:
                    photo_id = await self._photo(number, *made)
                elif made is not None and photo_id is not None:
                    await self._show(photo_id, made[0])
                self._photo_ids.append(photo_id or 0)
                self._progress("photos", number + 1, total)

    async def _existing_photos(self) -> dict[str, tuple[str, int]]:
        """Return blob keys and ids of photos by the name that their key ends with."""
        statement = select(Photo.blob_key, Photo.id).where(Photo.owner_id.in_(self._user_ids))
        async with self._database.primary() as session:
            rows = await session.execute(statement)
            return {row.blob_key[-NAME_DIGITS:]: (row.blob_key, row.id) for row in rows}

    async def _show(self, photo_id: int, key: str) -> None:
        """Have a photo show a picture that was lost and drawn again."""
        async with self._database.writer() as session:
            photo = await session.get_one(Photo, photo_id, with_for_update=True)
            photo.blob_key = key
            photo.has_webp = False
            await session.commit()

    async def _photo(self, number: int, key: str, width: int, height: int) -> int:
        planned = self._plan.photos[number]
        photo = Photo(
            owner_id=self._user_ids[planned.owner],
            caption=planned.caption,
            width=width,
            height=height,
            blob_key=key,
            like_count=0,
            comment_count=0,
            created_at=self._now - planned.age,
        )
        async with self._database.writer() as session:
            owner = await session.get_one(User, photo.owner_id, with_for_update=True)
            owner.photo_count += 1
            session.add(photo)
            await session.flush()
            self._settle(photo)
            await add_tags(session, photo.id, photo.id, tags(photo.caption))
            await session.commit()
        self._added.photos += 1
        return photo.id

    def _settle(self, photo: Photo) -> None:
        """Keep times in the order of ids, which shards mint up to 200 ms out of order."""
        at = bisect.bisect(self._times, (photo.id,))
        if at < len(self._times):
            after = self._times[at][1]
            before = self._times[at - 1][1] if at else after - dt.timedelta(minutes=1)
            photo.created_at = before + (after - before) / 2
        self._times.insert(at, (photo.id, photo.created_at))

    async def _follows(self) -> None:
        async def forward(number: int) -> None:
            me, others = self._user_ids[number], self._ids(self._plan.follows[number])
            async with self._database.writer() as session:
                demo = self._user_ids[DEMO_PERSON]
                added = await tao.on(session, _add_follows, me, others, self._now, demo)
                if added:
                    await session.commit()
                    self._added.follows += added

        await self._each("follows", self._plan.follows, forward)

    async def _reactions(self) -> None:
        by_owner: dict[int, list[int]] = {}
        for number, planned in enumerate(self._plan.photos):
            by_owner.setdefault(planned.owner, []).append(number)

        async def one(owner: int) -> None:
            await self._reactions_to(by_owner[owner])

        await self._each("likes and comments", by_owner, one)

    async def _reactions_to(self, numbers: Sequence[int]) -> None:
        """Add likes and comments to the photos of one owner: one logical shard."""
        ids = [self._photo_ids[number] for number in numbers]
        async with self._database.writer() as session:
            likes = set(
                await session.execute(
                    select(Like.photo_id, Like.user_id).where(Like.photo_id.in_(ids))
                )
            )
            comments = set(
                await session.execute(
                    select(Comment.photo_id, Comment.author_id, Comment.body).where(
                        Comment.photo_id.in_(ids)
                    )
                )
            )
            n_added = 0
            for number, photo_id in zip(numbers, ids, strict=True):
                time = self._now - self._plan.photos[number].age * 0.9
                fans = self._ids(self._plan.likes[number])
                new_likes = [
                    Reaction(user, likes=True)
                    for user in sorted(fans)
                    if (photo_id, user) not in likes
                ]
                new_comments = self._new_comments(number, photo_id, time, comments)
                if not new_likes and not new_comments:
                    continue
                is_news = self._plan.photos[number].owner == DEMO_PERSON
                await tao.on(session, react, photo_id, new_likes, time, is_news=is_news)
                session.add_all(new_comments)
                photo = await session.get_one(Photo, photo_id, with_for_update={"key_share": True})
                photo.comment_count += len(new_comments)
                self._added.likes += len(new_likes)
                self._added.comments += len(new_comments)
                n_added += 1
            if n_added:
                await session.commit()

    def _new_comments(
        self, number: int, photo_id: int, time: dt.datetime, there: Iterable[object]
    ) -> list[Comment]:
        known = set(there)
        return [
            Comment(
                photo_id=photo_id,
                author_id=self._user_ids[planned.author],
                body=planned.body,
                created_at=time,
            )
            for planned in self._plan.comments[number]
            if (photo_id, self._user_ids[planned.author], planned.body) not in known
        ]

    def _ids(self, people: Iterable[int]) -> set[int]:
        return {self._user_ids[person] for person in people}

    async def _each(
        self, step: str, items: Iterable[int], work: Callable[[int], Awaitable[None]]
    ) -> None:
        """Work on items, a few at the same time, and tell how far it is."""
        todo = list(items)
        gate = asyncio.Semaphore(PARALLEL)
        done = 0

        async def one(item: int) -> None:
            nonlocal done
            async with gate:
                await work(item)
            done += 1
            self._progress(step, done, len(todo))

        async with asyncio.TaskGroup() as group:
            for item in todo:
                group.create_task(one(item))


def _add_follows(
    session: WriteSession, me: int, others: set[int], now: dt.datetime, notified: int
) -> int:
    """Add follows that lack; return how many."""
    user = tao.locked(session, me)
    keys = [(me, int(Kind.FOLLOWS), other) for other in sorted(others)]
    at = tao.next_time(session, me, Kind.FOLLOWS, int(now.timestamp() * 1000))
    missing = [
        key[2]
        for key, edge in zip(keys, session.get_many(Assoc, keys), strict=True)
        if edge is None
    ]
    for other in missing:
        tao.assoc_new(session, user, Kind.FOLLOWS, other, at, is_news=other == notified)
    return len(missing)
