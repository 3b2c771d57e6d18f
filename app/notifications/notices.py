"""What events mean for whom: the notices that follow, and what is no longer to be told. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = [
    "Notice",
    "NoticeKind",
    "Withdrawal",
    "of_comment",
    "of_edge",
    "of_like",
    "of_photo",
]


class NoticeKind(StrEnum):
    """What happened."""

    LIKE = "like"
    COMMENT = "comment"
    REPLY = "reply"
    MENTION = "mention"
    FOLLOW = "follow"
    REQUEST = "request"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person is to be told.

    Attributes:
        user_id: who is told.
        kind: what happened.
        actor_id: who did it.
        source: what tells it from everything else that the person is told.
        group: those of one group are shown as one.
        at: when it happened.
        photo_id: to which photo, if to any.
        comment_id: by which comment, if by any.
        owner_id: whose photo it is, if the person has to be allowed to see it.
    """

    user_id: int
    kind: NoticeKind
    actor_id: int
    source: str
    group: str
    at: dt.datetime
    photo_id: int | None = None
    comment_id: int | None = None
    owner_id: int | None = None


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Something that a person is no longer to be told."""

    user_id: int
    source: str


def of_like(payload: Mapping[str, Any], at: dt.datetime) -> Notice | Withdrawal | None:
    """Return what the owner of a photo is told of a like; nothing of one's own."""
    photo_id, owner_id, user_id = (
        int(payload[name]) for name in ("photo_id", "owner_id", "user_id")
    )
    if owner_id == user_id:
        return None
    source = f"like:{photo_id}:{user_id}"
    if not payload["liked"]:
        return Withdrawal(owner_id, source)
    group = f"like:{photo_id}"
    return Notice(owner_id, NoticeKind.LIKE, user_id, source, group, at, photo_id)


def of_comment(
    payload: Mapping[str, Any], at: dt.datetime, people: Mapping[str, int]
) -> list[Notice]:
    """Return who is told of a comment, each once and for the best reason.

    Args:
        payload: of the event.
        at: when it was written.
        people: ids by name of those of the mentioned whom there are.
    """
    photo_id, comment_id = int(payload["photo_id"]), int(payload["comment_id"])
    author_id = int(payload["author_id"])
    told = {why: int(who) for why, who in payload["told"].items()}
    source = f"comment:{comment_id}"
    reasons: dict[int, NoticeKind] = {told["owner"]: NoticeKind.COMMENT}
    reasons |= dict.fromkeys(_named(payload, people), NoticeKind.MENTION)
    if "reply" in told:
        reasons[told["reply"]] = NoticeKind.REPLY
    return [
        Notice(
            user_id,
            kind,
            author_id,
            source,
            f"comment:{photo_id}" if kind is NoticeKind.COMMENT else source,
            at,
            photo_id,
            comment_id,
            told["owner"],
        )
        for user_id, kind in sorted(reasons.items())
        if user_id != author_id
    ]


def of_photo(
    payload: Mapping[str, Any], at: dt.datetime, people: Mapping[str, int]
) -> list[Notice]:
    """Return who is told of being mentioned in a caption; see `of_comment`."""
    photo_id, owner_id = int(payload["photo_id"]), int(payload["owner_id"])
    source = f"photo:{photo_id}"
    return [
        Notice(
            user_id,
            NoticeKind.MENTION,
            owner_id,
            source,
            source,
            at,
            photo_id,
            owner_id=owner_id,
        )
        for user_id in sorted(set(_named(payload, people)) - {owner_id})
    ]


def of_edge(
    kind: NoticeKind, actor_id: int, user_id: int, at: dt.datetime, *, present: bool
) -> Notice | Withdrawal:
    """Return what a person is told of who follows, or asks to; those of a day are one group."""
    source = f"{kind}:{actor_id}"
    if not present:
        return Withdrawal(user_id, source)
    return Notice(user_id, kind, actor_id, source, f"{kind}:{at.date().isoformat()}", at)


def _named(payload: Mapping[str, Any], people: Mapping[str, int]) -> Sequence[int]:
    return [people[name] for name in payload["mentions"] if name in people]
