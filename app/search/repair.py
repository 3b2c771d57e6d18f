"""Finds who is not found by what they are called, and mends it: also everybody from before."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from sqlalchemy import exists, select

from app.accounts.models import User
from app.scan import pages
from app.search.indexing import document_of, index_person
from app.search.models import PersonEntry
from shardkit import Cluster

__all__ = ["MISSING", "STRAY", "compare"]

MISSING: Final = "people_index.missing"
STRAY: Final = "people_index.stray"
"""What is found, by name: people without a true entry, and entries of nobody."""


def compare(cluster: Cluster, shard: int, *, n: int, dry_run: bool) -> Counter[str]:
    """Compare the people of a logical shard with the index; return how many differ.

    Raises:
        EndpointUnavailableError: the primary does not answer (retryable).
    """
    found: Counter[str] = Counter()
    people: Any = select(
        User.id, User.username, User.display_name, PersonEntry.username, PersonEntry.document
    ).join(PersonEntry, PersonEntry.user_id == User.id, isouter=True)
    for rows in pages(cluster, shard, people, [User.id], n):
        for user_id, username, display_name, *entry in rows:
            if entry != [username, document_of(username, display_name)]:
                found[MISSING] += 1
                if not dry_run:
                    index_person(cluster, user_id)
    stray: Any = select(PersonEntry.user_id).where(~exists().where(User.id == PersonEntry.user_id))
    for rows in pages(cluster, shard, stray, [PersonEntry.user_id], n):
        for (user_id,) in rows:
            found[STRAY] += 1
            if not dry_run:
                index_person(cluster, user_id)
    return found
