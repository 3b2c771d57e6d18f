"""Where a page of a list of edges begins: time and id of the edge before it, as `time.id`.

The place stays right while edges come and go, also when that one goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Query

from app.errors import InvalidInputError
from app.graph.tao import Edge
from app.ids import parse_id

__all__ = ["After", "cut_edges"]


async def get_after(
    cursor: Annotated[
        str | None,
        Query(
            max_length=40,
            description="`next_cursor` of the page before; leave out for the first page",
        ),
    ] = None,
) -> Edge | None:
    """Return the edge after which a page begins.

    Raises:
        InvalidInputError: no page of ours ended so.
    """
    if cursor is None:
        return None
    at, _, id2 = cursor.partition(".")
    try:
        return Edge(parse_id(at), parse_id(id2))
    except ValueError:
        raise InvalidInputError("cursor", "must be the next_cursor of a page") from None


After = Annotated[Edge | None, Depends(get_after)]
"""Where a page begins, as a query parameter."""


def cut_edges(edges: Sequence[Edge], n: int) -> tuple[Sequence[Edge], str | None]:
    """Split `n` edges off a list read with a limit of `n + 1`; return them and the next cursor."""
    if len(edges) <= n:
        return edges, None
    last = edges[n - 1]
    return edges[:n], f"{last.at}.{last.id2}"
