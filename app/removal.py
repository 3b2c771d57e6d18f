"""Removes what a photo or a person leaves on other shards. Called by the relay.

What lies beside a photo goes in the transaction that deletes it. What refers to it from elsewhere
is found by an index on every shard: deletions are rare. Done again, it does nothing more.
"""

from __future__ import annotations

import datetime as dt

from sqlalchemy import delete, or_, select, update

from app.database import TIMEOUT
from app.notifications import inbox
from app.notifications.models import Inbox, Notification
from app.saves.models import Save
from app.stories.models import Story, StoryView
from shardkit import Cluster, deadline

__all__ = ["forget_comments", "forget_person", "forget_photo"]


def forget_photo(cluster: Cluster, photo_id: int) -> None:
    """Remove what is kept of a photo elsewhere: who saved it, who was told of it.

    Raises:
        GatherError: a server does not answer (retryable).
        UnavailableError: the same.
    """
    inbox.forget(cluster, Notification.photo_id == photo_id)
    inbox.remove_all(
        cluster,
        select(Save.id).where(Save.photo_id == photo_id),
        lambda rows: delete(Save).where(Save.id.in_([row[0] for row in rows])),
    )


def forget_comments(cluster: Cluster, photo_id: int, ids: list[int]) -> None:
    """Remove what people were told of comments that are gone.

    Raises:
        GatherError: a server does not answer (retryable).
        UnavailableError: the same.
    """
    inbox.forget(cluster, Notification.photo_id == photo_id, Notification.comment_id.in_(ids))


def forget_person(cluster: Cluster, user_id: int, now: dt.datetime) -> None:
    """Remove what a person had, and what others have of the person, but for photos and edges.

    Stories end at once; the sweep of the servers removes their rows with the bytes.

    Args:
        cluster: where.
        user_id: whose row is gone.
        now: the time.

    Raises:
        GatherError: a server does not answer (retryable).
        UnavailableError: the same.
    """
    with deadline(TIMEOUT), cluster.writer() as session:
        session.execute(delete(Save).where(Save.user_id == user_id))
        session.execute(delete(Notification).where(Notification.user_id == user_id))
        session.execute(delete(Inbox).where(Inbox.user_id == user_id))
        session.execute(
            update(Story)
            .where(Story.owner_id == user_id, Story.expires_at > now)
            .values(expires_at=now)
        )
        session.commit()
    inbox.forget(cluster, or_(Notification.actor_id == user_id, Notification.user_id == user_id))
    inbox.remove_all(
        cluster,
        select(StoryView.id).where(StoryView.viewer_id == user_id),
        lambda rows: delete(StoryView).where(StoryView.id.in_([row[0] for row in rows])),
    )
