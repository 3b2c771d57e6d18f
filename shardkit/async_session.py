"""The sessions for asyncio: the same classes run through SQLAlchemy's proxy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from shardkit.connections import AsyncConnections
from shardkit.router import Route
from shardkit.session import ReadSession
from shardkit.statements import Params
from shardkit.writer import WriteSession

__all__ = ["AsyncReadSession", "AsyncWriteSession"]


class AsyncReadSession(AsyncSession):
    """`ReadSession` for asyncio: the same words, awaited."""

    sync_session_class: type[Session] = ReadSession
    sync_session: ReadSession

    def __init__(self, connections: AsyncConnections, **options: Any) -> None:
        super().__init__(
            sync_session_class=type(self).sync_session_class, connections=connections, **options
        )

    async def get_many(
        self, entity: Any, idents: Iterable[Any], *, options: Sequence[Any] = ()
    ) -> list[Any]:
        """Return the rows of many primary keys, in their order. See `ReadSession.get_many`."""
        return await greenlet_spawn(self.sync_session.get_many, entity, idents, options=options)

    async def get_by(self, entity: Any, **unique: Any) -> Any:
        """Return the row that has a unique value, or None. See `ReadSession.get_by`."""
        return await greenlet_spawn(self.sync_session.get_by, entity, **unique)

    def route(self, statement: Any, params: Params = None) -> Route:
        """Return where a statement would run; runs nothing. See `ReadSession.route`.

        Raises:
            UnsupportedStatementError: a directory has to be asked first, which has to be awaited.
        """
        return self.sync_session.route(statement, params)

    @property
    def token(self) -> str:
        """What a later reader must have seen; see `ReadSession.token`."""
        return self.sync_session.token

    @property
    def failures(self) -> Mapping[str, Exception]:
        """What is missing from the last partial result; see `ReadSession.failures`."""
        return self.sync_session.failures


class AsyncWriteSession(AsyncReadSession):
    """`WriteSession` for asyncio: the same words, awaited."""

    sync_session_class: type[Session] = WriteSession
    sync_session: WriteSession

    @property
    def token(self) -> str:
        """After a commit, what a later reader must have seen; an empty string before."""
        return self.sync_session.token
