"""Reads and writes of associations, with the words of TAO.

    edges = await on(session, tao.assoc_range, ana.id, Kind.FOLLOWS, 0, 30)

Functions of shardkit's own sessions, `on` awaits them. A read asks the cached prefix of the list
first: it answers what is there, and, where the whole list is in it, also what is not. Blocks and
privacy are not looked at here (`app.graph.privacy`). Source: Bronson et al., "TAO", USENIX ATC
2013, sections 3.3 and 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

from sqlalchemy import and_, or_, select

from app.accounts.models import User
from app.errors import NotFoundError
from app.graph.models import (
    ASSOC_CHANGED,
    COUNTED,
    INVERSE,
    Assoc,
    Kind,
    count_of,
    edges_of,
    key_of,
    told,
)
from shardkit import AsyncReadSession, ReadSession, WriteSession

__all__ = [
    "Edge",
    "all_ids",
    "announce",
    "assoc_add",
    "assoc_change_type",
    "assoc_count",
    "assoc_delete",
    "assoc_get",
    "assoc_new",
    "assoc_page",
    "assoc_range",
    "assoc_time_range",
    "edges",
    "has",
    "locked",
    "next_time",
    "obj_get",
    "on",
    "page_of",
    "there",
]

T = TypeVar("T")
P = ParamSpec("P")


class Edge(NamedTuple):
    """Where an edge leads, and where it stands in its list: edges compare by time, then id."""

    at: int
    id2: int


async def on(
    session: AsyncReadSession,
    read: Callable[Concatenate[Any, P], T],
    *args: P.args,
    **options: P.kwargs,
) -> T:
    """Call a function of a session with an asynchronous one."""
    return await session.run_sync(cast("Callable[..., T]", read), *args, **options)


# -- reads


def obj_get(session: ReadSession, entity: type[T], ids: Iterable[int]) -> dict[int, T]:
    """Return objects by id; those there are not are missing."""
    wanted = list(dict.fromkeys(ids))
    found = session.get_many(entity, wanted)
    return {id_: each for id_, each in zip(wanted, found, strict=True) if each is not None}


def assoc_get(
    session: ReadSession,
    id1: int,
    kind: Kind,
    id2s: Iterable[int],
    *,
    high: int | None = None,
    low: int | None = None,
) -> dict[int, Edge]:
    """Return the edges of somebody to certain others, by id.

    Args:
        session: where to read.
        id1: whose edges.
        kind: of what kind.
        id2s: to whom.
        high: none that are newer than this; Unix milliseconds.
        low: none that are older than this.
    """
    wanted = set(id2s)
    newest = session.cached(edges_of, (id1, int(kind)))
    found = {id2: Edge(at, id2) for at, id2 in newest if id2 in wanted}
    rest = sorted(wanted - found.keys()) if len(newest) >= edges_of.limit else []
    if rest:
        rows = session.get_many(Assoc, [(id1, int(kind), id2) for id2 in rest])
        found |= {row.id2: Edge(row.at, row.id2) for row in rows if row is not None}
    return {id2: edge for id2, edge in found.items() if _within(edge, high, low)}


def has(session: ReadSession, id1: int, kind: Kind, id2: int) -> bool:
    """Tell whether an edge is there, by its row; for transactions that then change it."""
    return session.get(Assoc, (id1, int(kind), id2)) is not None


def there(
    session: ReadSession, kind: Kind, pairs: Iterable[tuple[int, int]]
) -> set[tuple[int, int]]:
    """Return which edges of a kind there are, of many people: one round trip, if they are cached.

    Args:
        session: where to read.
        kind: of what kind.
        pairs: `id1` and `id2` of each.
    """
    wanted = set(pairs)
    lists = session.cached_many(edges_of, {(id1, int(kind)) for id1, _ in wanted})
    held = {id1: {id2 for _, id2 in newest} for (id1, _), newest in lists.items()}
    found = {(id1, id2) for id1, id2 in wanted if id2 in held[id1]}
    rest = [pair for pair in wanted - found if len(held[pair[0]]) >= edges_of.limit]
    if rest:
        rows = session.get_many(Assoc, [(id1, int(kind), id2) for id1, id2 in rest])
        found |= {pair for pair, row in zip(rest, rows, strict=True) if row is not None}
    return found


def assoc_count(session: ReadSession, id1: int, kind: Kind) -> int:
    """Return how many edges of a kind somebody has."""
    return session.cached(count_of, (id1, int(kind)))


def assoc_range(session: ReadSession, id1: int, kind: Kind, pos: int, limit: int) -> list[Edge]:
    """Return edges by their place in the list, newest first.

    Args:
        session: where to read.
        id1: whose edges.
        kind: of what kind.
        pos: the first one's place, from 0; for pages use `assoc_page`, places move.
        limit: how many.
    """
    newest = session.cached(edges_of, (id1, int(kind)))
    if pos + limit <= len(newest) or len(newest) < edges_of.limit:
        return edges(newest[pos : pos + limit])
    statement = _newest_first(id1, kind).offset(pos).limit(limit)
    return [Edge(row.at, row.id2) for row in session.execute(statement)]


def assoc_time_range(
    session: ReadSession,
    id1: int,
    kind: Kind,
    *,
    high: int | None = None,
    low: int | None = None,
    limit: int,
) -> list[Edge]:
    """Return edges no newer than `high` and no older than `low`, newest first."""
    newest = session.cached(edges_of, (id1, int(kind)))
    found = edges([pair for pair in newest if _within(pair, high, low)][:limit])
    reaches = bool(newest) and low is not None and newest[-1][0] < low
    if len(found) == limit or len(newest) < edges_of.limit or reaches:
        return found
    statement = _newest_first(id1, kind)
    if high is not None:
        statement = statement.where(Assoc.at <= high)
    if low is not None:
        statement = statement.where(Assoc.at >= low)
    return [Edge(row.at, row.id2) for row in session.execute(statement.limit(limit))]


def assoc_page(
    session: ReadSession, id1: int, kind: Kind, after: Edge | None, limit: int
) -> list[Edge]:
    """Return the edges that follow one in the list, which need not be there any more."""
    newest = session.cached(edges_of, (id1, int(kind)))
    rest = newest if after is None else [pair for pair in newest if pair < after]
    if len(rest) >= limit or len(newest) < edges_of.limit:
        return edges(rest[:limit])
    statement = _newest_first(id1, kind)
    if after is not None:
        older = and_(Assoc.at == after.at, Assoc.id2 < after.id2)
        statement = statement.where(or_(Assoc.at < after.at, older))
    return [Edge(row.at, row.id2) for row in session.execute(statement.limit(limit))]


def all_ids(session: ReadSession, id1: int, kind: Kind, limit: int) -> list[int]:
    """Return to whom all edges of a kind lead, newest first, up to a limit."""
    newest = session.cached(edges_of, (id1, int(kind)))
    if limit <= len(newest) or len(newest) < edges_of.limit:
        return [id2 for _, id2 in newest[:limit]]
    return [row.id2 for row in session.execute(_newest_first(id1, kind).limit(limit))]


def page_of(
    session: ReadSession,
    asked: Sequence[tuple[str, int, Sequence[int]]],
    kind: Kind,
    entity: type[T],
    limit: int,
) -> list[Any]:
    """Return the answers to many questions at once: three round trips to the cache for all.

    Args:
        session: where to read.
        asked: of each, `obj`, `get`, `count`, `range` or `time_range` (newest first, from the
            newest), the `id1`, and for `get` the `id2s`.
        kind: of the edges.
        entity: class of the objects.
        limit: edges of a range.

    Returns:
        What `obj_get`, `assoc_get`, `assoc_count`, `assoc_range` and `assoc_time_range` return.
    """
    objects = obj_get(session, entity, [id1 for what, id1, _ in asked if what == "obj"])
    counted = {(id1, int(kind)) for what, id1, _ in asked if what == "count"}
    counts = session.cached_many(count_of, counted) if counted else {}
    listed = {(id1, int(kind)) for what, id1, _ in asked if what not in {"obj", "count"}}
    lists = session.cached_many(edges_of, listed) if listed else {}
    found: list[Any] = []
    for what, id1, id2s in asked:
        if what == "obj":
            found.append({id1: objects[id1]} if id1 in objects else {})
        elif what == "count":
            found.append(counts[id1, int(kind)])
        elif what == "get":
            newest = lists[id1, int(kind)]
            if len(newest) >= edges_of.limit:
                found.append(assoc_get(session, id1, kind, id2s))
            else:
                wanted = set(id2s)
                found.append({id2: Edge(at, id2) for at, id2 in newest if id2 in wanted})
        else:
            found.append(edges(lists[id1, int(kind)][:limit]))
    return found


def _newest_first(id1: int, kind: Kind) -> Any:
    found = select(Assoc.at, Assoc.id2).where(Assoc.id1 == id1, Assoc.atype == int(kind))
    return found.order_by(Assoc.at.desc(), Assoc.id2.desc())


def _within(edge: tuple[int, int], high: int | None, low: int | None) -> bool:
    return (high is None or edge[0] <= high) and (low is None or edge[0] >= low)


_edge: Callable[[tuple[int, int]], Edge] = partial(tuple.__new__, Edge)
"""What `Edge._make` does, without a frame of Python for each of fifty."""


def edges(pairs: Iterable[tuple[int, int]]) -> list[Edge]:
    """Return pairs of time and id, as the cached list has them, as edges."""
    return list(map(_edge, pairs))


# -- writes


def locked(session: WriteSession, user_id: int) -> User:
    """Return a person, locked: whoever changes their edges has this lock, so counts are exact.

    Raises:
        NotFoundError: there is none.
    """
    user: User | None = session.get(User, user_id, with_for_update=True)
    if user is None:
        raise NotFoundError("There is no such person.")
    return user


def next_time(session: WriteSession, id1: int, kind: Kind, now: int) -> int:
    """Return a time for a new edge that is later than those of all there are.

    So who knows all edges up to a time of one person knows which are new, whatever the clocks of
    servers say. The person is `locked`.
    """
    newest = session.execute(_newest_first(id1, kind).limit(1)).first()
    return now if newest is None else max(now, newest.at + 1)


def assoc_add(session: WriteSession, user: User, kind: Kind, id2: int, at: int) -> bool:
    """Add an edge of a person, with its count and what announces it; tell whether it was new.

    Args:
        session: the transaction.
        user: whose edge; `locked`.
        kind: of what kind.
        id2: to whom.
        at: since when; Unix milliseconds.
    """
    if session.get(Assoc, (user.id, int(kind), id2)) is not None:
        return False
    assoc_new(session, user, kind, id2, at)
    return True


def assoc_new(
    session: WriteSession, user: User, kind: Kind, id2: int, at: int, *, is_news: bool = True
) -> None:
    """Add an edge that is known not to be there, as `assoc_add` does, and ask nothing.

    So many are one flush. `is_news` tells whether who it leads to is notified.
    """
    session.add(Assoc(id1=user.id, atype=int(kind), id2=id2, at=at))
    _count(user, kind, 1)
    announce(session, user.id, kind, id2, at, is_news=is_news)


def assoc_delete(session: WriteSession, user: User, kind: Kind, id2: int) -> bool:
    """Delete an edge of a person; tell whether it was there. See `assoc_add`."""
    edge = session.get(Assoc, (user.id, int(kind), id2))
    if edge is None:
        return False
    session.delete(edge)
    _count(user, kind, -1)
    announce(session, user.id, kind, id2, None)
    return True


def assoc_change_type(
    session: WriteSession, user: User, kinds: tuple[Kind, Kind], id2: int, at: int
) -> bool:
    """Make an edge of the first kind one of the second; tell whether it was there."""
    old, new = kinds
    if not assoc_delete(session, user, old, id2):
        return False
    assoc_add(session, user, new, id2, at)
    return True


def announce(
    session: WriteSession, id1: int, kind: Kind, id2: int, at: int | None, *, is_news: bool = True
) -> None:
    """Say what an edge is now to who has to know; see `app.graph.inverse`."""
    if kind in INVERSE or kind is Kind.BLOCKS:
        key = key_of(id1, kind, id2)
        payload = told(id1, kind, id2, at, is_news=is_news)
        session.emit(ASSOC_CHANGED, payload, key=key, near=id1)


def _count(user: User, kind: Kind, n: int) -> None:
    if (name := COUNTED.get(kind)) is not None:
        setattr(user, name, getattr(user, name) + n)
