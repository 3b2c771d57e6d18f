"""Statements about tags of photos; those that write belong into the transaction of the photo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import delete, select

from app import happenings
from app.partial import answered
from app.tags.models import PhotoTag
from shardkit import AsyncReadSession, AsyncWriteSession

__all__ = ["add_tags", "drop_tags", "photos_tagged"]


async def photos_tagged(
    session: AsyncReadSession, tag: str, before: int | None, n: int
) -> Sequence[int]:
    """Return ids of the newest photos of all shards that have a tag, below an id."""
    statement = select(PhotoTag.photo_id).where(PhotoTag.tag == tag).distinct()
    if before is not None:
        statement = statement.where(PhotoTag.photo_id < before)
    return await answered(session, statement.order_by(PhotoTag.photo_id.desc()).limit(n))


async def add_tags(
    session: AsyncWriteSession, photo_id: int, source_id: int, names: Sequence[str]
) -> None:
    """Give a photo the tags of its caption or of a comment; its row has to be locked, or new."""
    if not names:
        return
    statement = select(PhotoTag.tag).where(PhotoTag.photo_id == photo_id, PhotoTag.tag.in_(names))
    there = set(await session.scalars(statement))
    session.add_all(PhotoTag(photo_id=photo_id, tag=name, source_id=source_id) for name in names)
    happenings.tag_changed(session, photo_id, [n for n in names if n not in there], 1)


async def drop_tags(
    session: AsyncWriteSession, photo_id: int, source_ids: Iterable[int] | None = None
) -> None:
    """Take from a photo the tags of some comments, or all it has; its row has to be locked."""
    rows = await session.execute(
        select(PhotoTag.tag, PhotoTag.source_id).where(PhotoTag.photo_id == photo_id)
    )
    held = [(row.tag, row.source_id) for row in rows]
    sources = {source for _, source in held} if source_ids is None else set(source_ids)
    gone = {tag for tag, source in held if source in sources}
    if not gone:
        return
    await session.execute(
        delete(PhotoTag).where(PhotoTag.photo_id == photo_id, PhotoTag.source_id.in_(sources))
    )
    left = {tag for tag, source in held if source not in sources}
    happenings.tag_changed(session, photo_id, sorted(gone - left), -1)
