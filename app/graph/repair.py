"""Finds edges that are there on one side only, and has the relay mend them.

The forward edge is the truth. One whose two sides differ is said once more: under the lock that
every change takes, an event is emitted that says what the forward edge is. It comes behind all that
is still under way for the edge, and the relay makes the inverse edge and its count what it says.
So repair and traffic cannot cross, and a repair that is killed has said less, never a wrong thing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import select

from app.accounts.models import User
from app.graph import tao
from app.graph.models import INVERSE, Assoc, Kind
from app.scan import pages
from shardkit import Cluster

__all__ = ["EXTRA", "MISSING", "compare"]

MISSING: Final = "edges.missing"
EXTRA: Final = "edges.extra"
"""What is found, by name: forward edges whose inverse lacks or is of another time, and inverse
edges without a forward one."""

Key = tuple[int, int, int]
"""Primary key of a forward edge."""

FORWARD: Final = {int(inverse): int(kind) for kind, inverse in INVERSE.items()}


def compare(cluster: Cluster, shard: int, *, n: int, dry_run: bool) -> Counter[str]:
    """Compare the edges of a logical shard with their other sides; return how many differ.

    Both are counted that the relay has not got to yet: for a moment after a follow it lacks its
    other side.

    Args:
        cluster: whose.
        shard: the logical shard, whose forward and whose inverse edges are read.
        n: edges compared at once; each page takes a statement here and one for each server.
        dry_run: only say how many.

    Raises:
        EndpointUnavailableError: a primary does not answer (retryable).
        GatherError: primaries of the other sides do not (retryable).
    """
    found: Counter[str] = Counter()
    edges: Any = select(Assoc.id1, Assoc.atype, Assoc.id2, Assoc.at)
    for page in pages(cluster, shard, edges, [Assoc.id1, Assoc.atype, Assoc.id2], n):
        rows = [row for row in page if row.atype in FORWARD or Kind(row.atype) in INVERSE]
        others = [(row.id2, _other(row.atype), row.id1) for row in rows]
        with cluster.writer() as session:
            there = session.get_many(Assoc, others)
        lacking: list[Key] = []
        extra: list[Key] = []
        for row, key, other in zip(rows, others, there, strict=True):
            if row.atype in FORWARD:
                if other is None:
                    extra.append(key)
            elif other is None or other.at != row.at:
                lacking.append((row.id1, row.atype, row.id2))
        found[MISSING] += _say_again(cluster, lacking, present=True, dry_run=dry_run)
        found[EXTRA] += _say_again(cluster, extra, present=False, dry_run=dry_run)
    return found


def _other(atype: int) -> int:
    return FORWARD[atype] if atype in FORWARD else int(INVERSE[Kind(atype)])


def _say_again(cluster: Cluster, keys: Sequence[Key], *, present: bool, dry_run: bool) -> int:
    """Emit what forward edges are now; return how many were as they seemed."""
    by_person: dict[int, list[Key]] = defaultdict(list)
    for key in keys:
        by_person[key[0]].append(key)
    n = 0
    for id1, some in sorted(by_person.items()):
        with cluster.writer() as session:
            session.get(User, id1, with_for_update=True)
            for key, edge in zip(some, session.get_many(Assoc, some), strict=True):
                n += (edge is not None) is present
                if not dry_run:
                    at = None if edge is None else edge.at
                    tao.announce(session, id1, Kind(key[1]), key[2], at)
            if not dry_run:
                session.commit()
    return n
