"""The sessions for asyncio: the same classes run through SQLAlchemy's proxy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from shardkit.connections import AsyncConnections
from shardkit.derived import Derived
from shardkit.emitting import HasId
from shardkit.router import Route
from shardkit.session import ReadSession
from shardkit.statements import Params
from shardkit.writer import WriteSession

__all__ = ["AsyncReadSession", "AsyncWriteSession"]

_E = TypeVar("_E", bound=HasId)
V = TypeVar("V")


class AsyncReadSession(AsyncSession):
    """`ReadSession` for asyncio: the same words, awaited."""

    sync_session_class: type[Session] = ReadSession
    sync_session: ReadSession

    def __init__(self, connections: AsyncConnections, **options: Any) -> None:
        super().__init__(
            sync_session_class=type(self).sync_session_class, connections=connections, **options
        )

    async def __aexit__(self, type_: object, value: object, traceback: object) -> None:
        """Close the session, whatever is cancelled meanwhile.

        SQLAlchemy has a task of its own do it, so that a cancellation does not stop it half way.
        Where there is nothing to wait for it cannot be, and that task would cost a tenth of a read.
        """
        if self.sync_session.is_at_rest:
            await self.close()
        else:
            await super().__aexit__(type_, value, traceback)

    async def get_many(
        self, entity: Any, idents: Iterable[Any], *, options: Sequence[Any] = ()
    ) -> list[Any]:
        """Return the rows of many primary keys, in their order. See `ReadSession.get_many`."""
        return await greenlet_spawn(self.sync_session.get_many, entity, idents, options=options)

    async def cached(self, derived: Derived[V], key: Any) -> V:
        """Return a cached list or count. See `ReadSession.cached`."""
        return await greenlet_spawn(self.sync_session.cached, derived, key)

    async def cached_many(self, derived: Derived[V], keys: Iterable[Any]) -> dict[Any, V]:
        """Return cached lists or counts by their keys. See `ReadSession.cached_many`."""
        return await greenlet_spawn(self.sync_session.cached_many, derived, keys)

    async def cached_together(
        self, wanted: Mapping[Derived[Any], Iterable[Any]]
    ) -> dict[Derived[Any], dict[Any, Any]]:
        """Return several cached lists and counts. See `ReadSession.cached_together`."""
        return await greenlet_spawn(self.sync_session.cached_together, wanted)

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

    @property
    def pending(self) -> tuple[str, ...]:
        """Physical shards that had not answered a commit in two phases; see `WriteSession`."""
        return self.sync_session.pending

    def emit(self, topic: str, payload: Any = None, *, key: Any = None, near: Any = None) -> None:
        """Write an event to the outbox, in this transaction. See `WriteSession.emit`."""
        self.sync_session.emit(topic, payload, key=key, near=near)

    async def once(self, event: HasId, *, near: Any, consumer: str = "") -> bool:
        """Note an event's effect; see `WriteSession.once`."""
        return await greenlet_spawn(self.sync_session.once, event, near=near, consumer=consumer)

    async def once_many(self, events: Iterable[_E], *, near: Any, consumer: str = "") -> list[_E]:
        """Note events' effects; see `WriteSession.once_many`."""
        return await greenlet_spawn(
            self.sync_session.once_many, events, near=near, consumer=consumer
        )
