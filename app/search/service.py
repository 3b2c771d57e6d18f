"""Search of people and hashtags, as one viewer may see them."""

from __future__ import annotations

import asyncio

from app.accounts.repository import AccountRepository
from app.accounts.service import Viewer, person_out
from app.database import Database
from app.graph.privacy import hidden_among
from app.partial import is_partial
from app.search.protocol import SearchIndex
from app.search.schemas import SearchOut, TagOut

__all__ = ["SearchService"]


class SearchService:
    """What there is to find.

    Args:
        database: the client's sessions.
        index: finds.
    """

    def __init__(self, database: Database, index: SearchIndex) -> None:
        self._database = database
        self._index = index

    async def find(self, text: str, viewer: Viewer | None, n: int) -> SearchOut:
        """Return up to `n` people and `n` tags; `#` asks for tags only, `@` for people only."""
        typed = text.strip()
        people, tags = await asyncio.gather(
            self._index.people("" if typed.startswith("#") else typed, n),
            self._index.hashtags("" if typed.startswith("@") else typed, n),
        )
        async with self._database.reader() as session:
            users = await AccountRepository(session).users(people.items)
            me = None if viewer is None else viewer.id
            hidden = await hidden_among(session, me, users)
            partial = people.is_partial or tags.is_partial or is_partial(session)
        return SearchOut(
            people=[
                person_out(users[each])
                for each in people.items
                if each in users and each not in hidden
            ],
            tags=[TagOut(name=tag.name, photo_count=tag.photo_count) for tag in tags.items],
            partial=partial,
        )
