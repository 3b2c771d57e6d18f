"""The search index in PostgreSQL: full text and trigrams, in every logical shard.

Each question is one statement a server with ORDER BY and LIMIT in it, merged by shardkit. First
what matches by its words, the last of which may be half typed (`tsvector`, GIN); only when that is
not enough, what shares most of the trigrams that were typed (arrays, GIN). Text goes in as bound
values only, and what becomes a `tsquery` is made of letters and digits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Integer,
    Text,
    case,
    cast,
    func,
    literal,
    literal_column,
    select,
)

from app.partial import FAILED, PATIENCE
from app.search.grams import folded, trigrams, words
from app.search.models import PersonEntry
from app.search.protocol import Found, TagFound
from app.tags.models import Tag
from app.tags.parser import canonical_tag
from shardkit import AsyncCluster, all_shards, deadline

__all__ = ["ALIKE", "PostgresSearch"]

ALIKE: Final = 0.6
"""Share of what was typed that something has to have: pg_trgm's default for word_similarity, of
which this is the bound from above: the trigrams need not be side by side (manual, F.35)."""

_MOST_WORDS: Final = 6
_MOST_GRAMS: Final = 40


class PostgresSearch:
    """Finds people and hashtags in their own tables; a `SearchIndex`.

    Args:
        cluster: whose replicas are asked; those that do not answer are left out.
    """

    def __init__(self, cluster: AsyncCluster) -> None:
        self._cluster = cluster

    async def people(self, text: str, n: int) -> Found[int]:
        """Return ids of people; see `SearchIndex.people`."""
        typed = words(text)[:_MOST_WORDS]
        if not typed:
            return Found()
        name = folded(text).strip().removeprefix("@")
        first = await self._asked(_people_by_words(typed, name, n))
        found = [row.user_id for row in first.items]
        if len(found) >= n:
            return Found(found, first.is_partial)
        whole = " ".join(typed)
        shared, length = _shared(PersonEntry.grams, whole), _length(PersonEntry.grams)
        statement = (
            select(PersonEntry.user_id, shared.label("shared"), length.label("length"))
            .where(_overlaps(PersonEntry.grams, whole), shared >= _enough(whole))
            .order_by(shared.desc(), length, PersonEntry.user_id.desc())
            .limit(n)
        )
        more = await self._asked(statement)
        ids = list(dict.fromkeys([*found, *(row.user_id for row in more.items)]))
        return Found(ids[:n], first.is_partial or more.is_partial)

    async def hashtags(self, text: str, n: int) -> Found[TagFound]:
        """Return tags; see `SearchIndex.hashtags`."""
        try:
            name = canonical_tag(text)
        except ValueError:
            return Found()
        is_it = case((Tag.name == name, 1), else_=0)
        first = await self._asked(
            select(Tag.name, Tag.photo_count, is_it.label("is_it"))
            .where(Tag.name >= name, Tag.name < name + "\U0010ffff")  # begins with it, in C order
            .order_by(is_it.desc(), Tag.photo_count.desc(), Tag.name.collate("C"))
            .limit(n)
        )
        found = {row.name: row.photo_count for row in first.items}
        partial = first.is_partial
        if len(found) < n:
            shared, length = _shared(Tag.grams, name), _length(Tag.grams)
            more = await self._asked(
                select(Tag.name, Tag.photo_count, shared.label("shared"), length.label("length"))
                .where(_overlaps(Tag.grams, name), shared >= _enough(name))
                .order_by(shared.desc(), length, Tag.photo_count.desc(), Tag.name.collate("C"))
                .limit(n)
            )
            found = {**{row.name: row.photo_count for row in more.items}, **found}
            order = [*(row.name for row in first.items), *(row.name for row in more.items)]
            found = {each: found[each] for each in dict.fromkeys(order)}
            partial = partial or more.is_partial
        items = [TagFound(each, count) for each, count in list(found.items())[:n]]
        return Found(items, partial)

    async def _asked(self, statement: Any) -> Found[Any]:
        try:
            with deadline(PATIENCE):
                async with self._cluster.reader() as session:
                    rows: Sequence[Any] = (
                        await session.execute(statement.options(all_shards(partial=True)))
                    ).all()
                    return Found(rows, bool(session.failures))
        except FAILED:
            return Found(is_partial=True)


def _people_by_words(typed: Sequence[str], name: str, n: int) -> Any:
    """Select who has all words, the last as a beginning; those first whose name it is."""
    query = " & ".join([*typed[:-1], f"{typed[-1]}:*"])
    vector = func.to_tsvector(literal_column("'simple'::regconfig"), PersonEntry.document)
    matches = vector.op("@@")(func.to_tsquery(literal_column("'simple'::regconfig"), query))
    begins = PersonEntry.username.startswith(name, autoescape=True)
    rank = case((PersonEntry.username == name, 2), (begins, 1), else_=0)
    return (
        select(PersonEntry.user_id, rank.label("rank"))
        .where(matches)
        .order_by(
            rank.desc(),
            func.length(PersonEntry.document, type_=Integer),
            PersonEntry.user_id.desc(),
        )
        .limit(n)
    )


def _length(column: Any) -> Any:
    return func.cardinality(column, type_=Integer)


def _overlaps(column: Any, text: str) -> ColumnElement[bool]:
    """Say that something has one of the trigrams of a text: by the GIN index."""
    return column.op("&&")(_array(_grams(text)))  # type: ignore[no-any-return]


def _shared(column: Any, text: str) -> Any:
    """Return how many of the trigrams of a text something has, as an expression."""
    shared: Any = literal(0)
    for gram in _grams(text):
        shared = shared + case((column.op("@>")(_array([gram])), 1), else_=0)
    return shared


def _enough(text: str) -> int:
    return math.ceil(ALIKE * len(_grams(text)))


def _grams(text: str) -> list[str]:
    return sorted(trigrams(text))[:_MOST_GRAMS]


def _array(values: Collection[str]) -> Any:
    return cast(list(values), ARRAY(Text))
