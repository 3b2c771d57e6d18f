"""What follows from what happened: the handlers of the relay, in the order of `app.happenings`."""

from __future__ import annotations

from collections.abc import Sequence

from app import happenings, removal
from app.accounts.models import User
from app.clock import Clock, utc_now
from app.database import TIMEOUT
from app.graph.models import Kind
from app.notifications import inbox, notices
from app.notifications.bus import Message, Publisher
from app.notifications.notices import Notice, NoticeKind, Withdrawal
from app.notifications.service import told
from app.search import indexing
from app.tags import counting
from shardkit import Cluster, Relay, deadline
from shardkit.outbox import Event

__all__ = ["Reactions"]

_OF_EDGES = {Kind.FOLLOWS: NoticeKind.FOLLOW, Kind.REQUESTED: NoticeKind.REQUEST}


class Reactions:
    """The handlers.

    Args:
        cluster: where rows are.
        publisher: tells servers of new notifications.
        clock: the time.
    """

    def __init__(self, cluster: Cluster, publisher: Publisher, clock: Clock = utc_now) -> None:
        self._cluster = cluster
        self._publisher = publisher
        self._clock = clock

    def register(self, relay: Relay) -> None:
        """Make these the handlers of a relay."""
        relay.on(happenings.PHOTO_MENTIONS)(self.photo_mentions)
        relay.on(happenings.PHOTO_REMOVED)(self.photo_removed)
        relay.on(happenings.LIKE_CHANGED)(self.like_changed)
        relay.on(happenings.COMMENT_ADDED)(self.comment_added)
        relay.on(happenings.COMMENTS_REMOVED)(self.comments_removed)
        relay.on(happenings.TAG_CHANGED)(self.tag_changed)
        relay.on(happenings.PERSON_CHANGED)(self.person_changed)
        relay.on(happenings.PERSON_REMOVED)(self.person_removed)

    def photo_mentions(self, event: Event) -> None:
        """Tell who is mentioned in a caption."""
        people = inbox.names_to_ids(self._cluster, event.payload["mentions"])
        self._tell(notices.of_photo(event.payload, event.created, people))

    def photo_removed(self, event: Event) -> None:
        """Remove what is kept of a photo elsewhere."""
        removal.forget_photo(self._cluster, int(event.payload["photo_id"]))

    def like_changed(self, event: Event) -> None:
        """Tell the owner of a photo, or no longer."""
        if (notice := notices.of_like(event.payload, event.created)) is not None:
            self._tell([notice])

    def comment_added(self, event: Event) -> None:
        """Tell the owner, who is answered and who is mentioned."""
        people = inbox.names_to_ids(self._cluster, event.payload["mentions"])
        self._tell(notices.of_comment(event.payload, event.created, people))

    def comments_removed(self, event: Event) -> None:
        """Remove what people were told of comments."""
        ids = [int(each) for each in event.payload["ids"]]
        removal.forget_comments(self._cluster, int(event.payload["photo_id"]), ids)

    def tag_changed(self, event: Event) -> None:
        """Count the photos of a tag."""
        counting.count(self._cluster, event)

    def person_changed(self, event: Event) -> None:
        """Have a person found by what they are called now."""
        indexing.index_person(self._cluster, int(event.payload["user_id"]))

    def person_removed(self, event: Event) -> None:
        """Remove what is kept of a person elsewhere."""
        user_id = int(event.payload["user_id"])
        indexing.index_person(self._cluster, user_id)
        removal.forget_person(self._cluster, user_id, self._clock())

    def edges_changed(self, events: Sequence[Event]) -> None:
        """Tell who is followed, or asked; called with the events of the graph."""
        for event in events:
            kind = _OF_EDGES.get(Kind(event.payload["kind"]))
            if kind is None or not event.payload.get("is_news", True):
                continue
            actor_id, user_id = int(event.payload["id1"]), int(event.payload["id2"])
            present = event.payload["at"] is not None
            self._tell([notices.of_edge(kind, actor_id, user_id, event.created, present=present)])

    def _tell(self, found: Sequence[Notice | Withdrawal]) -> None:
        for each in found:
            if isinstance(each, Withdrawal):
                inbox.withdraw(self._cluster, each)
                continue
            row = inbox.put(self._cluster, each)
            if row is None:
                continue
            with deadline(TIMEOUT), self._cluster.reader() as session:
                actor = session.get(User, row.actor_id)
            if actor is not None:
                text = told(row, actor).model_dump_json()
                self._publisher.publish(Message(row.user_id, row.seq, text))
