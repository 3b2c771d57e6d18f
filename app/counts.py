"""Counts that are kept beside what they count, and their repair.

Every count of the service changes in the transaction that adds or removes what it counts, under a
lock on its own row, and all of that is on one logical shard. So it is right whatever is killed
when; this compares it nevertheless, for rows that were changed by hand or came from a backup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import func, select

from app.accounts.models import User
from app.graph.models import COUNTED, Assoc
from app.photos.models import Comment, Like, Photo
from app.scan import pages
from shardkit import Cluster

__all__ = ["COUNTS", "Count", "mend"]


@dataclass(frozen=True, slots=True)
class Count:
    """A column that says how many rows name its row.

    Attributes:
        owner: class of the row that has the count.
        name: of the column.
        counted: column of the other table that holds the owner's id.
        kind: of the edges that are counted, where it is edges.
    """

    owner: Any
    name: str
    counted: Any
    kind: int | None = None

    def __str__(self) -> str:
        return f"{self.owner.__tablename__}.{self.name}"

    @property
    def truth(self) -> Any:
        """The number as an expression about the owner's row."""
        counting = select(func.count()).select_from(self.counted.class_)
        if self.kind is not None:
            counting = counting.where(Assoc.atype == self.kind)
        return counting.where(self.counted == self.owner.id).scalar_subquery()


COUNTS: Final = (
    Count(User, "photo_count", Photo.owner_id),
    *(Count(User, name, Assoc.id1, int(kind)) for kind, name in COUNTED.items()),
    Count(Photo, "like_count", Like.photo_id),
    Count(Photo, "comment_count", Comment.photo_id),
)


def mend(cluster: Cluster, shard: int, *, n: int, dry_run: bool) -> Counter[str]:
    """Make the counts of a logical shard true and return how many were wrong, by name.

    Args:
        cluster: whose.
        shard: the logical shard.
        n: rows compared by one statement.
        dry_run: only say how many.

    Raises:
        EndpointUnavailableError: the primary does not answer (retryable).
    """
    wrong: Counter[str] = Counter()
    for owner in (User, Photo):
        counts = [count for count in COUNTS if count.owner is owner]
        columns = [getattr(owner, count.name) for count in counts]
        statement: Any = select(owner.id, *columns, *(count.truth for count in counts))
        for rows in pages(cluster, shard, statement, [owner.id], n):
            for row in rows:
                if _differing(row[1:], counts):
                    wrong.update(_mend_row(cluster, owner, row[0], counts, dry_run=dry_run))
    return wrong


def _mend_row(
    cluster: Cluster, owner: Any, row_id: int, counts: Sequence[Count], *, dry_run: bool
) -> list[str]:
    """Count again under the row's lock, which everybody takes who changes what is counted."""
    with cluster.writer() as session:
        row = session.get(owner, row_id, with_for_update=True)
        if row is None:
            return []
        true = session.execute(
            select(*(count.truth for count in counts)).where(owner.id == row_id)
        ).one()
        given = [getattr(row, count.name) for count in counts]
        wrong = _differing([*given, *true], counts)
        for count, number in zip(counts, true, strict=True):
            setattr(row, count.name, number)
        if not dry_run:
            session.commit()
        return wrong


def _differing(values: Sequence[int], counts: Sequence[Count]) -> list[str]:
    given, true = values[: len(counts)], values[len(counts) :]
    return [str(c) for c, a, b in zip(counts, given, true, strict=True) if a != b]
