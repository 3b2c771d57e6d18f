"""Writes notices into the inboxes of those they are for, on their shards. Called by the relay.

Delivered twice, a notice is written once, and returned both times: whoever publishes does so after
COMMIT, and may have died in between. Numbers are given under the lock of the inbox until COMMIT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from sqlalchemy import ColumnElement, delete, select

from app.accounts.models import User
from app.database import TIMEOUT
from app.graph import privacy
from app.notifications.models import Inbox, Notification
from app.notifications.notices import Notice, Withdrawal
from app.photos.models import Photo
from shardkit import Cluster, WriteSession, all_shards, deadline, ids

__all__ = ["KEPT", "forget", "names_to_ids", "put", "remove_all", "withdraw"]

KEPT: Final = 1000
"""Notifications of a person that are kept, the newest."""

_TRIMMED_EVERY: Final = 50
_AT_ONCE: Final = 1000


def put(cluster: Cluster, notice: Notice) -> Notification | None:
    """Write a notice; return the row, also if it was there, or None if nobody is to be told.

    Raises:
        UnavailableError: a server does not answer (retryable).
    """
    with deadline(TIMEOUT), cluster.writer() as session:
        inbox = _locked(session, notice.user_id)
        if inbox is None:
            return None
        there = session.scalars(_one(notice.user_id, notice.source)).first()
        if there is None:
            if not _may_know(session, notice):
                return None
            inbox.last_seq += 1
            there = Notification(
                user_id=notice.user_id,
                seq=inbox.last_seq,
                kind=str(notice.kind),
                actor_id=notice.actor_id,
                photo_id=notice.photo_id,
                comment_id=notice.comment_id,
                source=notice.source,
                group_key=notice.group,
                created_at=notice.at,
            )
            session.add(there)
            if inbox.last_seq % _TRIMMED_EVERY == 0:
                _trim(session, inbox)
        session.flush()
        session.expunge(there)
        session.commit()
        return there


def withdraw(cluster: Cluster, withdrawal: Withdrawal) -> None:
    """Remove a notice; there need not be one.

    Raises:
        UnavailableError: a server does not answer (retryable).
    """
    with deadline(TIMEOUT), cluster.writer() as session:
        session.execute(
            delete(Notification).where(
                Notification.user_id == withdrawal.user_id,
                Notification.source == withdrawal.source,
            )
        )
        session.commit()


def forget(cluster: Cluster, *which: ColumnElement[bool]) -> None:
    """Remove notifications of everybody, on all shards.

    Args:
        cluster: where.
        which: conditions about `Notification`; one of them by an index.

    Raises:
        GatherError: a server does not answer (retryable).
        UnavailableError: the same.
    """
    statement: Any = select(Notification.user_id, Notification.seq).where(*which)
    remove_all(
        cluster,
        statement,
        lambda rows: delete(Notification).where(
            Notification.user_id.in_({row[0] for row in rows}), *which
        ),
    )


def remove_all(cluster: Cluster, statement: Any, removal: Callable[[list[Any]], Any]) -> None:
    """Delete the rows that a statement finds on all shards, in one transaction a server.

    Args:
        cluster: where.
        statement: selects an id first that says where a row is.
        removal: the statement that deletes some of the rows found, all on one server.
    """
    shard_map = cluster.topology.shard_map
    while True:
        with deadline(TIMEOUT), cluster.writer() as session:
            rows = session.execute(statement.limit(_AT_ONCE).options(all_shards())).all()
        by_server: dict[str, list[Any]] = {}
        for row in rows:
            by_server.setdefault(shard_map.owner(ids.shard_of(row[0])), []).append(row)
        for some in by_server.values():
            with deadline(TIMEOUT), cluster.writer() as session:
                session.execute(removal(some))
                session.commit()
        if len(rows) < _AT_ONCE:
            return


def names_to_ids(cluster: Cluster, names: Iterable[str]) -> dict[str, int]:
    """Return ids of people by username, of those there are; as the primaries know them."""
    wanted = list(names)
    if not wanted:
        return {}
    with deadline(TIMEOUT), cluster.writer() as session:
        rows = session.execute(select(User.username, User.id).where(User.username.in_(wanted)))
        return {row.username: row.id for row in rows}


def _one(user_id: int, source: str) -> Any:
    return select(Notification).where(
        Notification.user_id == user_id, Notification.source == source
    )


def _locked(session: WriteSession, user_id: int) -> Inbox | None:
    """Return a person's inbox, locked; None where there is no such person."""
    inbox: Inbox | None = session.get(Inbox, user_id, with_for_update=True)
    if inbox is not None:
        return inbox
    # The first one: whoever comes at the same time waits here.
    if session.get(User, user_id, with_for_update=True) is None:
        return None
    inbox = session.get(Inbox, user_id, with_for_update=True)
    if inbox is None:
        inbox = Inbox(user_id=user_id, last_seq=0, read_seq=0)
        session.add(inbox)
    return inbox


def _may_know(session: WriteSession, notice: Notice) -> bool:
    """Tell whether no block is between the two, and the photo is one the person may see."""
    if privacy.hidden(session, notice.user_id, [notice.actor_id]):
        return False
    if not _is_there(session, notice):
        return False
    if notice.owner_id is None or notice.owner_id == notice.user_id:
        return True
    owner = session.get(User, notice.owner_id)
    if owner is None:
        return False
    return bool(privacy.visible(session, notice.user_id, {owner.id: owner}))


def _is_there(session: WriteSession, notice: Notice) -> bool:
    """Tell whether the photo still is: what is told of it then goes before or with it.

    Beside the person the row is locked, so that a deletion comes after this COMMIT, and after it
    what removes notifications. Elsewhere events of the photo come in order.
    """
    if notice.photo_id is None:
        return True
    is_near = ids.shard_of(notice.photo_id) == ids.shard_of(notice.user_id)
    lock = {"read": True, "key_share": True} if is_near else None
    return session.get(Photo, notice.photo_id, with_for_update=lock) is not None


def _trim(session: WriteSession, inbox: Inbox) -> None:
    session.execute(
        delete(Notification).where(
            Notification.user_id == inbox.user_id, Notification.seq <= inbox.last_seq - KEPT
        )
    )
