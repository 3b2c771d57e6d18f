"""Removes every trace of an account: rows on every shard, cache entries, timelines, pictures.

Handler of the relay, see `app.workers`; the event was committed with the end of the account
(`app.leaving.service`). Work goes in small transactions, each of which leaves every count exact,
and each step looks for what is left; so it may be killed anywhere and done again. Writers of
cached rows keep the cache, as always. What a request that was under way at the end of the account
has still written is found by a second pass, `grace` seconds later; the note of the account goes
last.

Kept are: rows of `shardkit_operations`, answers of requests which only who has the Idempotency-Key
can read (`app.sealing`), for a day; bytes of needles that are deleted, until compaction.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from sqlalchemy import delete, select

from app import happenings
from app.accounts.models import User
from app.clock import Clock, utc_now
from app.database import TIMEOUT
from app.feed.timelines import Timelines
from app.graph import tao
from app.graph.models import Assoc, Kind
from app.leaving.files import path_of
from app.leaving.models import ACCOUNT_DELETED, Erasure, Export
from app.leaving.traces import Trace, traces
from app.photos.likes import Reaction, react
from app.photos.models import Comment, Like, LikeSlot, Photo
from app.photos.removal import remove_keys
from app.settings import Settings
from app.stories.models import Story, StoryView
from app.tags.models import PhotoTag
from shardkit import Cluster, WriteSession, all_shards, deadline
from shardkit.outbox import Event

__all__ = ["Eraser", "NotYetError"]

BATCH: Final = 200
"""Rows looked for at once."""

BUDGET: Final = 15.0
"""Seconds of work for one event; what is left is announced anew. A relay gives a handler 30."""


class NotYetError(Exception):
    """Requests from before the end of the account may still be writing; look again later."""


class _Over(Exception):  # noqa: N818 - no error: the rest is for the next event
    """The time for one event is over."""


class Eraser:
    """Removes accounts.

    Args:
        cluster: whose.
        timelines: what was pushed to whom; None where there is no Redis.
        settings: where pictures and exports are; without them those are left to the sweeper.
        clock: the time.
        step: called with the name of each step before it; tests die there.
    """

    def __init__(
        self,
        cluster: Cluster,
        timelines: Timelines | None,
        settings: Settings | None,
        *,
        clock: Clock = utc_now,
        step: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self._cluster = cluster
        self._timelines = timelines
        self._settings = settings
        self._clock = clock
        self.step = step
        self._until = 0.0

    def handle(self, event: Event) -> None:
        """Remove what is left of an account.

        Raises:
            NotYetError: a second pass is needed, in a moment (retryable).
            SilentError: Redis does not answer (retryable).
            UnavailableError: a primary does not (retryable).
            GatherError: several do not (retryable).
        """
        user_id = int(event.payload["user_id"])
        own = copy.copy(self)  # a relay has several threads
        own._until = time.monotonic() + BUDGET  # noqa: SLF001 - of this class
        try:
            own._remove(user_id)  # noqa: SLF001
        except _Over:
            with deadline(TIMEOUT), self._cluster.writer() as session:
                payload = {"user_id": str(user_id)}
                session.emit(ACCOUNT_DELETED, payload, key=str(user_id), near=user_id)
                session.commit()
            return
        grace = (self._settings or Settings()).erasure_grace
        if (self._clock() - event.created).total_seconds() < grace:
            raise NotYetError("the second pass is due later")
        self.step("note")
        self._delete_all(delete(Erasure).where(Erasure.user_id == user_id))

    def _remove(self, user_id: int) -> None:
        for work in (
            self._photos,
            self._likes,
            self._comments,
            self._edges,
            self._files,
            self._views,
        ):
            self.step(work.__name__.removeprefix("_"))
            work(user_id)
        for trace in traces():
            self.step(trace.entity.__tablename__)
            if trace.entity not in {User, Erasure}:  # gone already; goes last
                self._rows(trace, user_id)
        if self._timelines is not None:
            self.step("timeline")
            self._timelines.forget(user_id)

    def _check(self) -> None:
        if time.monotonic() > self._until:
            raise _Over

    # -- what is counted elsewhere

    def _photos(self, user_id: int) -> None:
        """Remove photos with what is beside them; events that this commits remove the bytes."""
        statement = select(Photo).where(Photo.owner_id == user_id).order_by(Photo.id).limit(BATCH)
        while photos := self._found(statement):
            if self._timelines is not None:  # while their ids are known
                self._timelines.remove([photo.id for photo in photos])
            for photo in photos:
                self._check()
                self.step("photo")
                with deadline(TIMEOUT), self._cluster.writer() as session:
                    held = session.get(Photo, photo.id, with_for_update=True)
                    if held is None:
                        continue
                    tags = set(
                        session.scalars(select(PhotoTag.tag).where(PhotoTag.photo_id == photo.id))
                    )
                    happenings.tag_changed(session, photo.id, tags, -1)
                    happenings.photo_removed(session, photo.id)
                    for entity in (Like, LikeSlot, Comment, PhotoTag):
                        session.execute(delete(entity).where(entity.photo_id == photo.id))
                    session.delete(held)
                    session.commit()

    def _likes(self, user_id: int) -> None:
        statement = select(Like.photo_id).where(Like.user_id == user_id).limit(BATCH)
        while ids := self._found(statement.options(all_shards())):
            for photo_id in ids:
                self._check()
                self.step("like")
                with deadline(TIMEOUT), self._cluster.writer() as session:
                    if session.get(Photo, photo_id) is None:
                        session.execute(delete(Like).where(Like.photo_id == photo_id))
                    else:
                        react(session, photo_id, [Reaction(user_id, likes=False)], self._clock())
                    session.commit()

    def _comments(self, user_id: int) -> None:
        statement = select(Comment).where(Comment.author_id == user_id).limit(BATCH)
        while comments := self._found(statement.options(all_shards())):
            for comment in comments:
                self._check()
                self.step("comment")
                with deadline(TIMEOUT), self._cluster.writer() as session:
                    photo = session.get(Photo, comment.photo_id, with_for_update=True)
                    if session.get(Comment, comment.id) is not None:
                        self._end_comment(session, photo, comment)
                    session.commit()

    @staticmethod
    def _end_comment(session: WriteSession, photo: Photo | None, comment: Comment) -> None:
        """Remove a comment with the answers to it, as its author would have."""
        answers = (Comment.photo_id == comment.photo_id, Comment.parent_id == comment.id)
        gone = [comment.id, *session.scalars(select(Comment.id).where(*answers))]
        here = (PhotoTag.photo_id == comment.photo_id, PhotoTag.source_id.in_(gone))
        ended = set(session.scalars(select(PhotoTag.tag).where(*here)))
        session.execute(delete(PhotoTag).where(*here))
        left = select(PhotoTag.tag).where(PhotoTag.photo_id == comment.photo_id)
        ended -= set(session.scalars(left))
        happenings.tag_changed(session, comment.photo_id, ended, -1)
        session.execute(
            delete(Comment).where(Comment.photo_id == comment.photo_id, Comment.id.in_(gone))
        )
        if photo is not None:
            photo.comment_count -= len(gone)
        happenings.comments_removed(session, comment.photo_id, gone)

    def _edges(self, user_id: int) -> None:
        """Remove edges of the account, then those of others to it, with their counts."""
        own = select(Assoc).where(Assoc.id1 == user_id).limit(BATCH)
        while self._found(own):
            self._check()
            self.step("edges")
            with deadline(TIMEOUT), self._cluster.writer() as session:
                for edge in session.scalars(own).all():
                    # Behind what was said of the edge before, so the other side ends as this.
                    tao.announce(session, user_id, Kind(edge.atype), edge.id2, None)
                    session.delete(edge)
                session.commit()
        others = select(Assoc.id1, Assoc.atype).where(Assoc.id2 == user_id).limit(BATCH)
        while rows := self._rows_of(others.options(all_shards())):
            for id1, kind in rows:
                self._check()
                self.step("edge")
                with deadline(TIMEOUT), self._cluster.writer() as session:
                    self._end_edge(session, id1, Kind(kind), user_id)
                    session.commit()

    @staticmethod
    def _end_edge(session: WriteSession, id1: int, kind: Kind, user_id: int) -> None:
        user = session.get(User, id1, with_for_update=True)
        if user is not None:
            tao.assoc_delete(session, user, kind, user_id)
        elif (edge := session.get(Assoc, (id1, int(kind), user_id))) is not None:
            session.delete(edge)  # of the service itself, or of who is gone too

    # -- what is not

    def _files(self, user_id: int) -> None:
        if self._settings is not None:
            for export_id in self._found(select(Export.id).where(Export.user_id == user_id)):
                path_of(self._settings.exports_folder, export_id).unlink(missing_ok=True)

    def _views(self, user_id: int) -> None:
        """Remove who has seen the stories; the stories themselves go with the other rows."""
        for story_id in self._found(select(Story.id).where(Story.owner_id == user_id)):
            self._delete_all(delete(StoryView).where(StoryView.story_id == story_id))

    def _rows(self, trace: Trace, user_id: int) -> None:
        """Remove rows of a table that nothing counts, with the pictures they name."""
        columns = [trace.key] if trace.blob is None else [trace.key, trace.blob]
        statement = select(*columns).where(trace.of(user_id)).limit(BATCH).options(all_shards())
        while rows := self._rows_of(statement):
            self._check()
            if trace.blob is not None and self._settings is not None:
                remove_keys(self._settings, [row[1] for row in rows])
            for key in dict.fromkeys(row[0] for row in rows):
                where = (trace.key == key, trace.of(user_id))
                self._delete_all(delete(trace.entity).where(*where))

    def _found(self, statement: Any) -> Sequence[Any]:
        with deadline(TIMEOUT), self._cluster.writer() as session:
            return session.scalars(statement).all()

    def _rows_of(self, statement: Any) -> Sequence[Any]:
        with deadline(TIMEOUT), self._cluster.writer() as session:
            return session.execute(statement).all()

    def _delete_all(self, statement: Any) -> None:
        with deadline(TIMEOUT), self._cluster.writer() as session:
            session.execute(statement)
            session.commit()
