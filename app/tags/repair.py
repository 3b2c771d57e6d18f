"""Finds photos whose tags are not those of their caption, and mends them: also those from before.

Tags are written with the photo, so they only differ where rows were changed by hand, or are older
than tags. A photo that is mended has all tags of its caption said again, to be counted: the tags it
had stay counted once, since only what is new is announced.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from sqlalchemy import or_, select

from app import happenings
from app.photos.models import Photo
from app.scan import pages
from app.tags.models import PhotoTag
from app.tags.parser import HASHES, tags
from shardkit import Cluster, WriteSession

__all__ = ["WRONG", "mend"]

WRONG: Final = "photo_tags"
"""What is found, by name: photos that lack a tag of their caption."""


def mend(cluster: Cluster, shard: int, *, n: int, dry_run: bool) -> Counter[str]:
    """Give the photos of a logical shard the tags of their captions; return how many lacked one.

    Raises:
        EndpointUnavailableError: the primary does not answer (retryable).
    """
    found: Counter[str] = Counter()
    signs = or_(*(Photo.caption.contains(sign) for sign in HASHES))
    captions: Any = select(Photo.id, Photo.caption).where(signs)
    for rows in pages(cluster, shard, captions, [Photo.id], n):
        wanted = {row.id: names for row in rows if (names := set(tags(row.caption)))}
        if not wanted:
            continue
        with cluster.writer() as session:
            held = _held(session, list(wanted))
        for photo_id, names in wanted.items():
            if names - held.get(photo_id, set()):
                found[WRONG] += 1
                if not dry_run:
                    _mend_photo(cluster, photo_id)
    return found


def _held(session: WriteSession, photo_ids: list[int]) -> dict[int, set[str]]:
    statement = select(PhotoTag.photo_id, PhotoTag.tag).where(
        PhotoTag.photo_id.in_(photo_ids), PhotoTag.source_id == PhotoTag.photo_id
    )
    found: dict[int, set[str]] = {}
    for photo_id, tag in session.execute(statement):
        found.setdefault(photo_id, set()).add(tag)
    return found


def _mend_photo(cluster: Cluster, photo_id: int) -> None:
    with cluster.writer() as session:
        photo = session.get(Photo, photo_id, with_for_update=True)
        if photo is None:
            return
        held = _held(session, [photo_id]).get(photo_id, set())
        missing = [name for name in tags(photo.caption) if name not in held]
        session.add_all(
            PhotoTag(photo_id=photo_id, tag=name, source_id=photo_id) for name in missing
        )
        happenings.tag_changed(session, photo_id, missing, 1)
        session.commit()
