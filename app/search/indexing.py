"""Keeps what people are found by beside them. Called by the relay.

An event says that somebody is new, changed or gone; what they are is read under the lock of their
row, so the order of events does not matter and a repetition changes nothing.
"""

from __future__ import annotations

from app.accounts.models import User
from app.database import TIMEOUT
from app.search.grams import trigrams, words
from app.search.models import PersonEntry
from shardkit import Cluster, deadline

__all__ = ["document_of", "index_person"]

LONGEST = 400
"""Characters of a document; compatibility forms may be longer folded than written."""


def document_of(username: str, display_name: str) -> str:
    """Return what a person is looked for in."""
    return " ".join(words(f"{username} {display_name}"))[:LONGEST]


def index_person(cluster: Cluster, user_id: int) -> bool:
    """Make a person's entry what their row says; return whether that changed anything.

    Raises:
        UnavailableError: the server does not answer (retryable).
    """
    with deadline(TIMEOUT), cluster.writer() as session:
        user = session.get(User, user_id, with_for_update=True)
        entry = session.get(PersonEntry, user_id)
        if user is None:
            if entry is not None:
                session.delete(entry)
        else:
            document = document_of(user.username, user.display_name)
            if entry is not None and (entry.username, entry.document) == (user.username, document):
                return False
            entry = entry or PersonEntry(user_id=user_id)
            entry.username, entry.document = user.username, document
            entry.grams = sorted(trigrams(document))
            session.add(entry)
        changed = bool(session.new or session.dirty or session.deleted)
        session.commit()
        return changed
