"""Reads a table of one logical shard whole, a page at a time, on its primary.

For jobs that compare rows with one another; each page is a statement and a session of its own, so
nothing is held open and memory does not grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Select, tuple_

from shardkit import Cluster

__all__ = ["pages"]


def pages(
    cluster: Cluster, shard: int, statement: Select[Any], key: Sequence[Any], n: int
) -> Iterator[Sequence[Any]]:
    """Yield the rows of a statement in the order of its key, up to `n` at a time.

    Args:
        cluster: where to read.
        shard: the logical shard.
        statement: selects the columns of the key first.
        key: the columns of a primary key.
        n: rows of a page.

    Raises:
        EndpointUnavailableError: the primary does not answer (retryable).
    """
    here = {"logical_shard": shard}
    ordered = statement.order_by(*key).limit(n)
    last: tuple[Any, ...] | None = None
    while True:
        page = ordered if last is None else ordered.where(tuple_(*key) > tuple_(*last))
        with cluster.writer() as session:
            rows = session.execute(page, bind_arguments=here).all()
        if rows:
            yield rows
        if len(rows) < n:
            return
        last = tuple(rows[-1][: len(key)])
