"""Counts how many photos have a tag, on the tag's shard. Called by the relay.

An event says that a photo has a tag or no longer has it. Those of one photo come in order, each
counts once, so the number is that of the photos as far as the relay is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.database import TIMEOUT
from app.search.grams import trigrams
from app.tags.models import Tag
from shardkit import Cluster, deadline
from shardkit.outbox import Event

__all__ = ["count"]


def count(cluster: Cluster, event: Event) -> None:
    """Apply an event; a tag that no photo has is gone.

    Raises:
        UnavailableError: a server does not answer (retryable).
        IntegrityError: another relay has just made the tag (retryable).
    """
    payload: Mapping[str, Any] = event.payload
    name, change = str(payload["tag"]), int(payload["change"])
    with deadline(TIMEOUT), cluster.writer() as session:
        tag = session.get(Tag, name, with_for_update=True)
        if tag is None:
            tag = Tag(name=name, photo_count=0, grams=sorted(trigrams(name)))
            session.add(tag)
            session.flush()
        if session.once(event, near=tag):
            tag.photo_count += change
        if tag.photo_count <= 0:
            session.delete(tag)
        session.commit()
