"""Likes, also of a photo that everybody likes at once: written together, counted in slots, exact.

A like is a row; the count of a photo is the sum of its slots. A slot changes in the transaction
that adds or removes the rows it counts, by as many as really came or went; each server process has
a slot of its own, so processes do not wait for each other. Within a process, likes of one photo
that arrive while others are being committed are committed together, next: one INSERT, one change of
a slot, one COMMIT for all of them, and nobody is answered before. The relay folds: it writes the
sum into the photo's row, where it is shown when the slots cannot be read.

Who likes takes FOR KEY SHARE of the photo, which keeps it from being deleted and lets others like
it; folding and repair take locks that are stronger, so they see whole transactions.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert

from app import happenings
from app.clock import Clock
from app.errors import BusyError, NotFoundError
from app.graph import tao
from app.graph.privacy import hidden_from
from app.partial import FAILED, PATIENCE, is_partial
from app.photos.models import LIKES_CHANGED, Like, LikeSlot, Photo, slots_of
from app.scan import pages
from shardkit import (
    AsyncCluster,
    AsyncReadSession,
    AsyncWriteSession,
    Cluster,
    WriteSession,
    deadline,
)
from shardkit.errors import OutcomeUnknownError
from shardkit.outbox import Event

__all__ = ["SLOTS_WRONG", "Likes", "Reaction", "fold", "likes_among", "mend", "react"]

N_SLOTS: Final = 16
"""More processes than that share some: a count stays the sum of a few rows."""

SLOT: Final = secrets.randbelow(N_SLOTS)

MOST_TOGETHER: Final = 1000
"""Likes of one transaction; the rest waits for the next."""

MOST_WAITING: Final = 20_000
"""Likes of one photo that wait in one process; others are told to come back."""

AT_ONCE: Final = 4
"""Photos whose likes are written at the same time."""

MOST_TOLD: Final = 1000
"""Likes of a photo of which its owner is told one by one; nobody reads more."""

SLOTS_WRONG: Final = "photos.like_slots"
"""What is found, by name: photos whose slots do not add up to their likes."""


class Reaction(NamedTuple):
    """What one person does.

    Attributes:
        user_id: who.
        likes: True for a like, False for taking it back.
    """

    user_id: int
    likes: bool


def react(
    session: WriteSession,
    photo_id: int,
    reactions: Sequence[Reaction],
    now: dt.datetime,
    *,
    is_news: bool = True,
) -> tuple[int, set[int]]:
    """Add and remove likes of one photo, in this transaction; the last one of a person counts.

    Args:
        session: the transaction.
        photo_id: of what.
        reactions: in order.
        now: time of the likes.
        is_news: whether the owner is notified.

    Returns:
        How many like it now, and who may not, of whom nothing was written.

    Raises:
        NotFoundError: there is no such photo.
    """
    lock = {"read": True, "key_share": True}
    photo = session.get(Photo, photo_id, with_for_update=lock)
    if photo is None:
        raise NotFoundError("There is no such photo.")
    wanted = {each.user_id: each.likes for each in reactions}
    liking = sorted(user_id for user_id, likes in wanted.items() if likes)
    refused = hidden_from(session, photo.owner_id, liking)
    rows = [
        {"photo_id": photo_id, "user_id": user_id, "created_at": now}
        for user_id in liking
        if user_id not in refused
    ]
    change = 0
    added: Sequence[int] = ()
    removed: Sequence[int] = ()
    if rows:
        adding = insert(Like).on_conflict_do_nothing().returning(Like.user_id)
        added = session.scalars(adding, rows).all()
        change += len(added)
    if leaving := sorted(user_id for user_id, likes in wanted.items() if not likes):
        removing = delete(Like).where(Like.photo_id == photo_id, Like.user_id.in_(leaving))
        removed = session.scalars(removing.returning(Like.user_id)).all()
        change -= len(removed)
    if change:
        slot = insert(LikeSlot).values(photo_id=photo_id, slot=SLOT, n=change)
        key = [LikeSlot.photo_id, LikeSlot.slot]
        session.execute(
            slot.on_conflict_do_update(index_elements=key, set_={"n": LikeSlot.n + slot.excluded.n})
        )
        session.emit(LIKES_CHANGED, {"photo_id": str(photo_id)}, near=photo_id)
    total = _total(session, photo_id)
    if total > MOST_TOLD or not is_news:
        added = ()
    for some, liked in ((added, True), (removed, False)):
        for user_id in some:
            happenings.like_changed(session, photo_id, photo.owner_id, user_id, liked=liked)
    return total, refused


def _total(session: Any, photo_id: int) -> int:
    total = select(func.coalesce(func.sum(LikeSlot.n), 0)).where(LikeSlot.photo_id == photo_id)
    return int(session.scalars(total).one())


async def likes_among(session: AsyncReadSession, photos: Iterable[Photo]) -> Mapping[int, int]:
    """Return how many like photos, by id; as their rows have it where servers do not answer."""
    kept = {photo.id: photo.like_count for photo in photos}
    if not kept or is_partial(session):
        return kept
    try:
        with deadline(PATIENCE):
            slots = await session.cached_many(slots_of, kept)
    except FAILED:
        return kept
    return {photo_id: sum(numbers) for photo_id, numbers in slots.items()}


# -- together


@dataclass(slots=True)
class _Waiting:
    """Likes of one photo that have not been written yet."""

    reactions: list[tuple[Reaction, asyncio.Future[tuple[int, str]]]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class Likes:
    """Writes the likes that arrive at one server process, those of one photo together.

    Args:
        cluster: where photos are.
        clock: the time.
        timeout: seconds that one transaction may take, with all its attempts.
    """

    def __init__(self, cluster: AsyncCluster, clock: Clock, *, timeout: float) -> None:
        self._cluster = cluster
        self._clock = clock
        self._timeout = timeout
        self._waiting: defaultdict[int, _Waiting] = defaultdict(_Waiting)
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def react(self, photo_id: int, reaction: Reaction) -> tuple[int, str]:
        """Write a like, or take one back; return how many there are, and what was then written.

        Raises:
            NotFoundError: there is no such photo, or the person may not know of it.
            BusyError: too many wait already.
        """
        waiting = self._waiting[photo_id]
        if len(waiting.reactions) >= MOST_WAITING:
            raise BusyError
        done: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        waiting.reactions.append((reaction, done))
        if waiting.task is None:
            waiting.task = asyncio.create_task(self._write_all(photo_id, waiting))
        return await done

    async def close(self) -> None:
        """Finish what waits."""
        tasks = [each.task for each in self._waiting.values() if each.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _write_all(self, photo_id: int, waiting: _Waiting) -> None:
        while waiting.reactions:
            async with self._gate:
                some = waiting.reactions[:MOST_TOGETHER]
                del waiting.reactions[:MOST_TOGETHER]
                await self._write(photo_id, some)
        waiting.task = None
        if self._waiting.get(photo_id) is waiting:
            del self._waiting[photo_id]

    async def _write(
        self, photo_id: int, some: Sequence[tuple[Reaction, asyncio.Future[tuple[int, str]]]]
    ) -> None:
        """Write some reactions in one transaction, and answer all who wait for them."""
        reactions = [reaction for reaction, _ in some]
        try:
            total, refused, token = await self._committed(photo_id, reactions)
        except Exception as error:  # noqa: BLE001 - each who waits is told
            for _, done in some:
                if not done.done():
                    done.set_exception(error)
            return
        for reaction, done in some:
            if done.done():  # nobody waits for it any more
                continue
            if reaction.likes and reaction.user_id in refused:
                done.set_exception(NotFoundError("There is no such photo."))
            else:
                done.set_result((total, token))

    async def _committed(
        self, photo_id: int, reactions: Sequence[Reaction]
    ) -> tuple[int, set[int], str]:
        sessions: list[AsyncWriteSession] = []

        async def unit(session: AsyncWriteSession) -> tuple[int, set[int]]:
            sessions.append(session)
            return await tao.on(session, react, photo_id, reactions, self._clock())

        with deadline(self._timeout):
            try:
                total, refused = await self._cluster.run(unit)
            except OutcomeUnknownError:  # what was written is found, and counted once
                total, refused = await self._cluster.run(unit)
        return total, refused, sessions[-1].token


# -- folding and repair


def fold(cluster: Cluster, events: Sequence[Event]) -> None:
    """Write the sums of slots into photos' rows: the relay's handler of `likes.changed`.

    Raises:
        UnavailableError: a primary does not answer (retryable).
    """
    for photo_id in sorted({int(event.payload["photo_id"]) for event in events}):
        with cluster.writer() as session:
            photo = session.get(Photo, photo_id, with_for_update={"key_share": True})
            if photo is not None:
                photo.like_count = _total(session, photo_id)
                session.commit()


def mend(cluster: Cluster, shard: int, *, n: int, dry_run: bool) -> Counter[str]:
    """Make the slots of a logical shard's photos add up; return how many did not.

    Raises:
        EndpointUnavailableError: the primary does not answer (retryable).
    """
    slots = select(func.coalesce(func.sum(LikeSlot.n), 0)).where(LikeSlot.photo_id == Photo.id)
    rows = select(func.count()).select_from(Like).where(Like.photo_id == Photo.id)
    counted = (slots.scalar_subquery(), rows.scalar_subquery())
    wrong: Counter[str] = Counter()
    statement: Any = select(Photo.id, *counted)
    for page in pages(cluster, shard, statement, [Photo.id], n):
        for photo_id, in_slots, in_rows in page:
            if in_slots != in_rows:
                wrong[SLOTS_WRONG] += _mend_photo(cluster, photo_id, dry_run=dry_run)
    return wrong


def _mend_photo(cluster: Cluster, photo_id: int, *, dry_run: bool) -> bool:
    """Count again under a lock that nobody who likes passes."""
    with cluster.writer() as session:
        if session.get(Photo, photo_id, with_for_update=True) is None:
            return False
        rows = select(func.count()).select_from(Like).where(Like.photo_id == photo_id)
        true = int(session.scalars(rows).one())
        if _total(session, photo_id) == true:
            return False
        if not dry_run:
            session.execute(delete(LikeSlot).where(LikeSlot.photo_id == photo_id))
            session.add(LikeSlot(photo_id=photo_id, slot=0, n=true))
            session.commit()
        return True
