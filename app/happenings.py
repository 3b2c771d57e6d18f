"""What services announce for the relay: topics, and payloads as functions make them.

Emitted in the transaction of what happened, beside its rows, and read by `app.reactions`. Events of
a photo have its id as their key, so that they are delivered in the order in which they were
committed: what a photo leaves behind is removed after everything that was said of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from shardkit import AsyncWriteSession, WriteSession

__all__ = [
    "COMMENTS_REMOVED",
    "COMMENT_ADDED",
    "LIKE_CHANGED",
    "PERSON_CHANGED",
    "PERSON_REMOVED",
    "PHOTO_MENTIONS",
    "PHOTO_REMOVED",
    "TAG_CHANGED",
    "comment_added",
    "comments_removed",
    "like_changed",
    "person_changed",
    "person_removed",
    "photo_mentions",
    "photo_removed",
    "tag_changed",
]

Emitter = AsyncWriteSession | WriteSession

PHOTO_MENTIONS: Final = "photo.mentions"
PHOTO_REMOVED: Final = "photo.removed"
LIKE_CHANGED: Final = "like.changed"
COMMENT_ADDED: Final = "comment.added"
COMMENTS_REMOVED: Final = "comments.removed"
TAG_CHANGED: Final = "tag.changed"
PERSON_CHANGED: Final = "person.changed"
PERSON_REMOVED: Final = "person.removed"

_AT_ONCE: Final = 500
"""Comments that one event names: an event has up to 64 KiB."""


def photo_mentions(session: Emitter, photo_id: int, owner_id: int, names: list[str]) -> None:
    """Say that a caption mentions people."""
    payload = {"photo_id": str(photo_id), "owner_id": str(owner_id), "mentions": names}
    _emit(session, PHOTO_MENTIONS, payload, photo_id)


def photo_removed(session: Emitter, photo_id: int) -> None:
    """Say that a photo is gone."""
    _emit(session, PHOTO_REMOVED, {"photo_id": str(photo_id)}, photo_id)


def like_changed(
    session: Emitter, photo_id: int, owner_id: int, user_id: int, *, liked: bool
) -> None:
    """Say that somebody likes a photo, or no longer does."""
    payload = {
        "photo_id": str(photo_id),
        "owner_id": str(owner_id),
        "user_id": str(user_id),
        "liked": liked,
    }
    # By person, so that likes of a photo do not wait for each other's COMMIT.
    session.emit(LIKE_CHANGED, payload, key=f"{photo_id}:{user_id}", near=photo_id)


def comment_added(
    session: Emitter,
    photo_id: int,
    comment_id: int,
    *,
    author_id: int,
    told: dict[str, int],
    names: list[str],
) -> None:
    """Say that somebody wrote a comment.

    Args:
        session: the transaction.
        photo_id: under which photo.
        comment_id: the comment.
        author_id: who wrote it.
        told: who is told for another reason than being mentioned: `owner` and `reply`, by id.
        names: who is mentioned.
    """
    payload = {
        "photo_id": str(photo_id),
        "comment_id": str(comment_id),
        "author_id": str(author_id),
        "told": {why: str(who) for why, who in told.items()},
        "mentions": names,
    }
    _emit(session, COMMENT_ADDED, payload, photo_id)


def comments_removed(session: Emitter, photo_id: int, ids: Sequence[int]) -> None:
    """Say that comments are gone."""
    for start in range(0, len(ids), _AT_ONCE):
        some = [str(each) for each in ids[start : start + _AT_ONCE]]
        _emit(session, COMMENTS_REMOVED, {"photo_id": str(photo_id), "ids": some}, photo_id)


def tag_changed(session: Emitter, photo_id: int, names: Iterable[str], change: int) -> None:
    """Say that a photo has tags it did not have (1), or has them no longer (-1)."""
    for name in names:
        session.emit(TAG_CHANGED, {"tag": name, "change": change}, key=name, near=photo_id)


def person_changed(session: Emitter, user_id: int) -> None:
    """Say that a person is new, or is called otherwise."""
    _emit(session, PERSON_CHANGED, {"user_id": str(user_id)}, user_id)


def person_removed(session: Emitter, user_id: int) -> None:
    """Say that a person is gone; to be emitted with the deletion of the person's row."""
    _emit(session, PERSON_REMOVED, {"user_id": str(user_id)}, user_id)


def _emit(session: Emitter, topic: str, payload: dict[str, Any], about: int) -> None:
    session.emit(topic, payload, key=about, near=about)
