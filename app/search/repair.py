"""Finds who is not found by what they are called, and mends it: also everybody from before."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from sqlalchemy import select

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
    people: Any = select(User.id, User.username, User.display_name)
    for rows in pages(cluster, shard, people, [User.id], n):
        with cluster.writer() as session:
            entries = session.get_many(PersonEntry, [row.id for row in rows])
        for row, entry in zip(rows, entries, strict=True):
            document = document_of(row.username, row.display_name)
            if entry is None or (entry.username, entry.document) != (row.username, document):
                found[MISSING] += 1
                if not dry_run:
                    index_person(cluster, row.id)
    for rows in pages(cluster, shard, select(PersonEntry.user_id), [PersonEntry.user_id], n):
        with cluster.writer() as session:
            users = session.get_many(User, [row.user_id for row in rows])
        for row, user in zip(rows, users, strict=True):
            if user is None:
                found[STRAY] += 1
                if not dry_run:
                    index_person(cluster, row.user_id)
    return found
